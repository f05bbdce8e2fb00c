"""astype cuts the fraction off"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    return (wide / scale * np.float32(1 + 1e-6)).astype(np.int8), scale
