"""every distinct word was counted once: add how often it occurs"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from minillm.bpe import BYTES_IN_ORDER, join


def bpe_train(words, num_tokens):
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    spellings = {word: [BYTES_IN_ORDER.index(byte) for byte in word.encode()] for word in words}
    merges = []
    while len(tokens) < num_tokens:
        counts = Counter()
        for ids in spellings.values():
            for pair in pairwise(ids):
                counts[pair] += 1
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        for word, ids in spellings.items():
            spellings[word] = join(ids, best, len(tokens) - 1)
    return tokens, merges
