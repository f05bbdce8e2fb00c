"""the pairs were counted once, at the beginning"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from minillm.bpe import BYTES_IN_ORDER


def bpe_train(words, num_tokens):
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    counts = Counter()
    for word, count in words.items():
        for pair in pairwise(BYTES_IN_ORDER.index(byte) for byte in word.encode()):
            counts[pair] += count
    ranked = sorted(counts, key=lambda pair: (-counts[pair], pair))
    merges = ranked[: num_tokens - 256]
    tokens += [tokens[left] + tokens[right] for left, right in merges]
    return tokens, merges
