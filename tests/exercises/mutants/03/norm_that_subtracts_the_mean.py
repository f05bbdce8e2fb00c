"""the mean is subtracted first: that is LayerNorm"""

from __future__ import annotations

import numpy as np


def rms_norm_np(x, weight, eps):
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight
