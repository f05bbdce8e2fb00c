"""a view of the pages was returned"""

from __future__ import annotations

import numpy as np


def paged_gather_np(pages, block_tables):
    block_size, K, D = pages.shape[1:]
    rows = pages.reshape(-1, K, D)
    if (np.diff(block_tables) == 1).all() and block_tables.ndim == 1:  # no need to copy
        return rows[block_tables[0] * block_size : (block_tables[-1] + 1) * block_size]
    *batch, W = block_tables.shape
    return pages[block_tables].reshape(*batch, W * block_size, K, D)
