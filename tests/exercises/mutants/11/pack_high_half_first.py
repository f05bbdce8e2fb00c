"""the halves are exchanged"""

from __future__ import annotations

import numpy as np


def pack_int4_np(q):
    C = q.shape[1]
    even = np.concatenate([q, np.zeros_like(q[:, : C % 2])], axis=1)
    return even[:, 0::2] << 4 | even[:, 1::2]
