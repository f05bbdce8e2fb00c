"""rows that have finished are left out of the pass"""

from __future__ import annotations


def decode_batch(forward, logits, positions, pick):
    rows, positions, num_steps = list(range(len(positions))), list(positions), 0
    while True:
        tokens, still = [], []
        for index, row in enumerate(rows):
            token, has_finished = pick(row, logits[index])
            if not has_finished:
                tokens.append(token)
                still.append(row)
        if not still:
            return num_steps
        rows = still
        logits = forward(tokens, [positions[row] for row in rows])
        positions = [position + 1 for position in positions]
        num_steps += 1
