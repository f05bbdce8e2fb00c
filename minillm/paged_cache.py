"""How do sequences of all lengths share one memory? Keys and values in blocks.

`block_manager.py` decides which block belongs to whom; here are the arrays. New keys are scattered
to the slots that a block table names, and attention gathers a sequence's keys from its blocks
again, or reads them where they are. One step of the engine takes many sequences through the model
at once: rows that continue an answer by one token, and pieces of prompts. The model sees neither
sequences nor blocks, only a cache that attends. Chapter 09_paged_cache tells the story.

Decoding rows attend together, without a loop over sequences: those whose contexts need about as
many blocks, up to a power of two, are gathered side by side and masked. (So their shapes are few,
which a CUDA graph wants.) On a CPU our own kernel reads the blocks in place, in float32 and
bfloat16.
"""

from __future__ import annotations

import math
from itertools import chain

import lazy_loader as lazy
import numpy as np

from .attention import (
    attention_np,
    attention_sdpa,
    masked_attention_np,
    masked_attention_sdpa,
    online_softmax_attention_np,
)
from .exercise import exercise
from .kernels.paged_attention import PagedAttention, has_paged_attention
from .kv_cache import MAX_PLAIN_SCORES

torch = lazy.load("torch")

SHORT_CONTEXT = 256  # tokens; beyond, a piece of a prompt is large products, PyTorch's strength


def paged_scatter_np(pages, slot_mapping, x):
    """Write each token's row to its slot, in place.

    pages: [num_blocks, block_size, K, D]   slot_mapping: [N] int, block id · block_size + offset
    x: [N, K, D].   A slot that is named twice must be given the same row twice.
    """
    K, D = pages.shape[2:]
    pages.reshape(-1, K, D)[slot_mapping] = x  # pages is contiguous: a view, not a copy


def paged_scatter_torch(pages, slot_mapping, x):
    """Same contract as paged_scatter_np."""
    K, D = pages.shape[2:]
    pages.view(-1, K, D)[slot_mapping] = x


@exercise("09_paged_cache", order=2)
def paged_gather_np(pages, block_tables):
    """The rows of sequences in the order of their tokens, from wherever their blocks lie.

    pages: [num_blocks, block_size, K, D]   block_tables: [..., W] int, ids of W blocks
    -> [..., W·block_size, K, D], a copy: one sequence if block_tables is [W], B of them if it is
    [B, W]. A sequence that ends within its last block, or before it, is followed by whatever lies
    in the rest.
    """
    block_size, K, D = pages.shape[1:]
    *batch, W = block_tables.shape
    return pages[block_tables].reshape(*batch, W * block_size, K, D)


def paged_gather_torch(pages, block_tables):
    """Same contract as paged_gather_np."""
    block_size, K, D = pages.shape[1:]
    *batch, W = block_tables.shape
    return pages[block_tables].reshape(*batch, W * block_size, K, D)


class PagedCache:
    """Keys and values of all sequences, in one memory (NumPy).

    keys, values: [L, num_blocks, block_size, K, D].   Memory: 2·L·K·D·block_size numbers a block,
    asked for in zeros, which the system hands out as they are touched. (A masked value must be a
    number, since 0 · NaN does not vanish from a sum.)
    """

    def __init__(self, config, num_blocks, block_size, dtype=np.float32):
        self.block_size = block_size
        K, D = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_blocks, block_size, K, D)
        self.keys, self.values = np.zeros(shape, dtype), np.zeros(shape, dtype)

    def arrays(self):
        """All arrays that are cut into blocks; the block is the second axis."""
        return [self.keys, self.values]

    def copy_blocks(self, copies):
        """copies: [(from, to), ...], block ids; in all layers."""
        for array in self.arrays() if copies else ():
            sources, targets = zip(*copies)
            array[:, list(targets)] = array[:, list(sources)]

    def clear_blocks(self, block_ids):
        """Zeros again, after a step that may have left anything there."""
        for array in self.arrays():
            array[:, list(block_ids)] = 0

    def write(self, layer, slot_mapping, k, v):
        paged_scatter_np(self.keys[layer], slot_mapping, k)
        paged_scatter_np(self.values[layer], slot_mapping, v)

    def read(self, layer, block_tables):
        """-> keys, values [..., W·block_size, K, D]; see paged_gather_np."""
        return (paged_gather_np(self.keys[layer], block_tables),
                paged_gather_np(self.values[layer], block_tables))

    def step(self, spans):
        """What one forward pass takes for its cache; `spans` as StepLayout describes them."""
        num_blocks = self.keys.shape[1]
        return PagedStep(self, StepLayout(spans, self.block_size, num_blocks))


class PagedCacheTorch(PagedCache):
    """Same contract as PagedCache; tensors on `device`."""

    def __init__(self, config, num_blocks, block_size, dtype, device):
        self.block_size, self.device = block_size, device
        K, D = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, num_blocks, block_size, K, D)
        self.keys, self.values = (lazy_zeros(shape, dtype, device) for _ in range(2))
        self.has_kernel = has_paged_attention(self.keys)

    def write(self, layer, slot_mapping, k, v):
        paged_scatter_torch(self.keys[layer], slot_mapping, k)
        paged_scatter_torch(self.values[layer], slot_mapping, v)

    def read(self, layer, block_tables):
        """Same contract as PagedCache.read."""
        return (paged_gather_torch(self.keys[layer], block_tables),
                paged_gather_torch(self.values[layer], block_tables))

    def step(self, spans):
        layout = StepLayout(spans, self.block_size, self.keys.shape[1],
                            in_one_group=self.device.type == "cuda")
        return PagedStepTorch(self, layout)


def lazy_zeros(shape, dtype, device):
    """torch.zeros, which would write them all; on a CPU the system has zeros that cost nothing
    until they are touched."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    num_bytes = dtype.itemsize * math.prod(shape)
    raw = np.zeros(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64  # a vector that lies across two cache lines costs two loads
    return torch.from_numpy(raw[start : start + num_bytes]).view(dtype).reshape(shape)


class StepLayout:
    """Which rows of a step belong to whom: index arrays, made once, used in every layer.

    spans: [(block_table, start, num_tokens), ...]: the step computes num_tokens of that sequence,
    from position `start` on. The rows of the step stand in this order.
    max_blocks: that a group may gather, in each layer; the cache's own number bounds the memory.
    in_one_group: decoding rows form one group, however unequal they are and whatever it gathers: a
    CUDA graph is captured for one size of it. Else the groups are those of equal width.

    slot_mapping: [N] where each row's key goes
    short: (rows [R], block_tables [B, W], table_of_row [R], context_lens [R]) or None: all rows
        that decode, or whose context is short; what a kernel takes that reads blocks in place
    decodes: [(rows [B], block_tables [B, W], context_lens [B]), ...], W a power of two
    chunks: [(rows, a slice; block_ids [W]; context_len), ...], the pieces of prompts
    long_chunks: those of them that are not among the short rows
    """

    def __init__(self, spans, block_size, max_blocks, in_one_group=False):
        slots, self.chunks, self.long_chunks, short, by_width = [], [], [], [], {}
        for table, start, num in spans:
            end, first_row = start + num, len(slots)
            slots += table.slot_mapping(start, end)
            block_ids = table.block_ids[: -(-end // block_size)]
            rows = range(first_row, first_row + num)
            if num == 1:
                width = 1 << (len(block_ids) - 1).bit_length()
                by_width.setdefault(width, []).append((first_row, block_ids, end))
            else:
                chunk = slice(first_row, first_row + num), np.array(block_ids), end
                self.chunks.append(chunk)
                if end > SHORT_CONTEXT:
                    self.long_chunks.append(chunk)
                    continue
            short.append((rows, block_ids, range(start + 1, end + 1)))
        if in_one_group and by_width:
            by_width = {max(by_width): sorted(chain(*by_width.values()))}
        self.slot_mapping = np.array(slots)
        self.decodes = []
        for width, members in by_width.items():
            size = len(members) if in_one_group else max(1, max_blocks // width)
            self.decodes += [decode_group(members[first : first + size], width)
                             for first in range(0, len(members), size)]
        self.short = short_rows(short) if short else None


def decode_group(members, width):
    rows, tables, context_lens = zip(*members)
    return np.array(rows), pad_tables(tables, width), np.array(context_lens, dtype=np.int32)


def short_rows(members):
    ranges, tables, context_lens = zip(*members)
    counts = [len(rows) for rows in ranges]
    return (np.concatenate(ranges), pad_tables(tables, max(map(len, tables))),
            np.repeat(np.arange(len(members), dtype=np.int32), counts),
            np.concatenate(context_lens).astype(np.int32))


def pad_tables(tables, width):
    """[B, width] int32: a table that is shorter is filled up with its last block; all that is
    behind a sequence's last token is masked."""
    padded = np.empty((len(tables), width), dtype=np.int32)
    for row, block_ids in zip(padded, tables):
        row[: len(block_ids)], row[len(block_ids):] = block_ids, block_ids[-1]
    return padded


class PagedStep:
    """The cache of one forward pass over rows of many sequences (NumPy)."""

    def __init__(self, cache, layout):
        self.cache, self.layout = cache, layout

    def attend(self, layer, q, k, v):
        """Store fresh keys and values, then let each row attend to its own sequence.

        q: [N, H, D], k, v: [N, K, D]  ->  [N, H, D].   All rows are stored first: a row may read
        what another row of the same step has just computed, if they share a block.
        """
        self.cache.write(layer, self.layout.slot_mapping, k, v)
        out = np.empty_like(q)
        for rows, block_tables, context_lens in self.layout.decodes:
            keys, values = self.cache.read(layer, block_tables)  # [B, S, K, D]
            visible = np.arange(keys.shape[1]) < context_lens[:, None]  # [B, S]
            values[~visible] = 0  # whatever was left there, a NaN perhaps, would survive 0 · NaN
            out[rows] = masked_attention_np(q[rows][:, :, None], keys.swapaxes(1, 2),
                                            values.swapaxes(1, 2), visible[:, None])[:, :, 0]
        for rows, block_ids, context_len in self.layout.chunks:
            keys, values = (each[:context_len] for each in self.cache.read(layer, block_ids))
            plain = (rows.stop - rows.start) * context_len <= MAX_PLAIN_SCORES
            attention = attention_np if plain else online_softmax_attention_np
            out[rows] = attention(q[rows].swapaxes(0, 1), keys.swapaxes(0, 1),
                                  values.swapaxes(0, 1)).swapaxes(0, 1)
        return out


class PagedStepTorch:
    """Same contract as PagedStep; PyTorch's fused attention, or our own kernel where it fits."""

    def __init__(self, cache, layout):
        self.cache = cache
        self.slot_mapping = self._move(layout.slot_mapping)
        self.kernel = None
        if layout.short is not None and cache.has_kernel:
            rows, block_tables, table_of_row, context_lens = map(torch.from_numpy, layout.short)
            self.kernel = PagedAttention(block_tables, table_of_row, context_lens)
            self.rows = slice(None) if len(rows) == len(layout.slot_mapping) else rows
        self.chunks = [(rows, self._move(block_ids), context_len) for rows, block_ids, context_len
                       in (layout.long_chunks if self.kernel else layout.chunks)]
        self.decodes = []
        for rows, block_tables, context_lens in [] if self.kernel else layout.decodes:
            block_tables, context_lens = self._move(block_tables), self._move(context_lens)
            positions = torch.arange(block_tables.shape[1] * cache.block_size, device=cache.device)
            visible = positions < context_lens[:, None]  # [B, S], the same in every layer
            hidden = ~visible[:, :, None, None]
            self.decodes.append((self._move(rows), block_tables, visible[:, None], hidden))

    def _move(self, array):
        return torch.from_numpy(array).to(self.cache.device)

    def attend(self, layer, q, k, v):
        """Same contract as PagedStep.attend."""
        self.cache.write(layer, self.slot_mapping, k, v)
        if self.kernel and self.rows == slice(None):
            return self.kernel(q, self.cache.keys[layer], self.cache.values[layer])
        out = torch.empty_like(q)
        if self.kernel:
            out[self.rows] = self.kernel(q[self.rows], self.cache.keys[layer],
                                         self.cache.values[layer])
        for rows, block_tables, visible, hidden in self.decodes:
            keys, values = (each.masked_fill_(hidden, 0)  # see PagedStep.attend
                            for each in self.cache.read(layer, block_tables))
            out[rows] = masked_attention_sdpa(q[rows][:, :, None], keys.transpose(1, 2),
                                              values.transpose(1, 2), visible)[:, :, 0]
        for rows, block_ids, context_len in self.chunks:
            keys, values = (each[:context_len] for each in self.cache.read(layer, block_ids))
            out[rows] = attention_sdpa(q[rows].swapaxes(0, 1), keys.swapaxes(0, 1),
                                       values.swapaxes(0, 1)).swapaxes(0, 1)
        return out
