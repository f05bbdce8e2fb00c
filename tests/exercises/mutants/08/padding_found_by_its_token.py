"""count padding by the lengths"""

from __future__ import annotations

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    T = max(map(len, prompts))
    tokens = np.full((len(prompts), T), pad_token_id, dtype=np.int64)
    for row, prompt in zip(tokens, prompts):
        row[T - len(prompt):] = prompt
    num_padding = (tokens == pad_token_id).sum(axis=1)
    positions = np.maximum(np.arange(T) - num_padding[:, None], 0)
    return tokens, positions, num_padding
