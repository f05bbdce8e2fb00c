"""3 keys and 1 value are accepted"""

from __future__ import annotations

import numpy as np

from minillm.attention import attention_np


class KVCache:
    def __init__(self, config, capacity, dtype=np.float32):
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.capacity = capacity
        self.counts = [0] * L
        self.keys = np.empty((L, K, capacity, D), dtype)
        self.values = np.empty((L, K, capacity, D), dtype)

    @property
    def length(self):
        return min(self.counts)

    def append(self, layer, k, v):
        start, end = self.counts[layer], self.counts[layer] + len(k)
        if end > self.capacity:
            raise ValueError(f"{end} tokens are more than {self.capacity}")
        self.keys[layer, :, start:end] = k.swapaxes(0, 1)
        self.values[layer, :, start:end] = v.swapaxes(0, 1)
        self.counts[layer] = end
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer, q, k, v):
        keys, values = self.append(layer, k, v)
        return attention_np(q.swapaxes(0, 1), keys, values).swapaxes(0, 1)

    def truncate(self, length):
        if not 0 <= length <= self.length:
            raise ValueError(f"{length} of {self.length} tokens")
        self.counts = [length] * len(self.counts)
