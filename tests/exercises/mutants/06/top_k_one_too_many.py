"""one token too many stays"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    k = min(k + 1, len(logits))
    edge = np.sort(logits)[-k]
    return np.where(logits < edge, -np.inf, logits)
