"""A list of small caches, one a layer, the online form throughout; and the PyTorch twin."""

from __future__ import annotations

import numpy as np
import torch

from minillm.attention import attention_torch, online_softmax_attention_np


class Layer:
    """Keys and values of one layer."""

    def __init__(self, keys, values):
        self.keys, self.values, self.count = keys, values, 0

    def append(self, k, v):
        end = self.count + k.shape[0]
        if k.shape != v.shape:
            raise ValueError(f"keys {k.shape}, values {v.shape}")
        if end > self.keys.shape[1]:
            raise ValueError(f"no room for {end} tokens")
        self.keys[:, self.count : end] = k.swapaxes(0, 1)
        self.values[:, self.count : end] = v.swapaxes(0, 1)
        self.count = end
        return self.keys[:, :end], self.values[:, :end]


class KVCache:
    def __init__(self, config, capacity, dtype=np.float32):
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.layers = [Layer(np.empty(shape, dtype), np.empty(shape, dtype))
                       for _ in range(config.num_hidden_layers)]

    @property
    def length(self):
        return min(layer.count for layer in self.layers)

    def append(self, layer, k, v):
        return self.layers[layer].append(k, v)

    def attend(self, layer, q, k, v):
        keys, values = self.append(layer, k, v)
        out = online_softmax_attention_np(np.moveaxis(q, 1, 0), keys, values, block_size=3)
        return np.moveaxis(out, 0, 1)

    def truncate(self, length):
        if length not in range(self.length + 1):
            raise ValueError(f"length {length}")
        for layer in self.layers:
            layer.count = length


class KVCacheTorch(KVCache):
    def __init__(self, config, capacity, dtype, device):
        shape = (config.num_key_value_heads, capacity, config.head_dim)
        self.capacity = capacity
        self.layers = [Layer(torch.zeros(shape, dtype=dtype, device=device),
                             torch.zeros(shape, dtype=dtype, device=device))
                       for _ in range(config.num_hidden_layers)]

    def attend(self, layer, q, k, v):
        keys, values = self.append(layer, k, v)
        return attention_torch(q.swapaxes(0, 1), keys, values).swapaxes(0, 1)
