"""exp(1000) overflows"""

from __future__ import annotations

import numpy as np


def min_p_np(logits, min_p):
    probs = np.exp(logits) / np.exp(logits).sum()
    return np.where(probs >= min_p * probs.max(), logits, -np.inf)
