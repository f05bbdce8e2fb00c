"""the mean is over the last axis, axis=-1"""

from __future__ import annotations

import numpy as np


def rms_norm_np(x, weight, eps):
    x = np.atleast_2d(x.astype(np.float64)) if x.ndim == 1 else x.astype(np.float64)
    out = x / np.sqrt((x * x).mean(axis=1, keepdims=True) + eps) * weight
    return out[0] if len(out) == 1 else out
