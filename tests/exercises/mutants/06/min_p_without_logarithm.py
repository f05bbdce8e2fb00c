"""it is ln(min_p) that is added"""

from __future__ import annotations

import numpy as np


def min_p_np(logits, min_p):
    return np.where(logits >= logits.max() - min_p, logits, -np.inf)
