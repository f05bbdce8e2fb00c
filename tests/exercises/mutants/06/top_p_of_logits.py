"""logits are summed, not probabilities"""

from __future__ import annotations

import numpy as np


def top_p_np(logits, top_p):
    order = np.argsort(-logits, kind="stable")
    before = np.concatenate([[-np.inf], np.cumsum(logits[order])[:-1]])
    kept = order[before < top_p]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out
