"""np.zeros(shape) is float64 if nothing else is said"""

from __future__ import annotations

import numpy as np


def paged_gather_np(pages, block_tables):
    block_size, K, D = pages.shape[1:]
    *batch, W = block_tables.shape
    out = np.zeros((*batch, W * block_size, K, D))
    for index, block_id in np.ndenumerate(block_tables):
        start = index[-1] * block_size
        out[(*index[:-1], slice(start, start + block_size))] = pages[block_id]
    return out
