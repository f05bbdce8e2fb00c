"""a block whose keys are all masked has −∞"""

from __future__ import annotations

import math

import numpy as np


def online_softmax_attention_np(q, k, v, block_size=256):
    (H, T, D), (K, S, _) = q.shape, k.shape
    k, v = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)
    largest = np.full((H, T, 1), -math.inf, q.dtype)
    total, out = np.zeros((H, T, 1), q.dtype), np.zeros((H, T, D), q.dtype)
    position = np.arange(S - T, S)[:, None]
    for start in range(0, S, block_size):
        key = np.arange(start, min(start + block_size, S))
        scores = q @ k[:, key].swapaxes(1, 2) / math.sqrt(D)
        scores = np.where(key <= position, scores, -math.inf)
        new = scores.max(axis=-1, keepdims=True)
        probs, shrink = np.exp(scores - new), np.exp(largest - new)
        total = total * shrink + probs.sum(axis=-1, keepdims=True)
        out = out * shrink + probs @ v[:, key]
        largest = new
    return out / total
