"""the products are summed in float16"""

from __future__ import annotations

import numpy as np

from minillm.quantization import unpack_int4_np


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    (N, C), R = x.shape, len(packed)
    wide, q = x, unpack_int4_np(packed, C)
    y = np.zeros((N, R), dtype=x.dtype)
    for g in range(scale.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        y += (wide[:, part] @ q[:, part].T.astype(x.dtype) * scale[:, g]).astype(x.dtype)
        y += (wide[:, part].sum(axis=1, keepdims=True) * minimum[:, g]).astype(x.dtype)
    return y.astype(np.float32)
