"""All merges that occur, in the order of learning: each is joined wherever it stands."""

from __future__ import annotations

from minillm.bpe import join


def bpe_encode(ids, ranks, merged):
    for pair in sorted(ranks, key=ranks.get):
        ids = join(ids, pair, merged[ranks[pair]])
    return ids
