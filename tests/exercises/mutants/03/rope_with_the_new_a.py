"""b is turned with the new a"""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    cos, sin = cos[:, None], sin[:, None]
    a, b = np.split(x, 2, axis=-1)
    a = a * cos - b * sin
    b = b * cos + a * sin
    return np.concatenate([a, b], axis=-1)
