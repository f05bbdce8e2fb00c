"""the tokens go round the blocks in turns"""

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
        num_blocks = len(self.block_ids)
        return [self.block_ids[position % num_blocks] * self.block_size + position // num_blocks
                for position in range(start, end)]
