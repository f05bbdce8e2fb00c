"""Blocks by hand, at random against a memory that remembers what was written where, and with the
books forged: `check_integrity` must notice."""

from __future__ import annotations

import random
from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minillm.block_manager import ROOT_HASH, BlockManager, BlockTable, hash_block, match_prefix


class FakeSequence:
    """All that the block manager knows of a sequence."""

    def __init__(self, token_ids, block_size):
        self.token_ids = list(token_ids)
        self.num_computed_tokens = 0
        self.num_cached_tokens = None
        self.block_table = BlockTable(block_size)
        self.block_hashes = []

    @property
    def block_ids(self):
        return self.block_table.block_ids


def admitted(blocks, token_ids):
    """A sequence that has its blocks."""
    sequence = FakeSequence(token_ids, blocks.block_size)
    blocks.admit(sequence)
    return sequence


def computed(blocks, token_ids):
    """A sequence all of whose tokens have been computed, in a step of its own."""
    blocks.begin_step()
    sequence = admitted(blocks, token_ids)
    compute(blocks, sequence)
    return sequence


def compute(blocks, sequence):
    blocks.grow(sequence, len(sequence.token_ids) - sequence.num_computed_tokens)
    sequence.num_computed_tokens = len(sequence.token_ids)


def append(blocks, sequence, *token_ids):
    sequence.token_ids += token_ids
    compute(blocks, sequence)


# ── The block table and the names of blocks ──────────────────────────────────────────────────


def test_a_slot_by_hand():
    table = BlockTable(3)
    table.block_ids += [5, 0, 2]
    assert table.slot_mapping(0, 9) == [15, 16, 17, 0, 1, 2, 6, 7, 8]
    assert table.slot_mapping(4, 7) == [1, 2, 6]
    assert table.slot_mapping(9, 9) == []


def test_missing_blocks():
    table = BlockTable(4)
    assert [table.num_missing_blocks(num) for num in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]
    table.block_ids += [7, 3]
    assert [table.num_missing_blocks(num) for num in (0, 8, 9, 12, 13)] == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("start, end", [(0, 7), (6, 7), (3, 100)])
def test_a_position_without_a_block_has_no_slot(start, end):
    table = BlockTable(3)
    table.block_ids += [4, 1]
    with pytest.raises(ValueError, match=f"2 blocks of 3 have no place for position {end - 1}"):
        table.slot_mapping(start, end)


@given(st.integers(1, 9), st.lists(st.integers(0, 99), min_size=1, max_size=6, unique=True))
def test_slots_are_all_places_of_the_blocks_once_each(block_size, block_ids):
    table = BlockTable(block_size)
    table.block_ids += block_ids
    slots = table.slot_mapping(0, block_size * len(block_ids))
    assert slots == [block_id * block_size + offset
                     for block_id, offset in product(block_ids, range(block_size))]


def test_a_name_tells_tokens_their_order_and_their_place_apart():
    """[1, 2] behind nothing, behind [1, 2] and behind [3, 4] are three blocks. Fixed width keeps
    [1, 23] and [12, 3] apart."""
    first, other = hash_block(ROOT_HASH, [1, 2]), hash_block(ROOT_HASH, [3, 4])
    names = [first, other, hash_block(first, [1, 2]), hash_block(other, [1, 2]),
             hash_block(ROOT_HASH, [2, 1]), hash_block(ROOT_HASH, [1, 23]),
             hash_block(ROOT_HASH, [12, 3]), hash_block(ROOT_HASH, [1]),
             hash_block(ROOT_HASH, [1, 2, 1, 2]), hash_block(ROOT_HASH, [1 + 2**32, 2])]
    assert len(set(names)) == len(names)
    assert first == hash_block(ROOT_HASH, [1, 2])
    assert {len(name) for name in names} == {32}


@given(st.lists(st.integers(0, 2), max_size=13), st.integers(1, 4),
       st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=13), st.booleans()), max_size=5))
def test_a_match_is_the_longest_run_of_known_blocks(token_ids, block_size, known):
    """Against a dict of whole beginnings; with holes, which end the run."""
    prefixes, cached_blocks = {}, {}
    for tokens, has_hole in known:
        parent = ROOT_HASH
        for start in range(0, len(tokens) - block_size + 1, block_size):
            parent = hash_block(parent, tokens[start : start + block_size])
            if not (has_hole and start == 0):
                prefix = tuple(tokens[: start + block_size])
                block_id = prefixes.setdefault(prefix, len(prefixes))
                cached_blocks[parent] = block_id
    expected = []
    while (end := (len(expected) + 1) * block_size) < len(token_ids):
        if tuple(token_ids[:end]) not in prefixes:
            break
        expected.append(prefixes[tuple(token_ids[:end])])
    assert match_prefix(token_ids, block_size, cached_blocks) == expected


# ── By hand ──────────────────────────────────────────────────────────────────────────────────


def test_blocks_are_given_in_order_and_the_last_that_came_back_goes_first():
    blocks = BlockManager(num_blocks=6, block_size=2)
    first, second = admitted(blocks, [1, 2, 3]), admitted(blocks, [4, 5, 6, 7, 8])
    assert (first.block_ids, second.block_ids) == ([0, 1], [2, 3, 4])
    assert blocks.num_available_blocks == 1
    blocks.release(first)
    assert (first.block_ids, first.num_computed_tokens) == ([], 0)
    assert admitted(blocks, [9, 9, 9, 9, 9]).block_ids == [0, 1, 5]
    assert blocks.num_available_blocks == 0


def test_free_blocks_are_taken_before_cached_ones_are_evicted():
    blocks = BlockManager(num_blocks=5, block_size=2)
    sequence = computed(blocks, [1, 2, 3, 4, 5])
    blocks.release(sequence)
    assert list(blocks.evictable_block_ids) == [1, 0]  # the tail first
    assert blocks.free_block_ids == [4, 3, 2]
    taken = admitted(blocks, [7] * 6)
    assert taken.block_ids == [2, 3, 4]
    assert len(blocks.cached_blocks) == 2
    blocks.check_integrity([taken])


def test_the_least_recently_used_is_evicted_first_and_of_one_sequence_its_tail():
    blocks = BlockManager(num_blocks=4, block_size=2)
    old, new = computed(blocks, [1, 2, 3, 4]), computed(blocks, [5, 6, 7, 8])
    blocks.release(old)
    blocks.release(new)
    assert list(blocks.evictable_block_ids) == [1, 0, 3, 2]
    revived = admitted(blocks, [1, 2, 9])  # block 0 comes back to life, block 1 is evicted
    assert revived.block_ids == [0, 1]
    assert (revived.num_computed_tokens, revived.num_cached_tokens) == (2, 2)
    blocks.release(revived)
    assert (list(blocks.evictable_block_ids), blocks.free_block_ids) == ([3, 2, 0], [1])
    assert admitted(blocks, [0, 0, 0, 0]).block_ids == [1, 3]
    found = admitted(blocks, [5, 6, 7, 8])
    assert (found.block_ids, found.num_cached_tokens) == ([2, 0], 2)


def test_the_block_of_the_last_token_is_always_computed_again():
    blocks = BlockManager(num_blocks=12, block_size=3)
    first = computed(blocks, range(10, 16))  # two full blocks
    same, longer = admitted(blocks, range(10, 16)), admitted(blocks, range(10, 17))
    assert same.block_ids == [first.block_ids[0], 2]
    assert longer.block_ids == [*first.block_ids, 3]
    assert (same.num_computed_tokens, longer.num_computed_tokens) == (3, 6)
    short = admitted(blocks, [10, 11, 12])
    assert short.num_computed_tokens == 0
    blocks.check_integrity([first, same, longer, short])


def test_equal_blocks_at_different_places_are_different():
    blocks = BlockManager(num_blocks=9, block_size=2)
    computed(blocks, [1, 2, 1, 2, 1, 2])
    assert len(blocks.cached_blocks) == 3
    assert admitted(blocks, [3, 4, 1, 2, 5]).num_cached_tokens == 0
    assert admitted(blocks, [1, 2, 1, 2, 5]).num_cached_tokens == 4


def test_an_answer_is_found_by_the_next_turn():
    """Blocks that fill up while a sequence decodes are registered as those of a prompt are."""
    blocks = BlockManager(num_blocks=9, block_size=2)
    sequence = computed(blocks, [1, 2, 3])
    for token in (4, 5, 6, 7):
        append(blocks, sequence, token)
    blocks.release(sequence)
    assert admitted(blocks, [1, 2, 3, 4, 5, 6, 7, 8]).num_cached_tokens == 6


def test_a_block_is_found_in_the_step_that_computes_it():
    blocks = BlockManager(num_blocks=9, block_size=2)
    blocks.begin_step()
    first = admitted(blocks, [1, 2, 3, 4, 5])
    blocks.grow(first, 3)  # a chunk: the first block will be full, the second not
    second = admitted(blocks, [1, 2, 3, 4, 6])
    assert second.block_ids[0] == first.block_ids[0] and second.num_computed_tokens == 2
    assert not set(second.block_ids[1:]) & set(first.block_ids)
    blocks.check_integrity([first, second])


def test_of_two_equal_blocks_the_first_is_found_and_the_other_is_its_owners():
    blocks = BlockManager(num_blocks=9, block_size=2)
    first, second = admitted(blocks, [1, 2, 3]), admitted(blocks, [1, 2, 3])
    compute(blocks, first)
    compute(blocks, second)
    assert first.block_ids == [0, 1] and second.block_ids == [2, 3]
    assert admitted(blocks, [1, 2, 5]).block_ids[0] == 0
    blocks.release(second)
    assert not blocks.evictable_block_ids  # nobody could find it


def test_a_fork_shares_everything_until_somebody_writes():
    blocks = BlockManager(num_blocks=9, block_size=4)
    parent, children = computed(blocks, range(6)), [FakeSequence(range(6), 4) for _ in range(2)]
    for child in children:
        blocks.fork(parent, child)
    family = [parent, *children]
    assert [each.block_ids for each in family] == [[0, 1]] * 3
    assert [each.num_computed_tokens for each in family] == [6] * 3
    assert blocks.ref_counts[:2] == [3, 3] and blocks.num_available_blocks == 7
    blocks.check_integrity(family)
    for token, sequence in enumerate(family):
        append(blocks, sequence, token)
    assert [each.block_ids for each in family] == [[0, 2], [0, 3], [0, 1]]  # the last one keeps it
    assert blocks.take_copies() == [(1, 2), (1, 3)]
    assert blocks.take_copies() == []
    append(blocks, parent, 9)
    assert blocks.take_copies() == []  # its own by now
    blocks.check_integrity(family)


def test_a_fork_at_the_end_of_a_block_copies_nothing():
    blocks = BlockManager(num_blocks=9, block_size=3)
    parent, child = computed(blocks, range(6)), FakeSequence(range(6), 3)
    blocks.fork(parent, child)
    append(blocks, parent, 1)
    append(blocks, child, 2)
    assert (parent.block_ids, child.block_ids) == ([0, 1, 2], [0, 1, 3])
    assert blocks.take_copies() == []


def test_can_grow_counts_the_copy():
    blocks = BlockManager(num_blocks=3, block_size=4)
    parent, child = computed(blocks, range(6)), FakeSequence(range(6), 4)
    blocks.fork(parent, child)
    parent.token_ids.append(7)
    assert blocks.can_grow(parent, 1)
    other = admitted(blocks, [9])
    assert not blocks.can_grow(parent, 1)  # there is room in its block, but it is not its own
    blocks.release(child)
    assert blocks.can_grow(parent, 1) and not blocks.can_grow(parent, 3)
    blocks.release(other)
    assert blocks.can_grow(parent, 3)


def test_can_admit_counts_what_is_shared_and_what_comes_back_to_life():
    blocks = BlockManager(num_blocks=4, block_size=2)
    first = computed(blocks, [1, 2, 3, 4])
    waiting = FakeSequence([1, 2, 3, 4, 5, 6, 7], 2)  # wants 4, of which 2 are there
    assert blocks.can_admit(waiting) and not blocks.can_admit(waiting, num_spare_blocks=1)
    other = admitted(blocks, [9])
    assert not blocks.can_admit(waiting)
    blocks.release(first)  # now the two are nobody's: they are free to take, and count as taken
    assert not blocks.can_admit(waiting)
    blocks.release(other)
    assert blocks.can_admit(waiting) and not blocks.can_admit(waiting, num_spare_blocks=1)
    assert [blocks.fits_when_alone(num) for num in (1, 8, 9)] == [True, True, False]


def test_admission_does_not_evict_what_it_has_just_found():
    blocks = BlockManager(num_blocks=4, block_size=2)
    blocks.release(computed(blocks, [1, 2, 3, 4, 5, 6, 7, 8]))
    assert list(blocks.evictable_block_ids) == [3, 2, 1, 0]
    sequence = admitted(blocks, [1, 2, 3, 4, 9, 9, 9, 9])
    assert sequence.block_ids == [0, 1, 3, 2] and sequence.num_computed_tokens == 4
    blocks.check_integrity([sequence])


def test_what_a_preempted_sequence_finds_of_itself_is_not_called_cached():
    blocks = BlockManager(num_blocks=9, block_size=2)
    sequence = computed(blocks, [1, 2, 3, 4, 5])
    blocks.release(sequence)
    blocks.admit(sequence)
    assert (sequence.num_computed_tokens, sequence.num_cached_tokens) == (4, 0)


def test_without_prefix_caching_nothing_is_shared_but_forks():
    blocks = BlockManager(num_blocks=9, block_size=2, enable_prefix_caching=False)
    first = computed(blocks, [1, 2, 3, 4, 5])
    second = admitted(blocks, [1, 2, 3, 4, 5])
    assert second.num_computed_tokens == 0 and not set(first.block_ids) & set(second.block_ids)
    blocks.release(first)
    assert not blocks.cached_blocks and not blocks.evictable_block_ids
    assert len(blocks.free_block_ids) == 6
    child = FakeSequence(second.token_ids, 2)
    compute(blocks, second)
    blocks.fork(second, child)
    assert child.block_ids == second.block_ids
    blocks.check_integrity([second, child])


# ── A step that breaks off ───────────────────────────────────────────────────────────────────


def test_a_cancelled_step_leaves_nothing_to_be_found():
    blocks = BlockManager(num_blocks=9, block_size=2)
    before = computed(blocks, [1, 2, 3])
    blocks.begin_step()
    broken = admitted(blocks, [1, 2, 3, 4, 5])
    compute(blocks, broken)
    blocks.release(broken)
    blocks.release(before)
    blocks.cancel_step()
    assert len(blocks.cached_blocks) == 1 and list(blocks.evictable_block_ids) == [0]
    assert admitted(blocks, [1, 2, 3, 4, 5]).num_computed_tokens == 2
    assert not blocks.new_block_ids


def test_a_cancelled_step_makes_no_copies():
    blocks = BlockManager(num_blocks=9, block_size=4)
    parent, child = computed(blocks, range(6)), FakeSequence(range(6), 4)
    blocks.fork(parent, child)
    blocks.begin_step()
    append(blocks, parent, 7)
    assert blocks.copies
    blocks.release(parent)
    blocks.release(child)
    blocks.cancel_step()
    assert blocks.take_copies() == []


def test_a_step_that_was_computed_stays_when_the_next_one_is_cancelled():
    blocks = BlockManager(num_blocks=9, block_size=2)
    sequence = computed(blocks, [1, 2, 3])
    blocks.begin_step()
    blocks.release(sequence)
    blocks.cancel_step()
    assert admitted(blocks, [1, 2, 3]).num_computed_tokens == 2


# ── check_integrity fails where it should ────────────────────────────────────────────────────


def books():
    """A manager with a block in every state, and its sequences: block 0 shared by two, 1 and 2
    theirs alone, 3 and 4 cached, 5 and 6 free."""
    blocks = BlockManager(num_blocks=7, block_size=2)
    first = computed(blocks, [1, 2, 3])
    second = computed(blocks, [1, 2, 4])
    gone = computed(blocks, [5, 6, 7, 8])
    blocks.release(gone)
    assert (first.block_ids, second.block_ids) == ([0, 1], [0, 2])
    assert list(blocks.evictable_block_ids) == [4, 3] and sorted(blocks.free_block_ids) == [5, 6]
    return blocks, [first, second]


def name_of(blocks, block_id):
    return blocks.hash_of_block[block_id]


def rename(blocks, block_id, name):
    del blocks.cached_blocks[blocks.hash_of_block.pop(block_id)]
    blocks.cached_blocks[name], blocks.hash_of_block[block_id] = block_id, name


FORGERIES = {
    "a free block is lost": lambda blocks, _: blocks.free_block_ids.pop(),
    "a free block is there twice": lambda blocks, _: blocks.free_block_ids.append(5),
    "a block that does not exist is free": lambda blocks, _: blocks.free_block_ids.append(7),
    "a cached block is lost": lambda blocks, _: blocks.evictable_block_ids.pop(3),
    "a cached block is free as well": lambda blocks, _: blocks.free_block_ids.append(4),
    "a referenced block is free as well": lambda blocks, _: blocks.free_block_ids.append(1),
    "a referenced block is cached as well":
        lambda blocks, _: blocks.evictable_block_ids.update({0: None}),
    "a free block is cached, and has no name": lambda blocks, _: (
        blocks.evictable_block_ids.update({blocks.free_block_ids.pop(): None})),
    "one reference too many": lambda blocks, _: blocks.ref_counts.__setitem__(2, 2),
    "one reference too few": lambda blocks, _: blocks.ref_counts.__setitem__(0, 1),
    "a free block has a reference": lambda blocks, _: blocks.ref_counts.__setitem__(5, 1),
    "a sequence forgot a block": lambda _, sequences: sequences[0].block_ids.pop(),
    "a sequence took a block": lambda _, sequences: sequences[1].block_ids.append(5),
    "a sequence has a block twice": lambda blocks, sequences: (
        sequences[1].block_ids.append(2), blocks.ref_counts.__setitem__(2, 2)),
    "a sequence was forgotten": lambda _, sequences: sequences.pop(),
    "a name is lost": lambda blocks, _: blocks.hash_of_block.pop(3),
    "a name leads nowhere": lambda blocks, _: blocks.cached_blocks.pop(name_of(blocks, 0)),
    "a name leads to another block":
        lambda blocks, _: blocks.cached_blocks.update({name_of(blocks, 0): 1}),
    "two names for one block": lambda blocks, _: blocks.cached_blocks.update(
        {b"another": 3, name_of(blocks, 3): blocks.cached_blocks.pop(name_of(blocks, 3))}),
    "a free block has a name": lambda blocks, _: (
        blocks.cached_blocks.update({b"free": 5}), blocks.hash_of_block.update({5: b"free"})),
    "a cached block has no name": lambda blocks, _: (
        blocks.cached_blocks.pop(blocks.hash_of_block.pop(4))),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_forged_books_are_noticed(forgery):
    blocks, sequences = books()
    blocks.check_integrity(sequences)
    FORGERIES[forgery](blocks, sequences)
    with pytest.raises(AssertionError):
        blocks.check_integrity(sequences)


# ── At random ────────────────────────────────────────────────────────────────────────────────


class Simulation:
    """Random steps on a memory whose slots remember what was written to them: all tokens up to that
    position, which is what a key depends on. Half of what is admitted begins as something before.
    """

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.block_size = self.random.randint(1, 5)
        self.num_blocks = self.random.choice([3, 6, 12, 40])
        self.has_cache = self.random.random() < 0.8
        self.blocks = BlockManager(self.num_blocks, self.block_size, self.has_cache)
        self.memory = [()] * (self.num_blocks * self.block_size)
        self.running, self.old, self.events = [], [], Counter()
        self.known = set()  # the beginnings, whole blocks, that were ever computed

    def random_tokens(self):
        tokens = [self.random.randrange(3) for _ in range(self.random.randint(1, 9))]
        if self.old and self.random.random() < 0.5:
            other = self.random.choice(self.old)
            tokens = other[: self.random.randint(0, len(other))] + tokens
        return tokens[: self.num_blocks * self.block_size - 1]

    def step(self):
        """Schedule at random, then compute, or break off."""
        self.blocks.begin_step()
        batch, step_known = [], set()
        for sequence in list(self.running):
            action = self.random.choice(["compute"] * 6 + ["release", "rest"])
            if action == "compute" and sequence.num_computed_tokens < len(sequence.token_ids):
                left = len(sequence.token_ids) - sequence.num_computed_tokens
                batch += self.try_to_grow(sequence, self.random.randint(1, left), step_known)
            elif action == "release":
                self.release(sequence)
        while self.random.random() < 0.6:
            sequence = FakeSequence(self.random_tokens(), self.block_size)
            if self.blocks.can_admit(sequence):
                self.admit(sequence, step_known)
                left = len(sequence.token_ids) - sequence.num_computed_tokens
                batch += self.try_to_grow(sequence, self.random.randint(1, left), step_known)
            self.check()
        self.compute(batch, step_known, breaks_off=self.random.random() < 0.1)
        self.check()

    def try_to_grow(self, sequence, num_tokens, step_known):
        if not self.blocks.can_grow(sequence, num_tokens):
            self.events["full"] += 1
            self.release(sequence)
            return []
        self.blocks.grow(sequence, num_tokens)
        end = sequence.num_computed_tokens + num_tokens
        step_known |= {tuple(sequence.token_ids[:length])
                       for length in range(self.block_size, end + 1, self.block_size)}
        return [(sequence, num_tokens)]

    def admit(self, sequence, step_known):
        tokens, num_cached = sequence.token_ids, 0
        while (end := num_cached + self.block_size) < len(tokens) and (
                tuple(tokens[:end]) in self.known | step_known):
            num_cached = end
        num_evicted = len(self.blocks.cached_blocks)
        self.blocks.admit(sequence)
        num_evicted -= len(self.blocks.cached_blocks)
        self.events["evictions"] += num_evicted
        self.events["hits"] += bool(sequence.num_cached_tokens)
        self.running.append(sequence)
        self.old.append(list(tokens))
        assert sequence.num_computed_tokens == sequence.num_cached_tokens
        expected = num_cached if self.has_cache else 0
        if self.events["evictions"] or self.events["broken"]:
            assert sequence.num_cached_tokens <= expected  # nothing is found that never was there
        else:
            assert sequence.num_cached_tokens == expected

    def release(self, sequence):
        self.running.remove(sequence)
        self.blocks.release(sequence)
        self.check()

    def compute(self, batch, step_known, breaks_off):
        """Copy, then write, then see whether each sequence reads what it wrote or was promised."""
        batch = [(sequence, num) for sequence, num in batch if sequence in self.running]
        copies = self.blocks.take_copies()
        self.events["copies"] += len(copies)
        contents = [self.block(source) for source, _ in copies]
        for (_, target), content in zip(copies, contents):
            self.memory[target * self.block_size : (target + 1) * self.block_size] = content
        for sequence, num_tokens in batch:
            start = sequence.num_computed_tokens
            for slot, end in zip(sequence.block_table.slot_mapping(start, start + num_tokens),
                                 range(start + 1, start + num_tokens + 1)):
                self.memory[slot] = "ruin" if breaks_off else tuple(sequence.token_ids[:end])
        if breaks_off:
            self.events["broken"] += 1
            for sequence in list(self.running):
                self.running.remove(sequence)
                self.blocks.release(sequence)
            self.blocks.cancel_step()
            return
        self.known |= step_known
        for sequence, num_tokens in batch:
            sequence.num_computed_tokens += num_tokens
        for sequence in list(self.running):
            self.read(sequence)
        for sequence, _ in batch:
            if sequence.num_computed_tokens == len(sequence.token_ids):
                self.go_on(sequence)

    def block(self, block_id):
        return self.memory[block_id * self.block_size : (block_id + 1) * self.block_size]

    def read(self, sequence):
        length = sequence.num_computed_tokens
        found = [self.memory[slot] for slot in sequence.block_table.slot_mapping(0, length)]
        assert found == [tuple(sequence.token_ids[: end + 1]) for end in range(length)]

    def go_on(self, sequence):
        """Fork, perhaps, and sample a token."""
        family = [sequence]
        if self.random.random() < 0.3:
            self.events["forks"] += 1
            family.append(FakeSequence(sequence.token_ids, self.block_size))
            self.blocks.fork(*family)
            self.running.append(family[1])
        for each in family:
            each.token_ids.append(self.random.randrange(3))
            if not self.blocks.fits_when_alone(len(each.token_ids)):
                self.release(each)

    def check(self):
        self.blocks.check_integrity(self.running)
        assert self.has_cache or not self.blocks.cached_blocks


def test_random_steps_read_what_was_written():
    events = Counter()
    for seed in range(600):
        simulation = Simulation(seed)
        try:
            for _ in range(25):
                simulation.step()
        except BaseException as error:
            error.add_note(f"in Simulation({seed})")
            raise
        events += simulation.events
    print(events)
    assert min(events[event] for event in (
        "full", "evictions", "hits", "copies", "broken", "forks")) > 500
