"""the tokens right on the edge go"""

from __future__ import annotations

import numpy as np


def min_p_np(logits, min_p):
    edge = logits.max() + np.log(min_p)
    return np.where(logits > edge, logits, -np.inf)
