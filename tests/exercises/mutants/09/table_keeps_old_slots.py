"""keep no old slots"""

from __future__ import annotations


class BlockTable:
    def __init__(self, block_size):
        self.block_size = block_size
        self.block_ids = []
        self.slots = {}

    def num_missing_blocks(self, num_tokens):
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def slot_mapping(self, start, end):
        if self.num_missing_blocks(end):
            raise ValueError(f"no block for position {end - 1}")
        for position in range(start, end):
            if position not in self.slots:
                block_id, offset = self.block_ids[position // self.block_size], position
                self.slots[position] = block_id * self.block_size + offset % self.block_size
        return [self.slots[position] for position in range(start, end)]
