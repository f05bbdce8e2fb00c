"""Who goes next? The rule by which each step of the engine is filled.

A step takes a budget of tokens through the model. Sequences that decode come first, one token each:
somebody is reading them. What is left of the budget goes to prompts, in pieces, so that a long one
does not make the readers wait. When memory runs out, the youngest sequence gives its blocks back
and will be computed again. (Iteration-level scheduling: Yu et al. 2022, "Orca", §3.1; chunked
prefill: Agrawal et al. 2024, "Sarathi-Serve", §4; recomputation: Kwon et al. 2023, §4.5.)

No tensor is in sight here. Chapter 10_continuous_batching tells the story. Left out: priorities;
who came first goes first, and therefore nobody waits for ever.
"""

from __future__ import annotations

import bisect
import copy
from operator import attrgetter

from .exercise import exercise

by_arrival = attrgetter("order")


@exercise("10_continuous_batching")
def schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    """Choose what the next step computes;  -> [(sequence, number of its tokens), ...].

    waiting, running: lists of sequences, changed in place. waiting is in the order of arrival
    (`order`); running is in any order. A sequence has `num_uncomputed_tokens`: 1 if it decodes (or
    if one token of a prompt is left, which is treated alike), more if a part of its prompt, or of
    what a preemption took away, is still to be computed.

    1. Running sequences that decode, one token each, the oldest first. If blocks.can_grow(sequence,
       num_tokens) says no, preempt(sequence, waiting, running, blocks) the youngest of all running
       ones, until it says yes; that may be the sequence itself, which then goes without.
    2. Running sequences with more to compute, the oldest first: as many tokens as the budget has.
       They have had all their blocks since they were admitted, so that can_grow says yes.
    3. Waiting sequences from the front, unless this step had to preempt: each needs one of the
       max_num_seqs seats among `running`, at least one token of the budget, and
       blocks.can_admit(sequence, num_spare_blocks) with a spare block for every sequence in
       `running`, those admitted in this step included: they will want it soon. The first that does
       not get in ends the line: nobody is overtaken. blocks.admit(sequence) gives it its blocks,
       and may lower what is left to compute.

    All together at most max_num_batched_tokens tokens. blocks.grow(sequence, num_tokens) makes room
    for what is chosen; call it once for each entry of the result, when it is chosen. (The engine
    updates `num_computed_tokens` after the step, not this function.)
    """
    scheduled, preempted, budget = [], [], max_num_batched_tokens
    for sequence in sorted(running, key=lambda each: (each.num_uncomputed_tokens > 1, each.order)):
        if budget == 0:
            break
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        # Prompts have had their blocks since they were admitted, so only those who decode preempt,
        # and never anybody who is scheduled already: these are older.
        while sequence not in preempted and not blocks.can_grow(sequence, num_tokens):
            preempted.append(max(running, key=by_arrival))
            preempt(preempted[-1], waiting, running, blocks)
        if sequence not in preempted:
            blocks.grow(sequence, num_tokens)
            scheduled.append((sequence, num_tokens))
            budget -= num_tokens
    while waiting and not preempted and len(running) < max_num_seqs and budget > 0:
        sequence = waiting[0]
        if not blocks.can_admit(sequence, num_spare_blocks=len(running)):
            break
        running.append(waiting.pop(0))
        blocks.admit(sequence)
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        blocks.grow(sequence, num_tokens)
        scheduled.append((sequence, num_tokens))
        budget -= num_tokens
    return scheduled


def preempt(sequence, waiting, running, blocks):
    """Send a running sequence back to the waiting ones, to the place that its arrival gives it. Its
    blocks go to others; its tokens stay, and their keys are computed again when its turn comes."""
    running.remove(sequence)
    blocks.release(sequence)
    sequence.num_preemptions += 1
    bisect.insort(waiting, sequence, key=by_arrival)


class Batch:
    """What one step computes, laid out in rows: one a token.

    scheduled: [(sequence, num_tokens), ...]   copies: [(from, to), ...], blocks to be copied first
    tokens, positions: lists of N ints, as the forward pass wants them
    spans: [(block_table, start, num_tokens), ...], as the paged cache wants them
    rows, sampling: the rows whose logits are wanted, and whose they are: the sequences of which no
    token is left to compute, so that the next one can be sampled.
    """

    def __init__(self, scheduled, copies):
        self.scheduled, self.copies = scheduled, copies
        self.tokens, self.positions, self.spans, self.rows, self.sampling = [], [], [], [], []
        for sequence, num_tokens in scheduled:
            start = sequence.num_computed_tokens
            self.tokens += sequence.token_ids[start : start + num_tokens]
            self.positions += range(start, start + num_tokens)
            self.spans.append((sequence.block_table, start, num_tokens))
            if num_tokens == sequence.num_uncomputed_tokens:
                self.rows.append(len(self.tokens) - 1)
                self.sampling.append(sequence)

    def padded(self, num_rows):
        """The same step with more rows: the last one, again and again. It writes the same key to
        the same slot, and its logits are not asked for."""
        padded = copy.copy(self)
        missing = num_rows - len(self.tokens)
        for name in ("tokens", "positions", "spans"):
            entries = getattr(self, name)
            setattr(padded, name, entries + entries[-1:] * missing)
        return padded


class Scheduler:
    """The sequences that wait and those that run.

    max_num_seqs: seats.   max_num_batched_tokens: tokens a step, at least one for each seat.
    """

    def __init__(self, blocks, max_num_seqs, max_num_batched_tokens):
        self.blocks = blocks
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting, self.running = [], []

    def add(self, sequence):
        bisect.insort(self.waiting, sequence, key=by_arrival)

    def schedule(self):
        """-> the next Batch."""
        self.blocks.begin_step()
        scheduled = schedule(self.waiting, self.running, self.blocks, self.max_num_seqs,
                             self.max_num_batched_tokens)
        return Batch(scheduled, self.blocks.take_copies())

    def update(self, batch):
        """The batch has been computed."""
        for sequence, num_tokens in batch.scheduled:
            sequence.num_computed_tokens += num_tokens
        for sequence in batch.sampling:
            self._fork(sequence)

    def _fork(self, parent):
        """The prompt is computed: its other completions begin here, on the same blocks. One that
        finds no seat waits without blocks."""
        siblings, parent.siblings = parent.siblings, []
        for child in siblings:
            child.num_cached_tokens = parent.num_cached_tokens
            if len(self.running) < self.max_num_seqs:
                self.blocks.fork(parent, child)
                self.running.append(child)
            else:
                self.add(child)

    def remove(self, sequence):
        """A sequence has ended, or nobody wants it any more: its blocks are free at once."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def restart(self, sequences, forgets_all=False):
        """The step broke off, wherever it was: all `sequences` that are unfinished wait again, and
        nothing half-written is ever read; forgets_all: nor anything written before.

        -> the ids of the blocks that may hold anything
        """
        block_ids = {block_id for sequence in sequences
                     for block_id in sequence.block_table.block_ids}
        siblings = {child for first in sequences for child in first.siblings}
        for sequence in sequences:
            sequence.num_preemptions += bool(sequence.block_table.block_ids)
            sequence.block_table.block_ids, sequence.num_computed_tokens = [], 0
        self.waiting = sorted((each for each in sequences if each not in siblings), key=by_arrival)
        self.running = []
        self.blocks.cancel_step(forgets_all)
        return (range(self.blocks.num_blocks) if forgets_all else
                block_ids.difference(self.blocks.hash_of_block))
