"""Each block is attended to alone, and answers are merged by their log-sums (FlashDecoding)."""

from __future__ import annotations

import numpy as np


def online_softmax_attention_np(q, k, v, block_size=256):
    (H, T, D), (K, S, _) = q.shape, k.shape
    q = q.reshape(K, H // K, T, D)
    out, log_total = np.zeros_like(q), np.full((K, H // K, T, 1), -np.inf, q.dtype)
    for start in range(0, S, block_size):
        keys, values = (x[:, None, start : start + block_size] for x in (k, v))
        scores = np.einsum("kgtd,kgsd->kgts", q, np.broadcast_to(
            keys, (K, H // K, *keys.shape[2:]))) / D**0.5
        hidden = np.arange(start, start + keys.shape[2]) > np.arange(S - T, S)[:, None]
        scores[..., hidden] = -np.inf
        block_log_total = np.logaddexp.reduce(scores, axis=-1, keepdims=True)
        new = np.logaddexp(log_total, block_log_total)
        out = out * np.exp(log_total - new) + np.exp(scores - new) @ values
        log_total = new
    return out.reshape(H, T, D)
