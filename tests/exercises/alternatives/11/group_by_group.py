"""A group at a time, in float64; symmetric as q − 8 of a plain division."""

from __future__ import annotations

import numpy as np


def half(number):
    return np.float16(np.clip(number, -65504, 65504))  # of Python's max and min, NaN makes a number


def quantize_group_np(weight, group_size, symmetric=False):
    if not group_size > 0:
        raise ValueError(f"groups of {group_size} numbers")
    (R, C), num_groups = weight.shape, -(-weight.shape[1] // group_size)
    q = np.empty((R, C), np.uint8)
    scale, minimum = np.empty((2, R, num_groups), np.float32)
    for r in range(R):
        for g, start in enumerate(range(0, C, group_size)):
            group = weight[r, start : start + group_size].astype(np.float64)
            if symmetric:
                scale[r, g] = half(group[np.abs(group).argmax()] / -8)
                if scale[r, g] == 0:
                    scale[r, g] = -0.5  # any will do: q = 8 is 0
                levels = np.floor(group / scale[r, g] + 8.5)
                minimum[r, g] = -8 * scale[r, g]
            else:
                scale[r, g] = half(np.ptp(group) / 15) or 1
                minimum[r, g] = half(group.min())
                levels = np.rint((group - minimum[r, g]) / scale[r, g])
            q[r, start : start + group_size] = np.clip(levels, 0, 15)
    return q, scale, minimum
