"""Recursive, asks the blocks again and again, and looks for room before each prompt too."""

from __future__ import annotations

from minillm.scheduler import by_arrival, preempt


def schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    scheduled = []
    num_before = len(running)

    def budget():
        return max_num_batched_tokens - sum(num_tokens for _, num_tokens in scheduled)

    def add(sequence, num_tokens):
        if budget() < 1 or not blocks.can_grow(sequence, num_tokens):
            return False
        blocks.grow(sequence, num_tokens)
        scheduled.append((sequence, num_tokens))
        return True

    def make_room(sequence):
        """True if there is room for its token in the end."""
        if blocks.can_grow(sequence, 1):
            return True
        leaving = sorted(running, key=by_arrival, reverse=True)[0]
        preempt(leaving, waiting, running, blocks)
        return leaving is not sequence and make_room(sequence)

    decoding = [each for each in running if each.num_uncomputed_tokens == 1]
    prompts = [each for each in running if each.num_uncomputed_tokens != 1]
    for sequence in sorted(decoding, key=by_arrival):
        if sequence in running and budget() > 0 and make_room(sequence):
            add(sequence, 1)
    for sequence in sorted(prompts, key=by_arrival):
        if sequence in running:
            add(sequence, min(budget(), sequence.num_uncomputed_tokens))
    if len(running) < num_before:
        return scheduled

    def line():
        if not waiting or len(running) == max_num_seqs or budget() == 0:
            return
        if blocks.can_admit(waiting[0], num_spare_blocks=len(running)):
            blocks.admit(waiting[0])
            running.append(waiting.pop(0))
            add(running[-1], min(budget(), running[-1].num_uncomputed_tokens))
            line()

    line()
    return scheduled
