"""input `x` is changed"""

from __future__ import annotations


def rope_np(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    half = x.shape[-1] // 2
    a, b = x[..., :half].copy(), x[..., half:].copy()
    x[..., :half] = a * cos - b * sin
    x[..., half:] = b * cos + a * sin
    return x
