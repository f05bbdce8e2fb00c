"""one scale is taken for all rows"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max()
    scale = np.full((len(x), 1), largest / 127 or 1, dtype=np.float32)
    return np.round(wide / scale).astype(np.int8), scale
