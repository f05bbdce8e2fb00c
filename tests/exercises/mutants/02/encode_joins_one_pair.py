"""only one pair was joined: go on until no neighbours are a known pair"""

from __future__ import annotations

from itertools import pairwise
from math import inf


def bpe_encode(ids, ranks, merged):
    pairs = list(pairwise(ids))
    first = min(pairs, key=lambda pair: ranks.get(pair, inf), default=None)
    if first not in ranks:
        return ids
    i = pairs.index(first)
    return [*ids[:i], merged[ranks[first]], *ids[i + 2 :]]
