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
from .paged_cache import (
    PagedCache,
    PagedCacheTorch,
    lazy_zeros,
    paged_gather_np,
    paged_gather_torch,
    paged_scatter_np,
    paged_scatter_torch,
)
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


class PagedCacheInt8(PagedCache):
    """Same contract as PagedCache (NumPy), in the same bytes a token as KVCacheInt8."""

    def __init__(self, config, num_blocks, block_size, dtype=np.float32):
        super().__init__(config, num_blocks, block_size, np.int8)
        self.dtype = dtype
        self.key_scales = np.zeros((*self.keys.shape[:-1], 1), dtype=np.float16)
        self.value_scales = np.zeros_like(self.key_scales)

    def arrays(self):
        return [self.keys, self.values, self.key_scales, self.value_scales]

    def write(self, layer, slot_mapping, k, v):
        for x, pages, scales in ((k, self.keys, self.key_scales),
                                 (v, self.values, self.value_scales)):
            q, scale = quantize_heads_np(x)
            paged_scatter_np(pages[layer], slot_mapping, q)
            paged_scatter_np(scales[layer], slot_mapping, scale)

    def read(self, layer, block_tables):
        """Same contract as PagedCache.read, in dtype."""
        keys, values = super().read(layer, block_tables)
        return (keys * paged_gather_np(self.key_scales[layer], block_tables).astype(self.dtype),
                values * paged_gather_np(self.value_scales[layer], block_tables).astype(self.dtype))


class PagedCacheInt8Torch(PagedCacheTorch):
    """Same contract as PagedCacheInt8; tensors on `device`."""

    def __init__(self, config, num_blocks, block_size, dtype, device):
        super().__init__(config, num_blocks, block_size, torch.int8, device)
        self.dtype = dtype
        shape = (*self.keys.shape[:-1], 1)
        self.key_scales = lazy_zeros(shape, torch.float16, device)
        self.value_scales = lazy_zeros(shape, torch.float16, device)

    def arrays(self):
        return [self.keys, self.values, self.key_scales, self.value_scales]

    def write(self, layer, slot_mapping, k, v):
        for x, pages, scales in ((k, self.keys, self.key_scales),
                                 (v, self.values, self.value_scales)):
            q, scale = quantize_heads_torch(x)
            paged_scatter_torch(pages[layer], slot_mapping, q)
            paged_scatter_torch(scales[layer], slot_mapping, scale.to(torch.float16))

    def read(self, layer, block_tables):
        """Same contract as PagedCacheInt8.read."""
        keys, values = super().read(layer, block_tables)
        return (keys * paged_gather_torch(self.key_scales[layer], block_tables).to(self.dtype),
                values * paged_gather_torch(self.value_scales[layer], block_tables).to(self.dtype))


def quantize_heads_np(x):
    """x: [N, K, D]  ->  q [N, K, D] int8, scale [N, K, 1] float32; a row is a head of a token."""
    q, scale = quantize_int8_np(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)


def quantize_heads_torch(x):
    """Same contract as quantize_heads_np."""
    q, scale = quantize_int8_torch(x.reshape(-1, x.shape[-1]))
    return q.reshape(x.shape), scale.reshape(*x.shape[:-1], 1)
