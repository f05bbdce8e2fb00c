"""PyTorch twins beside the functions, in other words."""

from __future__ import annotations

import numpy as np
import torch


def quantize_int8_np(x):
    scale = np.abs(x).max(axis=1, keepdims=True).astype(np.float32) / np.float32(127)
    scale = scale + (scale == 0)
    return np.rint(x / scale).astype(np.int8), scale


def quantize_int8_torch(x):
    x = x.float()
    scale = x.abs().amax(dim=1, keepdim=True) / 127
    scale = scale.masked_fill(scale == 0, 1)
    return (x / scale).round().to(torch.int8), scale


def pack_int4_np(q):
    packed = q[:, ::2].copy()
    packed[:, : q.shape[1] // 2] += 16 * q[:, 1::2]
    return packed


def pack_int4_torch(q):
    packed = q[:, ::2].clone()
    packed[:, : q.shape[1] // 2] += 16 * q[:, 1::2]
    return packed
