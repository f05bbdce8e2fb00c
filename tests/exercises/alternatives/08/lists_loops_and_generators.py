"""Padding by lists, attention one query at a time over the keys that it sees, a loop over sets."""

from __future__ import annotations

import itertools

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    longest = max(len(prompt) for prompt in prompts)
    missing = [longest - len(prompt) for prompt in prompts]
    tokens = [[pad_token_id] * count + list(prompt) for count, prompt in zip(missing, prompts)]
    positions = [[0] * count + list(range(longest - count)) for count in missing]
    return [np.array(each) for each in (tokens, positions, missing)]


def masked_attention_np(q, k, v, visible):
    (B, H, T, D), K = q.shape, k.shape[1]
    out = np.empty_like(q)
    for b, h, t in itertools.product(range(B), range(H), range(T)):
        seen = np.flatnonzero(visible[b, t])
        keys, values = k[b, h * K // H, seen], v[b, h * K // H, seen]
        scores = keys @ q[b, h, t] * D**-0.5
        weights = np.exp(scores - scores.max())
        out[b, h, t] = weights @ values / weights.sum()
    return out


def decode_batch(forward, logits, positions, pick):
    last, unfinished = {}, set(range(len(positions)))

    def pick_all(logits):
        for row in sorted(unfinished):
            last[row], has_finished = pick(row, logits[row])
            if has_finished:
                unfinished.discard(row)

    pick_all(logits)
    for number in itertools.count():
        if not unfinished:
            return number
        tokens = [last[row] for row in range(len(positions))]
        pick_all(forward(tokens, [position + number for position in positions]))
