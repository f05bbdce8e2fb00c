"""the leftmost known pair was joined, not the one that was learned first"""

from __future__ import annotations


def bpe_encode(ids, ranks, merged):
    ids = list(ids)
    while True:
        known = [i for i in range(len(ids) - 1) if (ids[i], ids[i + 1]) in ranks]
        if not known:
            return ids
        i = known[0]
        ids[i : i + 2] = [merged[ranks[ids[i], ids[i + 1]]]]
