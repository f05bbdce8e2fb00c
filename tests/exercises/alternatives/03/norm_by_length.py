"""The root mean square as a length, and everything in float32."""

from __future__ import annotations

import numpy as np


def rms_norm_np(x, weight, eps):
    wide = x.astype(np.float32)
    # √(mean(x²) + eps) is the length of the row with one more entry, √(C·eps), over √C.
    length = np.hypot(np.linalg.norm(wide, axis=-1), np.sqrt(x.shape[-1] * eps))
    return wide * (np.sqrt(x.shape[-1]) / length)[..., None] * weight
