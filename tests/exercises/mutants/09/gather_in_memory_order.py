"""in the order of the memory"""

from __future__ import annotations

import numpy as np


def paged_gather_np(pages, block_tables):
    block_size, K, D = pages.shape[1:]
    *batch, W = block_tables.shape
    return pages[np.sort(block_tables, axis=-1)].reshape(*batch, W * block_size, K, D)
