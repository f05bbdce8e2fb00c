"""of the tokens that equal the k-th only some stay"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    kept = np.argsort(-logits, kind="stable")[:k]
    out = np.full_like(logits, -np.inf)
    out[kept] = logits[kept]
    return out
