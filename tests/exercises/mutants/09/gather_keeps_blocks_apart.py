"""are two axes still"""

from __future__ import annotations


def paged_gather_np(pages, block_tables):
    return pages[block_tables]
