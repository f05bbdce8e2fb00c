"""one byte has no neighbour, and min() of nothing raises"""

from __future__ import annotations

from itertools import pairwise
from math import inf


def bpe_encode(ids, ranks, merged):
    while True:
        pairs = list(pairwise(ids))
        first = min(pairs, key=lambda pair: ranks.get(pair, inf))
        if first not in ranks:
            return list(ids)
        i = pairs.index(first)
        ids = [*ids[:i], merged[ranks[first]], *ids[i + 2 :]]
