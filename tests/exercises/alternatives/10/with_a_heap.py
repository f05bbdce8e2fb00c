"""A heap of those who run, preemption written out, and lists that are filled anew."""

from __future__ import annotations

import heapq


class Step:
    def __init__(self, waiting, blocks, budget):
        self.waiting, self.blocks, self.budget, self.scheduled = waiting, blocks, budget, []

    def take(self, sequence):
        count = min(self.budget, sequence.num_uncomputed_tokens)
        self.blocks.grow(sequence, count)
        self.budget -= count
        self.scheduled.append([sequence, count])


def schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    step = Step(waiting, blocks, max_num_batched_tokens)
    heap = [(each.order, each) for each in running]
    heapq.heapify(heap)
    by_age = [heapq.heappop(heap)[1] for _ in range(len(heap))]
    staying = list(by_age)
    for sequence in by_age:
        if sequence.num_uncomputed_tokens != 1 or sequence not in staying or not step.budget:
            continue
        while staying and sequence is not None and not blocks.can_grow(sequence, 1):
            last = staying.pop()
            blocks.release(last)
            last.num_preemptions += 1
            waiting[:] = sorted([*waiting, last], key=lambda each: each.order)
            if last is sequence:
                sequence = None
        if sequence is not None:
            step.take(sequence)
    nobody_left = len(staying) == len(running)
    for sequence in staying:
        if all(sequence is not taken for taken, _ in step.scheduled) and step.budget > 0:
            step.take(sequence)
    newcomers = 0
    for sequence in waiting if nobody_left else ():
        seats = max_num_seqs - len(staying)
        if seats <= 0 or not step.budget or not blocks.can_admit(sequence, len(staying)):
            break
        blocks.admit(sequence)
        step.take(sequence)
        staying.append(sequence)
        newcomers += 1
    waiting[:] = waiting[newcomers:]
    running[:] = staying
    return step.scheduled
