"""One array for keys and values of all layers, tokens before heads; attention head by head."""

from __future__ import annotations

import numpy as np


class KVCache:
    def __init__(self, config, capacity, dtype=np.float32):
        self.capacity = capacity
        self.config = config
        self.rows = np.zeros((config.num_hidden_layers, 2, capacity, config.num_key_value_heads,
                              config.head_dim), dtype)
        self.written = np.zeros(config.num_hidden_layers, dtype=int)

    @property
    def length(self):
        return self.written.min()

    def append(self, layer, k, v):
        if k.shape != v.shape or self.written[layer] + len(k) > self.capacity:
            raise ValueError("they do not fit")
        new = slice(self.written[layer], self.written[layer] + len(k))
        self.rows[layer, 0, new] = k
        self.rows[layer, 1, new] = v
        self.written[layer] += len(k)
        held = self.rows[layer, :, : self.written[layer]]
        return tuple(held.transpose(0, 2, 1, 3))

    def attend(self, layer, q, k, v):
        keys, values = self.append(layer, k, v)
        (N, H, D), S = q.shape, keys.shape[1]
        out = np.empty_like(q)
        for h in range(H):
            group = h // (H // len(keys))
            scores = q[:, h] @ keys[group].T / np.sqrt(D)
            scores[np.triu_indices(N, S - N + 1, S)] = -np.inf
            probs = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[:, h] = probs @ values[group] / probs.sum(axis=1, keepdims=True)
        return out

    def truncate(self, length):
        if length < 0 or length > self.length:
            raise ValueError("those tokens are not there")
        self.written[:] = length
