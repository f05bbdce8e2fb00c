"""the squares are added up, but not divided by C"""

from __future__ import annotations

import numpy as np


def rms_norm_np(x, weight, eps):
    wide = x.astype(np.float64)
    return wide / np.sqrt((wide**2).sum(axis=-1, keepdims=True) + eps) * weight
