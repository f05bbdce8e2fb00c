"""the scale is, once it is rounded to float16: then it is 1"""

from __future__ import annotations

import numpy as np

from minillm.quantization import check_group_size, round_to_float16_np, split_groups_np


def quantize_group_np(weight, group_size, symmetric=False):
    check_group_size(group_size)
    groups = split_groups_np(weight.astype(np.float32), group_size)
    low, high = groups.min(axis=2), groups.max(axis=2)
    if symmetric:
        scale = np.where(-low >= high, low, high) / -8
    else:
        scale = (high - low) / 15
    scale = np.where(low == high, np.ones_like(scale), round_to_float16_np(scale))
    minimum = -8 * scale if symmetric else round_to_float16_np(low)
    q = np.round((groups - minimum[:, :, None]) / scale[:, :, None]).clip(0, 15)
    return q.astype(np.uint8).reshape(len(weight), -1)[:, : weight.shape[1]], scale, minimum
