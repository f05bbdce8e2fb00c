"""A table that walks from block to block, copies of whole blocks, and a search that recurses."""

from __future__ import annotations

import hashlib
import math

import numpy as np


class BlockTable:
    def __init__(self, block_size):
        self.block_size = block_size
        self.block_ids = []

    def num_missing_blocks(self, num_tokens):
        missing = 0
        while (len(self.block_ids) + missing) * self.block_size < num_tokens:
            missing += 1
        return missing

    def slot_mapping(self, start, end):
        slots = []
        while start < end:
            index, offset = divmod(start, self.block_size)
            if index >= len(self.block_ids):
                raise ValueError(f"no block for position {start}")
            length = min(self.block_size - offset, end - start)
            first = self.block_ids[index] * self.block_size + offset
            slots += range(first, first + length)
            start += length
        return slots


def paged_gather_np(pages, block_tables):
    if block_tables.ndim > 1:
        return np.stack([paged_gather_np(pages, table) for table in block_tables])
    return np.concatenate([pages[block_id] for block_id in block_tables])


def match_prefix(token_ids, block_size, cached_blocks, parent=b""):
    if len(token_ids) <= block_size:
        return []
    data = np.array(token_ids[:block_size], dtype=np.int64).tobytes()
    name = hashlib.sha256(parent + data).digest()
    block_id = cached_blocks.get(name, math.nan)
    if block_id != block_id:
        return []
    return [block_id, *match_prefix(token_ids[block_size:], block_size, cached_blocks, name)]
