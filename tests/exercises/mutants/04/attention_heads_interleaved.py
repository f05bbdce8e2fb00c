"""not to h % K"""

from __future__ import annotations

import math

import numpy as np


def attention_np(q, k, v):
    (H, T, D), (K, S, _) = q.shape, k.shape
    k, v = np.tile(k, (H // K, 1, 1)), np.tile(v, (H // K, 1, 1))
    scores = q @ k.swapaxes(1, 2) / math.sqrt(D)
    scores = np.where(np.tril(np.ones((T, S)), S - T) > 0, scores, -math.inf)
    probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True) @ v
