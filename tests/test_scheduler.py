"""Who goes next: by hand on counted blocks, and random loads to their end on real ones."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace

import pytest

from minillm import SamplingParams
from minillm.block_manager import BlockManager
from minillm.request import Request
from minillm.scheduler import Batch, Scheduler, preempt, schedule
from minillm.sequence import Sequence

# ── By hand: blocks that are only counted ────────────────────────────────────────────────────


class CountedBlocks:
    """One block a token, and no sharing; keeps who was asked for what in `calls`."""

    def __init__(self, num_free=1000):
        self.num_free, self.owned, self.calls = num_free, Counter(), []

    def can_grow(self, sequence, num_tokens):
        return self.missing(sequence, num_tokens) <= self.num_free

    def missing(self, sequence, num_tokens):
        return max(0, sequence.num_computed_tokens + num_tokens - self.owned[sequence.name])

    def grow(self, sequence, num_tokens):
        assert self.can_grow(sequence, num_tokens), f"no room for {sequence.name}"
        self.calls.append(("grow", sequence.name, num_tokens))
        self.take(sequence, self.missing(sequence, num_tokens))

    def take(self, sequence, num):
        self.num_free -= num
        self.owned[sequence.name] += num

    def can_admit(self, sequence, num_spare_blocks=0):
        self.calls.append(("can_admit", sequence.name, num_spare_blocks))
        return len(sequence.token_ids) + num_spare_blocks <= self.num_free

    def admit(self, sequence):
        self.calls.append(("admit", sequence.name))
        sequence.num_computed_tokens = sequence.num_found
        self.take(sequence, len(sequence.token_ids))

    def release(self, sequence):
        self.calls.append(("release", sequence.name))
        self.num_free += self.owned.pop(sequence.name)
        sequence.num_computed_tokens = 0


class FakeSequence:
    """`num_tokens` tokens, of which all but `left` are computed; `order` is who came first."""

    def __init__(self, name, order, num_tokens, left=None, num_found=0):
        self.name, self.order = name, (order, 0)
        self.token_ids = list(range(num_tokens))
        self.num_computed_tokens = num_tokens - left if left else 0
        self.num_found, self.num_preemptions = num_found, 0

    def __repr__(self):
        return self.name

    @property
    def num_uncomputed_tokens(self):
        return len(self.token_ids) - self.num_computed_tokens


def scheduled(waiting, running, blocks=None, max_num_seqs=100, max_num_batched_tokens=100):
    """schedule(), with names for sequences. Running ones own blocks for what they have computed, or
    for all their tokens while they are prompts."""
    blocks = blocks or CountedBlocks()
    for sequence in running:
        is_prompt = sequence.num_uncomputed_tokens > 1
        blocks.take(sequence, len(sequence.token_ids) - (not is_prompt))
    chosen = schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens)
    assert [call for call in blocks.calls if call[0] == "grow"] == [
        ("grow", sequence.name, num) for sequence, num in chosen], "grow once, when it is chosen"
    return [(sequence.name, num) for sequence, num in chosen]


def names(sequences):
    return [sequence.name for sequence in sequences]


def test_decodes_first_then_pieces_of_prompts_then_who_waits():
    running = [FakeSequence("prompt", 0, 9, left=7), FakeSequence("young", 2, 5, left=1),
               FakeSequence("old", 1, 8, left=1)]
    waiting = [FakeSequence("new", 3, 6), FakeSequence("newer", 4, 6)]
    assert scheduled(waiting, running, max_num_batched_tokens=14) == [
        ("old", 1), ("young", 1), ("prompt", 7), ("new", 5)]
    assert names(running) == ["prompt", "young", "old", "new"] and names(waiting) == ["newer"]


@pytest.mark.parametrize("budget, expected", [
    (3, [("old", 1), ("young", 1), ("prompt", 1)]),
    (6, [("old", 1), ("young", 1), ("prompt", 4)]),
    (9, [("old", 1), ("young", 1), ("prompt", 7)]),
    (11, [("old", 1), ("young", 1), ("prompt", 7), ("new", 2)]),
    (99, [("old", 1), ("young", 1), ("prompt", 7), ("new", 6), ("newer", 4)])])
def test_the_budget_is_a_limit(budget, expected):
    running = [FakeSequence("prompt", 0, 9, left=7), FakeSequence("old", 1, 8, left=1),
               FakeSequence("young", 2, 5, left=1)]
    waiting = [FakeSequence("new", 3, 6), FakeSequence("newer", 4, 4)]
    assert scheduled(waiting, running, max_num_batched_tokens=budget) == expected


def test_prompts_are_continued_in_the_order_of_arrival():
    running = [FakeSequence("second", 2, 9, left=9), FakeSequence("first", 1, 9, left=4)]
    assert scheduled([], running, max_num_batched_tokens=6) == [("first", 4), ("second", 2)]


def test_what_was_found_in_the_cache_costs_no_budget():
    waiting = [FakeSequence("new", 0, 9, num_found=8), FakeSequence("newer", 1, 9, num_found=4)]
    assert scheduled(waiting, [], max_num_batched_tokens=4) == [("new", 1), ("newer", 3)]


def test_seats_are_a_limit():
    running = [FakeSequence("old", 0, 5, left=1)]
    waiting = [FakeSequence(name, order, 2) for order, name in enumerate("abcd", 1)]
    assert scheduled(waiting, running, max_num_seqs=3) == [("old", 1), ("a", 2), ("b", 2)]
    assert names(waiting) == ["c", "d"]


def test_nobody_is_overtaken_by_one_who_would_fit():
    waiting = [FakeSequence("large", 0, 9), FakeSequence("small", 1, 1)]
    blocks = CountedBlocks(num_free=8)
    assert scheduled(waiting, [], blocks) == []
    assert names(waiting) == ["large", "small"]
    assert blocks.calls == [("can_admit", "large", 0)]


def test_a_block_is_spared_for_everyone_who_runs():
    """6 tokens and 2 that run: with 9 free, after the 2 have grown, 7 are left, one too few."""
    for num_free, expected in ((9, ["a", "b"]), (10, ["a", "b", "new"])):
        running = [FakeSequence("a", 0, 5, left=1), FakeSequence("b", 1, 5, left=1)]
        blocks = CountedBlocks(num_free + 8)
        chosen = scheduled([FakeSequence("new", 2, 6)], running, blocks)
        assert [name for name, _ in chosen] == expected
        assert ("can_admit", "new", 2) in blocks.calls


def test_each_who_is_admitted_spares_one_more():
    blocks = CountedBlocks()
    scheduled([FakeSequence(name, order, 2) for order, name in enumerate("abc")], [], blocks)
    assert [call for call in blocks.calls if call[0] == "can_admit"] == [
        ("can_admit", "a", 0), ("can_admit", "b", 1), ("can_admit", "c", 2)]


def test_the_youngest_gives_its_blocks_back_and_nobody_new_comes_in():
    running = [FakeSequence("youngest", 3, 5, left=1), FakeSequence("old", 0, 5, left=1),
               FakeSequence("middle", 2, 5, left=1)]
    waiting = [FakeSequence("next", 1, 1), FakeSequence("last", 4, 1)]
    blocks = CountedBlocks(num_free=12)  # all of them taken
    assert scheduled(waiting, running, blocks) == [("old", 1), ("middle", 1)]
    assert names(running) == ["old", "middle"]
    assert names(waiting) == ["next", "youngest", "last"]  # at the place of its arrival
    assert waiting[1].num_preemptions == 1 and waiting[1].num_computed_tokens == 0
    assert ("admit", "next") not in blocks.calls


def test_a_sequence_that_is_the_youngest_itself_goes_without():
    running = [FakeSequence("old", 0, 5, left=1), FakeSequence("young", 1, 5, left=1)]
    waiting = []
    assert scheduled(waiting, running, CountedBlocks(num_free=9)) == [("old", 1)]
    assert (names(running), names(waiting)) == (["old"], ["young"])


def test_a_prompt_that_is_half_computed_may_be_the_youngest():
    running = [FakeSequence("prompt", 2, 6, left=3), FakeSequence("a", 0, 4, left=1),
               FakeSequence("b", 1, 4, left=1)]
    waiting = []
    assert scheduled(waiting, running, CountedBlocks(num_free=12)) == [("a", 1), ("b", 1)]
    assert names(waiting) == ["prompt"]


def test_as_many_are_preempted_as_it_takes():
    running = [FakeSequence("wide", 0, 2, left=1)] + [
        FakeSequence(name, order, 3, left=1) for order, name in enumerate("abc", 1)]

    class Wide(CountedBlocks):
        def missing(self, sequence, num_tokens):
            return 5 if sequence.name == "wide" else super().missing(sequence, num_tokens)

    waiting = []
    assert scheduled(waiting, running, Wide(num_free=1 + 6)) == [("wide", 1)]
    assert names(waiting) == ["a", "b", "c"]


def test_nothing_to_do():
    assert scheduled([], []) == []


def test_preempt_by_hand():
    a, b, c = (FakeSequence(name, order, 3, left=1) for order, name in enumerate("abc"))
    blocks, waiting, running = CountedBlocks(), [a, c], [b]
    blocks.take(b, 3)
    preempt(b, waiting, running, blocks)
    assert (names(waiting), running, b.num_preemptions, blocks.num_free) == (
        ["a", "b", "c"], [], 1, 1000)


# ── The batch ────────────────────────────────────────────────────────────────────────────────


def small_batch():
    decoding = SimpleNamespace(token_ids=[1, 2, 3], num_computed_tokens=2, num_uncomputed_tokens=1,
                               block_table="table of decoding")
    chunk = SimpleNamespace(token_ids=[4, 5, 6, 7, 8], num_computed_tokens=1,
                            num_uncomputed_tokens=4, block_table="table of chunk")
    prompt = SimpleNamespace(token_ids=[9, 8], num_computed_tokens=0, num_uncomputed_tokens=2,
                             block_table="table of prompt")
    return Batch([(decoding, 1), (chunk, 3), (prompt, 2)], [(5, 6)]), decoding, prompt


def test_a_batch_by_hand():
    batch, decoding, prompt = small_batch()
    assert batch.tokens == [3, 5, 6, 7, 9, 8]
    assert batch.positions == [2, 1, 2, 3, 0, 1]
    assert batch.spans == [("table of decoding", 2, 1), ("table of chunk", 1, 3),
                           ("table of prompt", 0, 2)]
    assert batch.rows == [0, 5] and batch.sampling == [decoding, prompt]
    assert batch.copies == [(5, 6)]


def test_a_padded_batch_repeats_its_last_row_and_leaves_the_batch_as_it_is():
    batch, *_ = small_batch()
    decodes = Batch(batch.scheduled[:1], [])
    padded = decodes.padded(4)
    assert (padded.tokens, padded.positions) == ([3] * 4, [2] * 4)
    assert padded.spans == [("table of decoding", 2, 1)] * 4
    assert (padded.rows, padded.sampling) == (decodes.rows, decodes.sampling)
    assert (decodes.tokens, len(decodes.spans)) == ([3], 1)
    assert decodes.padded(1).tokens == [3]


# ── Real blocks ──────────────────────────────────────────────────────────────────────────────


def new_sequences(prompt, arrival, block_size, n=1):
    """The sequences of a request; the first has the others for siblings."""
    params = SamplingParams(n=n, seed=1)
    request = Request(list(prompt), params, ())
    first, *siblings = (Sequence(request, completion, arrival, block_size)
                        for completion in request.output.outputs)
    first.siblings = siblings
    return [first, *siblings]


def new_scheduler(num_blocks=50, block_size=2, max_num_seqs=8, max_num_batched_tokens=32,
                  **options):
    blocks = BlockManager(num_blocks, block_size, **options)
    return Scheduler(blocks, max_num_seqs, max_num_batched_tokens)


def compute(scheduler, token=7):
    """A step: whoever is due samples `token`;  -> the batch."""
    batch = scheduler.schedule()
    due = [sequence for first in batch.sampling for sequence in (first, *first.siblings)]
    scheduler.update(batch)
    for sequence in due:
        sequence.token_ids.append(token)
    return batch


def test_completions_of_one_request_share_the_prompts_blocks():
    scheduler = new_scheduler()
    family = new_sequences([1, 2, 3], 0, 2, n=3)
    scheduler.add(family[0])
    compute(scheduler)
    assert scheduler.running == family
    assert [each.block_table.block_ids for each in family] == [[0, 1]] * 3
    assert [each.num_computed_tokens for each in family] == [3] * 3
    batch = compute(scheduler)
    assert [num for _, num in batch.scheduled] == [1, 1, 1]  # the prompt is not computed again
    assert len(batch.copies) == 2
    assert len({each.block_table.block_ids[1] for each in family}) == 3
    scheduler.blocks.check_integrity(family)


def test_completions_without_a_seat_wait_without_blocks_at_the_front():
    scheduler = new_scheduler(max_num_seqs=2)
    family, later = new_sequences([1, 2, 3, 4, 5], 0, 2, n=4), new_sequences([6], 1, 2)
    scheduler.add(family[0])
    compute(scheduler)
    scheduler.add(later[0])
    assert scheduler.running == family[:2]
    assert scheduler.waiting == [*family[2:], *later]
    assert [each.block_table.block_ids for each in family[2:]] == [[], []]
    scheduler.remove(family[0])
    compute(scheduler)
    assert scheduler.running == family[1:3]
    assert family[2].num_cached_tokens == 0  # that is the request's, not what it found of its own
    scheduler.blocks.check_integrity([*family, *later])


def test_whoever_is_removed_frees_everything_at_once_in_every_state():
    scheduler = new_scheduler(max_num_seqs=3, max_num_batched_tokens=4, num_blocks=12)
    family, prompt, waiting = (new_sequences([1, 2, 3], 0, 2, n=2),
                               new_sequences(range(9, 19), 1, 2), new_sequences([5], 2, 2))
    for first in (family[0], prompt[0], waiting[0]):
        scheduler.add(first)
    compute(scheduler)
    everyone = [*family, *prompt, *waiting]
    assert scheduler.running == [family[0], prompt[0], family[1]]  # decoding, in pieces, a fork
    assert prompt[0].num_computed_tokens == 1 and scheduler.waiting == waiting
    available = scheduler.blocks.num_available_blocks
    scheduler.remove(family[1])  # shares all its blocks
    assert scheduler.blocks.num_available_blocks == available
    for sequence, freed in ((family[0], 2), (waiting[0], 0), (prompt[0], 5), (prompt[0], 0)):
        before = scheduler.blocks.num_available_blocks
        scheduler.remove(sequence)
        assert scheduler.blocks.num_available_blocks == before + freed
        scheduler.blocks.check_integrity(everyone)
    assert not scheduler.running and not scheduler.waiting
    assert not any(scheduler.blocks.ref_counts)


def test_a_cancelled_step_starts_all_again_and_names_the_blocks_it_may_have_ruined():
    scheduler = new_scheduler(block_size=2)
    old, new = new_sequences([1, 2, 3, 4], 0, 2)[0], new_sequences([5, 6, 7], 1, 2)[0]
    scheduler.add(old)
    compute(scheduler)  # blocks 0 and 1 are full
    scheduler.add(new)
    scheduler.schedule()  # old takes block 2, new takes 3 and 4
    assert sorted(scheduler.restart([new, old])) == [2, 3, 4]
    assert (scheduler.running, scheduler.waiting) == ([], [old, new])
    scheduler.blocks.check_integrity([old, new])
    assert list(scheduler.blocks.evictable_block_ids) == [1, 0]  # what was computed before stays
    batch = scheduler.schedule()
    assert [(sequence.order[0], num) for sequence, num in batch.scheduled] == [(0, 1), (1, 3)]
    assert old.num_computed_tokens == 4


# ── Random loads ─────────────────────────────────────────────────────────────────────────────


class Load:
    """Requests of random lengths on too few blocks, with every step's promises checked."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        block_size, max_num_seqs = self.random.randint(1, 6), self.random.randint(1, 6)
        max_tokens = self.random.choice([8, 20, 60])
        num_blocks = -(-max_tokens // block_size) + self.random.choice([0, 1, 3, 20])
        self.scheduler = new_scheduler(
            num_blocks, block_size, max_num_seqs, max_num_seqs + self.random.choice([0, 1, 4, 40]),
            enable_prefix_caching=self.random.random() < 0.6)
        self.events, self.left, self.everyone, self.num_tokens = Counter(), {}, [], 0
        for arrival in range(self.random.randint(1, 12)):
            prompt = [self.random.randrange(3)
                      for _ in range(self.random.randint(1, max_tokens - 1))]
            n = self.random.choice([1, 1, 1, 2, 5])
            sequences = new_sequences(prompt, arrival, block_size, n)
            num_new = self.random.randint(1, max_tokens - len(prompt))
            self.left |= dict.fromkeys(sequences, num_new)
            self.num_tokens += n * (len(prompt) + num_new)
            self.everyone += sequences
        self.to_come = [each for each in self.everyone if each.siblings or each.order[1] == 0]

    def run(self):
        """Until everyone has ended. The oldest goes on by at least a token a step, so there cannot
        be many more steps than tokens."""
        while self.left:
            while self.to_come and self.random.random() < 0.4:
                self.scheduler.add(self.to_come.pop(0))
            if self.scheduler.waiting or self.scheduler.running:
                self.step()
            assert self.events["steps"] <= 2 * self.num_tokens, "somebody waits for ever"
        assert not self.scheduler.running and not self.scheduler.waiting
        assert not any(self.scheduler.blocks.ref_counts)
        return self.events

    def step(self):
        scheduler = self.scheduler
        before, queue = list(scheduler.running), list(scheduler.waiting)
        batch = scheduler.schedule()
        chosen = [sequence for sequence, _ in batch.scheduled]
        self.check_choice(batch, before, queue, chosen)
        due = [sequence for first in batch.sampling for sequence in (first, *first.siblings)]
        scheduler.update(batch)
        for sequence in due:
            sequence.token_ids.append(self.random.randrange(3))
            self.left[sequence] -= 1
            if not self.left[sequence] or self.random.random() < 0.02:  # ended, or aborted
                scheduler.remove(sequence)
                del self.left[sequence]
        scheduler.blocks.check_integrity(self.everyone)
        assert all(not sequence.block_table.block_ids for sequence in scheduler.waiting)
        self.events += Counter(steps=1, copies=len(batch.copies))

    def check_choice(self, batch, before, queue, chosen):
        scheduler, running = self.scheduler, set(self.scheduler.running)
        assert 1 <= len(batch.tokens) <= scheduler.max_num_batched_tokens
        assert len(running) <= scheduler.max_num_seqs
        assert set(chosen) <= running and len(set(chosen)) == len(chosen)
        assert all(1 <= num <= sequence.num_uncomputed_tokens for sequence, num in batch.scheduled)
        places = [(each.num_uncomputed_tokens > 1, each.order) for each in chosen if each in before]
        assert places == sorted(places), "decodes come first, each kind in the order of arrival"
        decoding = [each for each in before if each in running and each.num_uncomputed_tokens == 1]
        assert set(decoding) <= set(chosen), "everyone who decodes gets a token"
        preempted = [each for each in before if each not in running]
        admitted = [each for each in queue if each in running]
        if before:
            assert min(before, key=lambda each: each.order) in chosen, "the oldest goes on"
        assert not (preempted and admitted)
        stayed = [each for each in before if each in running]
        assert all(young.order > old.order for young in preempted for old in stayed)
        assert admitted == queue[: len(admitted)] == chosen[len(places):], "nobody is overtaken"
        assert scheduler.waiting == sorted(scheduler.waiting, key=lambda each: each.order)
        self.events += Counter(preemptions=len(preempted), admitted=len(admitted),
                               chunks=sum(num < sequence.num_uncomputed_tokens
                                          for sequence, num in batch.scheduled))


def test_random_loads_come_to_an_end():
    events = Counter()
    for seed in range(400):
        try:
            events += Load(seed).run()
        except BaseException as error:
            error.add_note(f"in Load({seed})")
            raise
    print(events)
    assert min(events[event] for event in ("preemptions", "chunks", "copies", "admitted")) > 400


def test_ten_thousand_who_wait_cost_no_block():
    scheduler = new_scheduler(num_blocks=20, max_num_seqs=4)
    everyone = [new_sequences([1, 2, 3], arrival, 2)[0] for arrival in range(10_000)]
    for sequence in everyone:
        scheduler.add(sequence)
    assert scheduler.blocks.num_available_blocks == 20
    compute(scheduler)
    assert len(scheduler.running) == 4 and len(scheduler.waiting) == 9996
    assert scheduler.blocks.num_available_blocks >= 20 - 4 * 2
    for sequence in everyone[:100]:
        scheduler.remove(sequence)
    assert scheduler.blocks.num_available_blocks == 20
    assert len(scheduler.waiting) == 9900 and not scheduler.running
