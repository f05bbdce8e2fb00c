"""input `prompts` is changed"""

from __future__ import annotations

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    T = max(map(len, prompts))
    num_padding = np.array([T - len(prompt) for prompt in prompts])
    for prompt, count in zip(prompts, num_padding):
        prompt[:0] = [pad_token_id] * count
    positions = np.maximum(np.arange(T) - num_padding[:, None], 0)
    return np.array(prompts), positions, num_padding
