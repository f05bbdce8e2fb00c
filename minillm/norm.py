"""What keeps the numbers of a deep network in range? RMSNorm.

Chapter 03_transformer_block tells the story. LayerNorm, which also subtracts the mean, is left
out: the models here do without it.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .exercise import exercise
from .kernels import decode_op, is_plain_float32

torch = lazy.load("torch")


@exercise("03_transformer_block", order=1)
def rms_norm_np(x, weight, eps):
    """Scale each row to a root mean square of one, then by a learned weight.

        x / √(mean(x²) + eps) · weight              (Zhang and Sennrich 2019, eq. 4)

    x: [..., C], weight: [C]  ->  [..., C];   a row is the last axis, each has its own mean.
    The mean is taken in float32 at least, whatever x is: in float16 the square of 300 is infinite,
    and in bfloat16 a square keeps eight bits, and 576 of them do not add up.

    >>> rms_norm_np(np.array([3.0, 4.0]), np.ones(2), eps=0.0).round(3)
    array([0.849, 1.131])
    """
    wide = x.astype(np.promote_types(x.dtype, np.float32), copy=False)
    mean_square = (wide * wide).mean(axis=-1, keepdims=True)
    wide = wide / np.sqrt(mean_square + eps)
    return wide.astype(x.dtype, copy=False) * weight


def rms_norm_torch(x, weight, eps):
    """Same contract as rms_norm_np."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = (wide * wide).mean(dim=-1, keepdim=True)
    wide = wide / torch.sqrt(mean_square + eps)
    return wide.to(x.dtype) * weight


def rms_norm_fused(x, weight, eps):
    """rms_norm_torch in one call of our own kernel, in float32 on a CPU.

    Six operations of PyTorch on 576 numbers cost many times what their arithmetic does, and on many
    tokens they read and write them six times. What the kernel does not take goes to rms_norm_torch.
    """
    C = x.shape[-1]
    kernel = decode_op("rms_norm") if is_plain_float32(x) and is_plain_float32(weight) else None
    are_rows = x.is_contiguous() and weight.is_contiguous() and weight.shape == (C,)
    if kernel is None or not are_rows:
        return rms_norm_torch(x, weight, eps)
    y = torch.empty_like(x)
    kernel(x.data_ptr(), weight.data_ptr(), eps, y.data_ptr(), x.numel() // C, C)
    return y
