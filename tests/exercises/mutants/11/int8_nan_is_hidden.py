"""a comparison with NaN is False"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    scale = np.where(largest > 1e-30, largest / 127, np.ones_like(largest))
    return np.round(wide / scale).astype(np.int8), scale
