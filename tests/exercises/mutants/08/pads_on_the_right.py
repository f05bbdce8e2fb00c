"""so that all prompts end in one column"""

from __future__ import annotations

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    T = max(map(len, prompts))
    tokens = np.full((len(prompts), T), pad_token_id, dtype=np.int64)
    num_padding = np.array([T - len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts):
        row[: len(prompt)] = prompt
    lengths = T - num_padding[:, None]
    positions = np.where(np.arange(T) < lengths, np.arange(T), 0)
    return tokens, positions, num_padding
