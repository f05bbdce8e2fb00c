"""Two passes over `running`, nothing sorted but a copy, and `while True` for the line."""

from __future__ import annotations

from minillm.scheduler import preempt


def schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    chosen = {}
    running.sort(key=lambda sequence: sequence.order)
    has_preempted = False

    def left():
        return max_num_batched_tokens - sum(chosen.values())

    for sequence in list(running):
        if sequence.is_decoding and sequence in running and left() > 0:
            while not blocks.can_grow(sequence, num_tokens=1):
                has_preempted = True
                youngest = running[-1]  # they are sorted
                preempt(youngest, waiting, running, blocks)
                if youngest is sequence:
                    break
            else:
                blocks.grow(sequence, num_tokens=1)
                chosen[sequence] = 1
    for sequence in running:
        if sequence not in chosen and not sequence.is_decoding and left() > 0:
            chosen[sequence] = min(left(), sequence.num_uncomputed_tokens)
            blocks.grow(sequence, chosen[sequence])
    while True:
        if has_preempted or not waiting or len(running) >= max_num_seqs or left() == 0:
            return tuple(chosen.items())
        first = waiting[0]
        if not blocks.can_admit(first, num_spare_blocks=len(running)):
            return tuple(chosen.items())
        blocks.admit(first)
        del waiting[0]
        running.insert(0, first)
        chosen[first] = min(left(), first.num_uncomputed_tokens)
        blocks.grow(first, chosen[first])
