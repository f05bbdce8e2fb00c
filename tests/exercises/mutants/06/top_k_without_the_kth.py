"""one token too few: the k-th largest itself stays"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    k = min(k, len(logits))
    edge = np.sort(logits)[-k]
    return np.where(logits > edge, logits, -np.inf)
