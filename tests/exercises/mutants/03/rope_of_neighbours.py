"""neighbours (2i, 2i + 1) are paired"""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., 0::2] = a * cos - b * sin
    out[..., 1::2] = b * cos + a * sin
    return out
