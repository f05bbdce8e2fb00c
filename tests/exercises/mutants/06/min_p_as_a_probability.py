"""min_p is taken as a probability"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def min_p_np(logits, min_p):
    return np.where(softmax_np(logits) >= min_p, logits, -np.inf)
