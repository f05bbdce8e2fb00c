"""the whole matrix is there with four or more bytes a number"""

from __future__ import annotations

import numpy as np

from minillm.quantization import unpack_int4_np


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    C = x.shape[1]
    wide, q = x.astype(np.float32), unpack_int4_np(packed, C)
    weight = q * np.repeat(scale, group_size, axis=1)[:, :C]
    weight += np.repeat(minimum, group_size, axis=1)[:, :C]
    return wide @ weight.T
