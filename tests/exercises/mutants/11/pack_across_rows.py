"""rows run into each other"""

from __future__ import annotations

import numpy as np


def pack_int4_np(q):
    flat = q.reshape(-1)
    even = np.concatenate([flat, np.zeros_like(flat[: flat.size % 2])])
    packed = even[0::2] | even[1::2] << 4
    return packed.reshape(len(q), -1) if packed.size % len(q) == 0 else packed
