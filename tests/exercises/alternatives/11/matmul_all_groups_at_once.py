"""One einsum over groups, a few rows of the matrix at a time, all minima in one product."""

from __future__ import annotations

import numpy as np

from minillm.quantization import unpack_int4_np


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    (N, C), (R, num_groups) = x.shape, scale.shape
    wide = np.zeros((N, num_groups * group_size), dtype=np.float32)
    wide[:, :C] = x
    wide = wide.reshape(N, num_groups, group_size)
    y = wide.sum(axis=2) @ minimum.T
    for start in range(0, R, 16):
        rows = slice(start, start + 16)
        q = np.zeros((len(packed[rows]), num_groups * group_size), dtype=np.float32)
        q[:, :C] = unpack_int4_np(packed[rows], C)
        q = q.reshape(len(q), num_groups, group_size)
        y[:, rows] += np.einsum("ngi,rgi,rg->nr", wide, q, scale[rows])
    return y.astype(np.float32)
