"""the tokens of the longest answer are returned"""

from __future__ import annotations


def decode_batch(forward, logits, positions, pick):
    tokens, positions, num_steps = [0] * len(positions), list(positions), 1
    has_finished = [False] * len(positions)
    while True:
        for row in range(len(tokens)):
            if not has_finished[row]:
                tokens[row], has_finished[row] = pick(row, logits[row])
        if all(has_finished):
            return num_steps
        logits = forward(tokens, positions)
        positions = [position + 1 for position in positions]
        num_steps += 1
