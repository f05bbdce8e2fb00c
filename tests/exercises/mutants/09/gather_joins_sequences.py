"""all sequences came behind one another"""

from __future__ import annotations


def paged_gather_np(pages, block_tables):
    K, D = pages.shape[2:]
    return pages[block_tables].reshape(-1, K, D)
