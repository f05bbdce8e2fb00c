"""A row of the matrix at a time, as the numbers that it stands for."""

from __future__ import annotations

import numpy as np


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    N, C = x.shape
    y = np.empty((N, len(packed)), dtype=np.float32)
    group = np.arange(C) // group_size
    for r, row in enumerate(packed):
        q = np.stack([row & 0x0F, row >> 4], axis=1).reshape(-1)[:C]
        y[:, r] = x.astype(np.float64) @ (scale[r, group] * q + minimum[r, group])
    return y
