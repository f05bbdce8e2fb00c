"""input `logits` is changed"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    k = min(k, len(logits))
    logits[logits < np.sort(logits)[-k]] = -np.inf
    return logits
