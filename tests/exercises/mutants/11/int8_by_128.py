"""the largest number is divided by 128"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / 128).astype(np.float32)
    return np.round(wide / scale).clip(-128, 127).astype(np.int8), scale
