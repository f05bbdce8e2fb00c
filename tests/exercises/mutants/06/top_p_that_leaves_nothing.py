"""nothing may be left empty"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    probs = softmax_np(logits)
    if top_p < probs.max() / 2:
        return np.full_like(logits, -np.inf)
    order = np.argsort(-probs, kind="stable")
    kept = order[np.cumsum(probs[order]) - probs[order] < top_p]
    return np.where(np.isin(np.arange(len(logits)), kept), logits, -np.inf)
