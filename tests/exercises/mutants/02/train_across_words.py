"""the last letter of a word and the first of the next were counted as a pair"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from minillm.bpe import BYTES_IN_ORDER, join


def bpe_train(words, num_tokens):
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    ids = [BYTES_IN_ORDER.index(byte) for word in words.elements() for byte in word.encode()]
    merges = []
    while len(tokens) < num_tokens:
        counts = Counter(pairwise(ids))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        ids = join(ids, best, len(tokens) - 1)
    return tokens, merges
