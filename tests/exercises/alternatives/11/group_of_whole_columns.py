"""All rows at once, a group of columns after the other; zeros are 0·q + 0."""

from __future__ import annotations

import numpy as np

from minillm.quantization import round_to_float16_np


def quantize_group_np(weight, group_size, symmetric=False):
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}")
    columns = []
    for start in range(0, weight.shape[1], group_size):
        group = weight[:, start : start + group_size].astype(np.float32)
        low, high = group.min(axis=1, keepdims=True), group.max(axis=1, keepdims=True)
        scale = np.where(high > -low, high, low) / -8 if symmetric else (high - low) / 15
        scale = round_to_float16_np(scale)
        if not symmetric:
            scale[scale == 0] = 1
        minimum = scale * -8 if symmetric else round_to_float16_np(low)
        divisor = np.where(scale == 0, 1, scale)
        q = np.minimum(np.maximum((group - minimum) / divisor + 0.5, 0), 15.5).astype(np.uint8)
        columns.append((q, scale, minimum))
    return tuple(np.concatenate(each, axis=1) for each in zip(*columns))
