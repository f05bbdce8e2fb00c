"""Each pair of neighbours times (1, 16), summed."""

from __future__ import annotations

import numpy as np


def pack_int4_np(q):
    R, C = q.shape
    even = np.zeros((R, (C + 1) // 2, 2), dtype=np.uint8)
    even.reshape(R, -1)[:, :C] = q
    return (even * np.array([1, 16], dtype=np.uint8)).sum(axis=2, dtype=np.uint8)
