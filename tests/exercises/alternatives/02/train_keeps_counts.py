"""The counts of all pairs are kept, and only words that hold the joined pair are counted again."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from minillm.bpe import BYTES_IN_ORDER, join


def bpe_train(words, num_tokens):
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    spellings = {word: [BYTES_IN_ORDER.index(byte) for byte in word.encode()] for word in words}
    counts = Counter()

    def add(word, sign):
        for pair in pairwise(spellings[word]):
            counts[pair] += sign * words[word]

    for word in words:
        add(word, 1)
    merges = []
    while len(tokens) < num_tokens and any(counts.values()):
        best = max(counts, key=lambda pair: (counts[pair], -pair[0], -pair[1]))
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word, ids in spellings.items():
            if best in pairwise(ids):
                add(word, -1)
                spellings[word] = join(ids, best, len(tokens) - 1)
                add(word, 1)
    return tokens, merges
