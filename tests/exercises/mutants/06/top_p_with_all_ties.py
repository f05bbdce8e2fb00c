"""equal tokens stay all together"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    probs = softmax_np(logits)
    ordered = np.sort(probs)[::-1]
    edge = ordered[np.cumsum(ordered) - ordered < top_p - 1e-9].min(initial=probs.max())
    return np.where(probs >= edge, logits, -np.inf)
