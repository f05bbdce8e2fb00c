"""one row came for each block"""

from __future__ import annotations


def paged_gather_np(pages, block_tables):
    K, D = pages.shape[2:]
    return pages.reshape(-1, K, D)[block_tables]
