"""it would end up in the answer"""

from __future__ import annotations


def decode_batch(forward, logits, positions, pick):
    positions, num_steps, has_finished = list(positions), 0, [False] * len(positions)
    while True:
        picked = [pick(row, logits[row]) for row in range(len(positions))]
        tokens = [token for token, _ in picked]
        has_finished = [old or new for old, (_, new) in zip(has_finished, picked)]
        if all(has_finished):
            return num_steps
        logits = forward(tokens, positions)
        positions = [position + 1 for position in positions]
        num_steps += 1
