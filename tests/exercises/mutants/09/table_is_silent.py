"""would be written over another's"""

from __future__ import annotations


class BlockTable:
    def __init__(self, block_size):
        self.block_size = block_size
        self.block_ids = []

    def num_missing_blocks(self, num_tokens):
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def slot_mapping(self, start, end):
        slots, block_ids = [], self.block_ids or [0]
        for position in range(start, end):
            block_id = block_ids[min(position // self.block_size, len(block_ids) - 1)]
            slots.append(block_id * self.block_size + position % self.block_size)
        return slots
