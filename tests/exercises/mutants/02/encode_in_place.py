"""input `ids` is changed"""

from __future__ import annotations


def bpe_encode(ids, ranks, merged):
    while True:
        known = [i for i in range(len(ids) - 1) if (ids[i], ids[i + 1]) in ranks]
        if not known:
            return ids
        i = min(known, key=lambda i: ranks[ids[i], ids[i + 1]])
        ids[i : i + 2] = [merged[ranks[ids[i], ids[i + 1]]]]
