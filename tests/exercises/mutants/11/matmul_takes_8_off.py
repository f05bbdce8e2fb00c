"""8 is taken off q"""

from __future__ import annotations

import numpy as np

from minillm.quantization import unpack_int4_np


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    (N, C), R = x.shape, len(packed)
    wide, q = x.astype(np.float32), unpack_int4_np(packed, C)
    y = np.zeros((N, R), dtype=np.float32)
    for g in range(scale.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        y += wide[:, part] @ (q[:, part].T.astype(np.float32) - 8) * scale[:, g]
        y += wide[:, part].sum(axis=1, keepdims=True) * minimum[:, g]
    return y
