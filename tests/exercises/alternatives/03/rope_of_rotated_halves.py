"""As Hugging Face writes it: x·cos + rotate_half(x)·sin, angles doubled up."""

from __future__ import annotations

import numpy as np


def rope_np(x, cos, sin):
    cos, sin = (np.tile(part, 2)[:, None, :] for part in (cos, sin))
    first, second = np.split(x, 2, axis=-1)
    return x * cos + np.concatenate([-second, first], axis=-1) * sin
