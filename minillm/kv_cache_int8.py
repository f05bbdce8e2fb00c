"""Can keys and values be kept in half the bytes? As int8, with a scale for every head of a token.

A long context reads its whole cache for every new token. A key is quantized when it arrives and
never again; its scale, one number for D bytes, is kept beside it. What attention reads is
dequantized first, one layer at a time: here int8 saves memory, and costs time. An engine that wants
the time as well dequantizes inside its attention kernel. Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .kv_cache import KVCache, KVCacheTorch
from .quantization import quantize_int8_np, quantize_int8_torch

torch = lazy.load("torch")


class KVCacheInt8(KVCache):
    """Same contract as KVCache (NumPy); dtype: of q, k, v and of what attention reads.

    keys, values: [L, K, capacity, D] int8   key_scales, value_scales: [L, K, capacity, 1] float16
    Memory: 2·L·K·(D + 2)·capacity bytes, 52 % of bfloat16's where D is 64.
    """

    def __init__(self, config, capacity, dtype=np.float32):
        super().__init__(config, capacity, np.int8)
        self.dtype = dtype
        self.key_scales = np.empty((*self.keys.shape[:3], 1), dtype=np.float16)
        self.value_scales = np.empty_like(self.key_scales)

    def append(self, layer, k, v):
        """Write k, v [N, K, D], quantized;  -> all keys, values of the layer [K, S, D], in dtype.

        What is returned is a copy: the cache itself holds no such numbers.
        """
        (q_k, scale_k), (q_v, scale_v) = quantize_heads_np(k), quantize_heads_np(v)
        keys, values = super().append(layer, q_k, q_v)
        start, end = self.lengths[layer] - len(k), self.lengths[layer]
        self.key_scales[layer, :, start:end] = scale_k.swapaxes(0, 1)
        self.value_scales[layer, :, start:end] = scale_v.swapaxes(0, 1)
        return (keys * self.key_scales[layer, :, :end].astype(self.dtype),
                values * self.value_scales[layer, :, :end].astype(self.dtype))


class KVCacheInt8Torch(KVCacheTorch):
    """Same contract as KVCacheInt8; tensors on `device`."""

    def __init__(self, config, capacity, dtype, device):
        super().__init__(config, capacity, torch.int8, device)
        self.dtype = dtype
        shape = (*self.keys.shape[:3], 1)
        self.key_scales = torch.empty(shape, dtype=torch.float16, device=device)
        self.value_scales = torch.empty_like(self.key_scales)

    def append(self, layer, k, v):
        """Same contract as KVCacheInt8.append."""
        (q_k, scale_k), (q_v, scale_v) = quantize_heads_torch(k), quantize_heads_torch(v)
        keys, values = super().append(layer, q_k, q_v)
        start, end = self.lengths[layer] - len(k), self.lengths[layer]
        self.key_scales[layer, :, start:end] = scale_k.swapaxes(0, 1)
        self.value_scales[layer, :, start:end] = scale_v.swapaxes(0, 1)
        return (keys * self.key_scales[layer, :, :end].to(self.dtype),
                values * self.value_scales[layer, :, :end].to(self.dtype))


def quantize_heads_np(x):
    """x: [N, K, D]  ->  q [N, K, D] int8, scale [N, K, 1] float32; a row is a head of a token."""
    q, scale = quantize_int8_np(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def quantize_heads_torch(x):
    """Same contract as quantize_heads_np."""
    q, scale = quantize_int8_torch(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
