"""blocks and offsets are exchanged"""

from __future__ import annotations


def paged_gather_np(pages, block_tables):
    block_size, K, D = pages.shape[1:]
    *batch, W = block_tables.shape
    return pages[block_tables].swapaxes(-4, -3).reshape(*batch, W * block_size, K, D)
