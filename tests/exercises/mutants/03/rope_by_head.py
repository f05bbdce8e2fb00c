"""head h is turned by the angles of token h"""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    a, b = np.split(x, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
