"""Exercise of chapter 10_continuous_batching: write schedule.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 10
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/10_continuous_batching/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own.
"""

from __future__ import annotations

from minillm.scheduler import by_arrival, preempt


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
    raise NotImplementedError("schedule is yours to write")
