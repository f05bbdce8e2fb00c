"""Who owns which piece of the cache? Blocks, block tables, reference counts, prefix reuse.

The memory for keys and values is cut into blocks of `block_size` tokens, as an operating system
cuts its memory into pages: a sequence takes a block when it needs one, from anywhere, and its block
table says which. Sequences that begin with the same tokens share the blocks of that beginning.
(Kwon et al. 2023, "PagedAttention", §4.)

This is bookkeeping: numbers of blocks, no tensor. The arrays themselves, and how attention finds
its way through a block table, are `paged_cache.py`'s subject. Chapter 09_paged_cache tells the
story. Left out: moving blocks to slower memory (swapping); who is preempted computes again.
"""

from __future__ import annotations

import hashlib
from array import array

from .exercise import exercise

ROOT_HASH = b""  # the parent of a sequence's first block


@exercise("09_paged_cache", order=1)
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
        self.block_size = block_size
        self.block_ids = []

    def num_missing_blocks(self, num_tokens):
        """Blocks to be added before the sequence has room for num_tokens in all; 0 if it has."""
        return max(0, -(-num_tokens // self.block_size) - len(self.block_ids))

    def slot_mapping(self, start, end):
        """-> a list: the slots of the positions from start to end − 1.

        Raises ValueError where a position has no block yet: a key would be written over another's.
        """
        if self.num_missing_blocks(end):
            raise ValueError(f"{len(self.block_ids)} blocks of {self.block_size} have no place for "
                             f"position {end - 1}: add blocks first")
        return [self.block_ids[position // self.block_size] * self.block_size
                + position % self.block_size for position in range(start, end)]


def hash_block(parent_hash, token_ids):
    """A name for a full block: its tokens and, through the parent's hash, all tokens before it.

    A key depends on its position and on everything before it, so the same tokens in another place
    are another block. SHA-256, because requests of different users meet in this table: nobody must
    be able to write a prompt that finds another's blocks by a collision.   -> bytes
    """
    return hashlib.sha256(parent_hash + array("q", token_ids).tobytes()).digest()


@exercise("09_paged_cache", order=3)
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
    block_ids, block_hash = [], ROOT_HASH
    for start in range(0, len(token_ids) - block_size, block_size):
        block_hash = hash_block(block_hash, token_ids[start : start + block_size])
        if block_hash not in cached_blocks:
            break
        block_ids.append(cached_blocks[block_hash])
    return block_ids


class BlockManager:
    """All blocks, each in exactly one of three states.

        free         holds nothing that anybody wants                      free_block_ids
        referenced   stands in ref_counts[id] block tables, one or more
        cached       nobody's, but its tokens are known and may come back  evictable_block_ids

    A block is taken from the free ones or, if there are none, from the cached ones: the least
    recently used first. A sequence is any object with `token_ids`, `num_computed_tokens`, a
    `block_table` and `block_hashes`, the hashes of its full blocks as far as they were needed.

    num_blocks, block_size: the memory.   enable_prefix_caching: False lets no two requests share.
    """

    def __init__(self, num_blocks, block_size, enable_prefix_caching=True):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.free_block_ids = list(reversed(range(num_blocks)))  # a stack; block 0 goes first
        self.evictable_block_ids = {}  # a dict for its order: the least recently used comes first
        self.ref_counts = [0] * num_blocks
        self.cached_blocks = {}  # hash -> id of the full block, referenced or not
        self.hash_of_block = {}  # the other way
        self.copies = []  # (from, to): blocks whose contents must be copied before the next step
        self.new_block_ids = []  # registered for what the next step will write

    @property
    def num_available_blocks(self):
        return len(self.free_block_ids) + len(self.evictable_block_ids)

    # What the scheduler asks for a sequence.

    def fits_when_alone(self, num_tokens):
        """True if a sequence of so many tokens has room when everybody else has gone."""
        return num_tokens <= self.num_blocks * self.block_size

    def can_admit(self, sequence, num_spare_blocks=0):
        """True if all tokens of the sequence find room, and so many blocks are left over."""
        matched = self._match(sequence)
        num_new = sequence.block_table.num_missing_blocks(len(sequence.token_ids)) - len(matched)
        num_revived = sum(self.ref_counts[block_id] == 0 for block_id in matched)
        return num_new + num_revived + num_spare_blocks <= self.num_available_blocks

    def admit(self, sequence):
        """Give a sequence blocks for all its tokens; what others have computed is not computed
        again: `num_computed_tokens` begins behind it."""
        matched = self._match(sequence)
        for block_id in matched:  # all of them before any is allocated, which may evict
            self._acquire(block_id)
        table = sequence.block_table
        table.block_ids = list(matched)
        num_missing = table.num_missing_blocks(len(sequence.token_ids))
        table.block_ids += [self._allocate() for _ in range(num_missing)]
        num_cached_tokens = len(matched) * self.block_size
        sequence.num_computed_tokens = num_cached_tokens
        if sequence.num_cached_tokens is None:  # not what it computed itself before a preemption
            sequence.num_cached_tokens = num_cached_tokens

    def can_grow(self, sequence, num_tokens):
        """True if the next num_tokens of the sequence can be written."""
        end = sequence.num_computed_tokens + num_tokens
        num_new = sequence.block_table.num_missing_blocks(end) + self._is_shared(sequence)
        return num_new <= self.num_available_blocks

    def grow(self, sequence, num_tokens):
        """Make room for the next num_tokens of a sequence, which the next step will compute.

        A block that others hold as well is copied before it is written to (copy on write). The
        blocks that become full are registered at once: whoever is scheduled later, even in the same
        step, may read them, since in each layer all keys are written before any is read.
        """
        table, start = sequence.block_table, sequence.num_computed_tokens
        if self._is_shared(sequence):
            shared, own = table.block_ids[start // self.block_size], self._allocate()
            self.copies.append((shared, own))
            table.block_ids[start // self.block_size] = own
            self._release(shared)
        num_missing = table.num_missing_blocks(start + num_tokens)
        table.block_ids += [self._allocate() for _ in range(num_missing)]
        if self.enable_prefix_caching:
            self._register_full_blocks(sequence, start + num_tokens)

    def fork(self, parent, child):
        """Let `child`, another answer to the same prompt, begin with all blocks of `parent`."""
        for block_id in parent.block_table.block_ids:
            self._acquire(block_id)
        child.block_table.block_ids = list(parent.block_table.block_ids)
        child.num_computed_tokens = parent.num_computed_tokens

    def release(self, sequence):
        """Take all blocks from a sequence. The last go first, and so are evicted first: a block
        whose parent is gone can never be found again."""
        for block_id in reversed(sequence.block_table.block_ids):
            self._release(block_id)
        sequence.block_table.block_ids = []
        sequence.num_computed_tokens = 0

    def take_copies(self):
        """-> the copies that are due, and with them the promise to make them before anything is
        written; what was registered before them is taken to be computed."""
        copies, self.copies = self.copies, []
        return copies

    def begin_step(self):
        """Everything registered so far has been computed."""
        self.new_block_ids = []

    def cancel_step(self, forgets_all=False):
        """The step broke off, perhaps in the middle of a change to these books: they are written
        anew. Nobody holds a block. What was computed before the step can still be found, unless
        forgets_all; what it was to write, or to copy, cannot."""
        in_order = dict.fromkeys([*self.evictable_block_ids, *reversed(self.hash_of_block)])
        kept = [] if forgets_all else [
            block_id for block_id in in_order if block_id not in self.new_block_ids
            and self.cached_blocks.get(self.hash_of_block.get(block_id)) == block_id]
        self.hash_of_block = {block_id: self.hash_of_block[block_id] for block_id in kept}
        self.cached_blocks = {name: block_id for block_id, name in self.hash_of_block.items()}
        self.evictable_block_ids = dict.fromkeys(kept)
        self.free_block_ids = [block_id for block_id in reversed(range(self.num_blocks))
                               if block_id not in self.hash_of_block]
        self.ref_counts = [0] * self.num_blocks
        self.new_block_ids, self.copies = [], []

    # One block.

    def _allocate(self):
        if self.free_block_ids:
            block_id = self.free_block_ids.pop()
        else:
            block_id = next(iter(self.evictable_block_ids))
            del self.evictable_block_ids[block_id]
            self._unregister(block_id)
        self.ref_counts[block_id] = 1
        return block_id

    def _acquire(self, block_id):
        self.evictable_block_ids.pop(block_id, None)
        self.ref_counts[block_id] += 1

    def _release(self, block_id):
        self.ref_counts[block_id] -= 1
        if self.ref_counts[block_id] == 0:
            if block_id in self.hash_of_block:
                self.evictable_block_ids[block_id] = None  # at the end: the most recently used
            else:
                self.free_block_ids.append(block_id)

    # The names of full blocks.

    def _match(self, sequence):
        if not self.enable_prefix_caching:
            return []
        return match_prefix(sequence.token_ids, self.block_size, self.cached_blocks)

    def _register_full_blocks(self, sequence, num_tokens):
        hashes, block_ids = sequence.block_hashes, sequence.block_table.block_ids
        first_new = sequence.num_computed_tokens // self.block_size
        for index in range(min(first_new, len(hashes)), num_tokens // self.block_size):
            if index == len(hashes):
                start = index * self.block_size
                parent_hash = hashes[-1] if hashes else ROOT_HASH
                tokens = sequence.token_ids[start : start + self.block_size]
                hashes.append(hash_block(parent_hash, tokens))
            # Of two blocks with the same contents the first is found; the other stays its owner's.
            if index >= first_new and hashes[index] not in self.cached_blocks:
                self.new_block_ids.append(block_ids[index])
                self.cached_blocks[hashes[index]] = block_ids[index]
                self.hash_of_block[block_ids[index]] = hashes[index]

    def _unregister(self, block_id):
        if block_id in self.hash_of_block:
            del self.cached_blocks[self.hash_of_block.pop(block_id)]

    def _is_shared(self, sequence):
        """True if the next token goes into a block that others hold as well."""
        index = sequence.num_computed_tokens // self.block_size
        block_ids = sequence.block_table.block_ids
        return index < len(block_ids) and self.ref_counts[block_ids[index]] > 1

    def check_integrity(self, sequences):
        """Prove that every block is free, referenced or cached, exactly once; `sequences` are all
        that may hold blocks.   Raises AssertionError, with what is wrong."""
        counts = [0] * self.num_blocks
        for sequence in sequences:
            block_ids = sequence.block_table.block_ids
            assert len(set(block_ids)) == len(block_ids), f"a block twice in a table: {block_ids}"
            for block_id in block_ids:
                counts[block_id] += 1
        assert counts == self.ref_counts, f"counted {counts}, noted {self.ref_counts}"
        referenced = [block_id for block_id, count in enumerate(counts) if count]
        states = [*self.free_block_ids, *self.evictable_block_ids, *referenced]
        assert sorted(states) == list(range(self.num_blocks)), f"not once each: {sorted(states)}"
        names = {block_id: name for name, block_id in self.cached_blocks.items()}
        assert names == self.hash_of_block, "cached_blocks and hash_of_block differ"
        assert len(names) == len(self.cached_blocks), "two names for one block"
        named = set(self.hash_of_block)
        assert named >= set(self.evictable_block_ids), "a cached block that cannot be found"
        assert not named & set(self.free_block_ids), "a free block that can be found"
