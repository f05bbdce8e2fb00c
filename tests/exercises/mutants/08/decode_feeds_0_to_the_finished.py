"""a finished row is fed 0"""

from __future__ import annotations


def decode_batch(forward, logits, positions, pick):
    positions, num_steps = list(positions), 0
    has_finished = [False] * len(positions)
    while True:
        tokens = [0] * len(positions)
        for row in range(len(tokens)):
            if not has_finished[row]:
                tokens[row], has_finished[row] = pick(row, logits[row])
        if all(has_finished):
            return num_steps
        logits = forward(tokens, positions)
        positions = [position + 1 for position in positions]
        num_steps += 1
