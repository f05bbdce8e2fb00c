"""k can be larger than V"""

from __future__ import annotations

import numpy as np


def top_k_np(logits, k):
    edge = np.partition(logits, -k)[-k]
    return np.where(logits < edge, -np.inf, logits)
