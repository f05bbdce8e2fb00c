"""the k smallest stay instead of the largest"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    k = min(k, len(logits))
    edge = np.sort(logits)[k - 1]
    return np.where(logits > edge, -np.inf, logits)
