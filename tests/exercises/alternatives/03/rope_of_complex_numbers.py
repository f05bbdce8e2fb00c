"""A turn is a product of complex numbers: (a + ib)·(cos + i·sin)."""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * (cos + 1j * sin)[:, np.newaxis, :]
    return np.concatenate([turned.real, turned.imag], axis=-1).astype(x.dtype)
