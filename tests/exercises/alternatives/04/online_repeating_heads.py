"""Keys and values once for each query head, queries in rows of their own: more memory, no scores.

It starts from a largest score that is finite, and skips the blocks that a query may not see.
"""

from __future__ import annotations

import math

import numpy as np


def online_softmax_attention_np(q, k, v, block_size=256):
    (H, T, D), (K, S, _) = q.shape, k.shape
    keys, values = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)
    out = np.empty_like(q)
    for t in range(T):
        visible = S - T + t + 1
        largest = np.full((H, 1), np.finfo(q.dtype).min)
        total, mixed = np.zeros((H, 1), q.dtype), np.zeros((H, D), q.dtype)
        for start in range(0, visible, block_size):
            block = slice(start, min(start + block_size, visible))
            scores = np.einsum("hd,hsd->hs", q[:, t] / math.sqrt(D), keys[:, block])
            new = np.maximum(largest, scores.max(axis=1, keepdims=True))
            shrink, probs = np.exp(largest - new), np.exp(scores - new)
            total = total * shrink + probs.sum(axis=1, keepdims=True)
            mixed = mixed * shrink + np.einsum("hs,hsd->hd", probs, values[:, block])
            largest = new
        out[:, t] = mixed / total
    return out
