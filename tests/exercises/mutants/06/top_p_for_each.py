"""top_p is a bound for the sum of probabilities, not for each of them"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    return np.where(softmax_np(logits) >= top_p, logits, -np.inf)
