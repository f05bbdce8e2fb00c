"""of equal tokens the higher ids stay"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    probs = softmax_np(logits)
    order = np.argsort(probs, kind="stable")[::-1]
    kept = order[np.cumsum(probs[order]) - probs[order] < top_p - 1e-9]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out
