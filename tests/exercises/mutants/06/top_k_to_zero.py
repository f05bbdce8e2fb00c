"""what is removed has to become −∞"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    k = min(k, len(logits))
    edge = np.sort(logits)[-k]
    return np.where(logits < edge, 0.0, logits)
