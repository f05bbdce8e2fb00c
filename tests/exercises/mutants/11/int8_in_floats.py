"""q.astype(np.int8) is a byte a number"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, np.ones_like(largest), largest / 127)
    return np.round(wide / scale), scale
