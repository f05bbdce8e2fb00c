"""the mask is upside down"""

from __future__ import annotations

import math

import numpy as np


def masked_attention_np(q, k, v, visible):
    H, K, D = q.shape[1], k.shape[1], q.shape[3]
    k, v = np.repeat(k, H // K, axis=1), np.repeat(v, H // K, axis=1)
    scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
    scores = np.where(visible[:, None], -np.inf, scores)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True) @ v
