"""the largest number is taken with its sign"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = wide.max(axis=1, keepdims=True)
    scale = np.where(largest == 0, 1, largest / 127).astype(np.float32)
    return np.round(wide / scale).astype(np.int8), scale
