"""A tuple, split at the earliest pair; what stands on both sides is looked at anew."""

from __future__ import annotations


def bpe_encode(ids, ranks, merged):
    ids = tuple(ids)
    known = sorted((ranks[ids[i : i + 2]], i) for i in range(len(ids) - 1)
                   if ids[i : i + 2] in ranks)
    if not known:
        return ids
    rank, i = known[0]
    return bpe_encode((*ids[:i], merged[rank], *ids[i + 2 :]), ranks, merged)
