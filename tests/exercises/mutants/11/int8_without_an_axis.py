"""the scale is [R, 1]"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1)
    scale = np.where(largest == 0, np.ones_like(largest), largest / 127)
    return np.round(wide / scale[:, None]).astype(np.int8), scale
