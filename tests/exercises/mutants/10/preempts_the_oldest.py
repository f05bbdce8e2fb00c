"""the oldest is preempted, who has waited longest"""

from __future__ import annotations

from minillm.scheduler import by_arrival, preempt


def schedule(waiting, running, blocks, max_num_seqs, max_num_batched_tokens):
    scheduled, preempted, budget = [], [], max_num_batched_tokens

    def choose(sequence, num_tokens):
        blocks.grow(sequence, num_tokens)
        scheduled.append((sequence, num_tokens))

    by_age = sorted(running, key=by_arrival)
    decoding = [each for each in by_age if each.num_uncomputed_tokens == 1]
    prompts = [each for each in by_age if each.num_uncomputed_tokens > 1]
    for sequence in decoding[:budget]:
        while sequence in running and not blocks.can_grow(sequence, 1):
            youngest = min(running, key=by_arrival)
            preempt(youngest, waiting, running, blocks)
            preempted.append(youngest)
        if sequence in running:
            choose(sequence, 1)
            budget -= 1
    for sequence in prompts:
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        if num_tokens > 0 and sequence in running:
            choose(sequence, num_tokens)
            budget -= num_tokens
    while waiting and not preempted and budget > 0 and len(running) < max_num_seqs:
        sequence = waiting[0]
        if not blocks.can_admit(sequence, len(running)):
            break
        waiting.remove(sequence)
        running.append(sequence)
        blocks.admit(sequence)
        num_tokens = min(sequence.num_uncomputed_tokens, budget)
        choose(sequence, num_tokens)
        budget -= num_tokens
    return scheduled
