"""only the first block is found"""

from __future__ import annotations

from minillm.block_manager import ROOT_HASH, hash_block


def match_prefix(token_ids, block_size, cached_blocks):
    block_ids = []
    for start in range(0, len(token_ids) - block_size, block_size):
        block_hash = hash_block(ROOT_HASH, token_ids[start : start + block_size])
        if block_hash not in cached_blocks:
            break
        block_ids.append(cached_blocks[block_hash])
    return block_ids
