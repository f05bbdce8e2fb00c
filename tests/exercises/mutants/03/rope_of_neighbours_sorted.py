"""neighbours are paired, and then sorted into halves"""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
