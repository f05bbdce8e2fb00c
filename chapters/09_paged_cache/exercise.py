"""Exercise of chapter 09_paged_cache: write BlockTable, paged_gather_np and match_prefix.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 09
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/09_paged_cache/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write paged_gather_torch below, in
PyTorch, and the same checks run on them.

Shapes: B sequences · K key/value heads · D head dimension.
"""

from __future__ import annotations

import numpy as np

from minillm.block_manager import ROOT_HASH, hash_block


class BlockTable:
    """Which blocks hold a sequence, in the order of its tokens.

    Position p stands in the block block_ids[p // block_size], at offset p % block_size. Counted
    through all blocks of the memory, that place is its slot: block id · block_size + offset.
    `block_ids` is a list, empty at first. Others append to it, exchange entries, and replace it by
    a new list; so read it at every call.

    >>> table = BlockTable(block_size=4)
    >>> table.block_ids += [7, 2]
    >>> table.slot_mapping(2, 6)
    [30, 31, 8, 9]
    >>> table.num_missing_blocks(9)
    1
    """

    def __init__(self, block_size):
        raise NotImplementedError("BlockTable.__init__ is yours to write")

    def num_missing_blocks(self, num_tokens):
        """Blocks to be added before the sequence has room for num_tokens in all; 0 if it has."""
        raise NotImplementedError("BlockTable.num_missing_blocks is yours to write")

    def slot_mapping(self, start, end):
        """-> a list: the slots of the positions from start to end − 1.

        Raises ValueError where a position has no block yet: a key would be written over another's.
        """
        raise NotImplementedError("BlockTable.slot_mapping is yours to write")


def paged_gather_np(pages, block_tables):
    """The rows of sequences in the order of their tokens, from wherever their blocks lie.

    pages: [num_blocks, block_size, K, D]   block_tables: [..., W] int, ids of W blocks
    -> [..., W·block_size, K, D], a copy: one sequence if block_tables is [W], B of them if it is
    [B, W]. A sequence that ends within its last block, or before it, is followed by whatever lies
    in the rest.
    """
    raise NotImplementedError("paged_gather_np is yours to write")


def match_prefix(token_ids, block_size, cached_blocks):
    """The blocks, computed earlier for whomever, that hold the beginning of these tokens.

    token_ids: of a sequence that is to be computed   cached_blocks: {hash of a full block: its id}
    -> a list of block ids, the longest unbroken run from the first block on. The hash of a block is
    hash_block(hash of the block before it, its tokens); before the first one stands ROOT_HASH.
    The last token's logits are still wanted, so its block is never taken, full or not.

    >>> first = hash_block(ROOT_HASH, [1, 2])
    >>> match_prefix([1, 2, 3, 4], 2, {first: 7, hash_block(first, [3, 4]): 5})
    [7]
    >>> match_prefix([1, 2, 3, 4, 9], 2, {first: 7, hash_block(first, [3, 4]): 5})
    [7, 5]
    >>> match_prefix([3, 4, 3, 4, 9], 2, {hash_block(first, [3, 4]): 5})
    []
    """
    raise NotImplementedError("match_prefix is yours to write")
