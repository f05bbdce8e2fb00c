"""those are ids of blocks"""

from __future__ import annotations


class BlockTable:
    def __init__(self, block_size):
        self.block_size = block_size
        self.block_ids = []

    def num_missing_blocks(self, num_tokens):
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def slot_mapping(self, start, end):
        if self.num_missing_blocks(end):
            raise ValueError(f"no block for position {end - 1}")
        return [self.block_ids[position // self.block_size] for position in range(start, end)]
