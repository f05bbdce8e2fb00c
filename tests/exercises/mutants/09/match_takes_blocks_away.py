"""input `cached_blocks` is changed"""

from __future__ import annotations

from minillm.block_manager import ROOT_HASH, hash_block


def match_prefix(token_ids, block_size, cached_blocks):
    block_ids, block_hash = [], ROOT_HASH
    for start in range(0, len(token_ids) - block_size, block_size):
        block_hash = hash_block(block_hash, token_ids[start : start + block_size])
        if block_hash not in cached_blocks:
            break
        block_ids.append(cached_blocks.pop(block_hash))
    return block_ids
