"""How does attention know where a token stands? Rotary position embedding (RoPE).

Entries i and i + D/2 of a head are the two coordinates of a point in a plane, and position p turns
that point by the angle p·inv_freq[i]. The dot product of a turned query and a turned key depends
on the difference of their positions alone. Fast planes tell neighbours apart, slow ones chapters.
Chapter 03_transformer_block tells the story.

Trap: the pairs are (i, i + D/2) here and in Hugging Face files, but (2i, 2i + 1) in the paper and
in the GGUF files of the llama architecture; `loading/gguf.py` reorders the rows of those.
"""

from __future__ import annotations

import math

import lazy_loader as lazy
import numpy as np

from .exercise import exercise
from .kernels import decode_op, is_plain_float32

torch = lazy.load("torch")


def rope_frequencies(config, freq_factors=None):
    """The angle by which each plane turns from one position to the next, in radians.

        inv_freq[i] = rope_theta^(-2i/D)                        (Su et al. 2021, §3.2.2)

    -> np.ndarray [D/2], float64.  Two ways to stretch them over a longer context:
    "linear" slows every plane by `factor` (Chen et al. 2023, "Position interpolation"), "llama3"
    only those that do not complete a few turns in the context the model was first trained on
    (Llama 3.1's release; Hugging Face's name for it).  freq_factors [D/2], which some GGUF files
    carry, are divisors that somebody worked out before.
    """
    D = config.head_dim
    inv_freq = config.rope_theta ** (-np.arange(0, D, 2, dtype=np.float64) / D)
    if freq_factors is not None:
        inv_freq = inv_freq / freq_factors
    scaling = config.rope_scaling
    if scaling is None:
        return inv_freq
    if scaling.rope_type == "linear":
        return inv_freq / scaling.factor
    turns = scaling.original_max_position_embeddings * inv_freq / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0, 1)  # 1: fast, left alone; 0: slow, stretched
    return keep * inv_freq + (1 - keep) * inv_freq / scaling.factor


def rope_angles_np(positions, inv_freq):
    """cos and sin of every angle, once for all layers.

    positions: [N] int, inv_freq: [D/2]  ->  cos, sin: [N, D/2] in inv_freq's dtype.
    """
    angles = positions[:, None] * inv_freq
    return np.cos(angles), np.sin(angles)


def rope_angles_torch(positions, inv_freq):
    """Same contract as rope_angles_np."""
    angles = positions[:, None] * inv_freq
    return torch.cos(angles), torch.sin(angles)


@exercise("03_transformer_block", order=2)
def rope_np(x, cos, sin):
    """Turn every head of every token by the angles of its position.

        (a, b)  ->  (a·cos − b·sin,  b·cos + a·sin)             (Su et al. 2021, eq. 34)

    x: [N, H, D], cos and sin: [N, D/2], a row a token, the same for its H heads  ->  [N, H, D].
    Pair i of a head is (a, b) = its entries i and i + D/2: all a in the first half, all b in the
    second, before and after.

    >>> quarter_turn = np.array([[0.0]]), np.array([[1.0]])          # cos and sin of 90 degrees
    >>> rope_np(np.array([[[1.0, 0.0]]]), *quarter_turn)
    array([[[0., 1.]]])
    """
    cos, sin = cos[:, None], sin[:, None]  # [N, 1, D/2]: the same for every head
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_torch(x, cos, sin):
    """Same contract as rope_np."""
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rope_fused(x, cos, sin):
    """rope_torch in one call of our own kernel, in float32 on a CPU."""
    (N, H, D), (stride, *inner) = x.shape, x.stride()
    kernel = decode_op("rope") if is_plain_float32(x) and is_plain_float32(cos) else None
    are_alike = cos.shape == sin.shape == (N, D // 2) and cos.dtype == sin.dtype
    are_rows = inner == [D, 1] and cos.is_contiguous() and sin.is_contiguous()
    if kernel is None or not are_alike or not are_rows:
        return rope_torch(x, cos, sin)
    y = x.new_empty(N, H, D)
    kernel(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), N, H, D, stride)
    return y
