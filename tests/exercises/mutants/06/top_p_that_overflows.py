"""exp(1000) overflows"""

from __future__ import annotations

import numpy as np


def top_p_np(logits, top_p):
    weights = np.exp(logits)
    probs = weights / weights.sum()
    order = np.argsort(-probs, kind="stable")
    kept = order[np.cumsum(probs[order]) - probs[order] < top_p]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out
