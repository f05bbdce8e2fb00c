"""a scale is taken for each column"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=0, keepdims=True)
    scale = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    return np.round(wide / scale).astype(np.int8), scale
