"""num_padding counts the prompts' own tokens"""

from __future__ import annotations

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    T = max(map(len, prompts))
    tokens = np.full((len(prompts), T), pad_token_id, dtype=np.int64)
    num_padding = np.array([T - len(prompt) for prompt in prompts])
    for row, prompt in zip(tokens, prompts):
        row[T - len(prompt):] = prompt
    positions = np.maximum(np.arange(T) - num_padding[:, None], 0)
    return tokens, positions, T - num_padding
