"""the scale is computed in float16"""

from __future__ import annotations

import numpy as np


def quantize_int8_np(x):
    largest = np.abs(x).max(axis=1, keepdims=True)
    scale = np.where(largest == 0, np.ones_like(largest), largest / 127)
    q = np.round(x.astype(np.float32) / scale.astype(np.float32))
    return q.clip(-127, 127).astype(np.int8), scale.astype(np.float32)
