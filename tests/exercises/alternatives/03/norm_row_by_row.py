"""A loop over the rows, in Python's own numbers."""

from __future__ import annotations

import numpy as np


def rms_norm_np(x, weight, eps):
    rows = x.reshape(-1, x.shape[-1]).tolist()
    out = []
    for row in rows:
        root = (sum(number * number for number in row) / len(row) + eps) ** 0.5
        out.append([number / root for number in row])
    return np.array(out, x.dtype).reshape(x.shape) * weight
