"""Slots computed by NumPy, rows gathered by slot, hashes made lazily; and the PyTorch twin."""

from __future__ import annotations

from itertools import takewhile

import numpy as np

from minillm.block_manager import ROOT_HASH, hash_block


class BlockTable:
    def __init__(self, block_size):
        self.block_ids, self.block_size = [], block_size

    def num_missing_blocks(self, num_tokens):
        needed, rest = divmod(num_tokens, self.block_size)
        return max(needed + (rest > 0), len(self.block_ids)) - len(self.block_ids)

    def slot_mapping(self, start, end):
        if end > len(self.block_ids) * self.block_size:
            raise ValueError(f"position {end - 1} has no block")
        blocks, offsets = divmod(np.arange(start, end), self.block_size)
        ids = np.array(self.block_ids, dtype=int)
        return (ids[blocks] * self.block_size + offsets).tolist()


def paged_gather_np(pages, block_tables):
    block_size, K, D = pages.shape[1:]
    slots = np.repeat(block_tables * block_size, block_size, axis=-1)
    slots = slots + np.arange(slots.shape[-1]) % block_size
    return np.take(pages.reshape(-1, K, D), slots, axis=0)


def paged_gather_torch(pages, block_tables):
    return pages[block_tables].flatten(-4, -3)


def match_prefix(token_ids, block_size, cached_blocks):
    def ids():
        name = ROOT_HASH
        for index in range((len(token_ids) - 1) // block_size):
            name = hash_block(name, token_ids[index * block_size : (index + 1) * block_size])
            yield cached_blocks.get(name)

    return list(takewhile(lambda block_id: block_id is not None, ids()))
