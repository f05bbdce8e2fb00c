"""the scale of a row of zeros must not be 0"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) / 127
    return np.nan_to_num(np.round(wide / scale)).astype(np.int8), scale
