"""the token with which the sum reaches top_p belongs to the nucleus too"""

from __future__ import annotations

import numpy as np

from minillm.sampling import softmax_np


def top_p_np(logits, top_p):
    probs = softmax_np(logits)
    order = np.argsort(-probs, kind="stable")
    num_kept = max(1, int((np.cumsum(probs[order]) <= top_p).sum()))
    out = np.full_like(logits, -np.inf)
    out[order[:num_kept]] = logits[order[:num_kept]]
    return out
