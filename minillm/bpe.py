"""What is byte-pair encoding? Train: learn which neighbours to join. Encode: join them again.

Start from the 256 bytes, so that any text can be written. *Train*: join the most frequent pair
of neighbouring tokens into a new token, and again, until the vocabulary is full; the order in
which pairs were joined, the merges, is all that training learns. *Encode*: replay the merges on
a new word, the earliest learned first.
(Sennrich et al. 2016, algorithm 1; over bytes instead of characters: GPT-2, Radford et al. 2019)

Chapter 02_tokenizer tells the story. Everything here is about one word; `pretokenizer.py` cuts a
text into words, `tokenizer.py` puts the two together. Left out on purpose: unigram and WordPiece
models, BPE over characters, dropout.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import inf

from .exercise import exercise

# Single bytes get their ids in GPT-2's order: first those that print as a visible character.
PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_IN_ORDER = [*PRINTABLE_BYTES, *sorted({*range(256)} - {*PRINTABLE_BYTES})]

Pair = tuple[int, int]


def join(ids: Sequence[int], pair: Pair, joined: int) -> list[int]:
    """Replace every occurrence of a pair, from left to right.

    >>> join([1, 1, 1, 2], (1, 1), 3)
    [3, 1, 2]
    """
    out = []
    i = 0
    while i < len(ids):
        if ids[i] == pair[0] and i + 1 < len(ids) and ids[i + 1] == pair[1]:
            out.append(joined)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out


@exercise("02_tokenizer")
def bpe_train(words: Counter[str], num_tokens: int) -> tuple[list[bytes], list[Pair]]:
    """Learn merges from words and how often each occurs, until there are num_tokens tokens.

    Every word begins as its UTF-8 bytes, and the first 256 tokens are the single bytes: token id
    stands for the byte BYTES_IN_ORDER[id]. Then, again and again: count all pairs of neighbours
    inside words (in "aaa" a,a counts twice), make the most frequent one the next token, and join
    it in every word, from left to right. Among equally frequent pairs the one with the smaller
    ids goes first. Fewer tokens come out if every word is a single token before that.

    -> (tokens, merges): the bytes of every token; the pairs of ids, in the order of joining.
    To count anew before each merge is right, and takes minutes for a long text. It is enough to
    change the counts in those words that hold the pair: the other words stay what they are.

    >>> tokens, merges = bpe_train(Counter({"aab": 3, "ab": 2}), num_tokens=258)
    >>> tokens[256:], [(tokens[left], tokens[right]) for left, right in merges]
    ([b'ab', b'aab'], [(b'a', b'b'), (b'a', b'ab')])
    """
    tokens = [bytes([byte]) for byte in BYTES_IN_ORDER]
    id_of = {token: id for id, token in enumerate(tokens)}
    spellings = [[BYTES_IN_ORDER.index(byte) for byte in word.encode()] for word in words]
    occurrences = list(words.values())

    pair_counts: Counter[Pair] = Counter()
    words_with: defaultdict[Pair, set[int]] = defaultdict(set)
    for word, ids in enumerate(spellings):
        for pair in pairwise(ids):
            pair_counts[pair] += occurrences[word]
            words_with[pair].add(word)
    heap = [(-count, pair) for pair, count in pair_counts.items()]
    heapify(heap)

    merges = []
    while len(tokens) < num_tokens and heap:
        negative_count, pair = heappop(heap)
        if pair_counts[pair] != -negative_count:
            continue  # outdated: the count has changed since, and was pushed again when it did
        merges.append(pair)
        token = tokens[pair[0]] + tokens[pair[1]]
        if token not in id_of:  # it may be there: a·bc and ab·c both spell abc
            id_of[token] = len(tokens)
            tokens.append(token)

        changes: Counter[Pair] = Counter()
        for word in words_with.pop(pair):
            for old in pairwise(spellings[word]):
                changes[old] -= occurrences[word]
            spellings[word] = join(spellings[word], pair, id_of[token])
            for new in pairwise(spellings[word]):
                changes[new] += occurrences[word]
                words_with[new].add(word)
        for changed, change in changes.items():
            pair_counts[changed] += change
            if change and pair_counts[changed]:
                heappush(heap, (-pair_counts[changed], changed))
    return tokens, merges


@exercise("02_tokenizer")
def bpe_encode(ids: Sequence[int], ranks: dict[Pair, int], merged: Sequence[int]) -> list[int]:
    """BPE itself: join the pair that was learned first, until no neighbours are a known pair.

    ids: a word's bytes as tokens, perhaps none.   ranks[a, b] says how early the pair was learned,
    merged[rank] is the token it became. Where the pair stands several times, the leftmost is
    joined first. This is the definition; Tokenizer calls bpe_encode_fast, which returns the same
    for any input.

    >>> bpe_encode([0, 1, 0, 1, 2], ranks={(0, 1): 0, (3, 2): 1}, merged=[3, 4])
    [3, 4]
    """
    ids = list(ids)
    while len(ids) > 1:
        pairs = list(pairwise(ids))
        earliest = min(pairs, key=lambda pair: ranks.get(pair, inf))
        if earliest not in ranks:
            break
        i = pairs.index(earliest)
        ids[i : i + 2] = [merged[ranks[earliest]]]
    return ids


def bpe_encode_fast(ids: Sequence[int], ranks: dict[Pair, int],
                     merged: Sequence[int]) -> list[int]:
    """Same contract as bpe_encode, in O(n log n) instead of O(n²).

    bpe_encode looks at all n pairs again before each of its merges, although a merge changes
    only the pair on its left and the pair on its right. Here a heap keeps the pairs by (rank,
    position), and links to the neighbours let two tokens join without moving the others.
    """
    n = len(ids)
    gone = -1  # stands where a token was joined to its left neighbour; it is in no known pair,
    ids = [*ids, gone]  # and one at the end closes the list to a ring
    left = [n, *range(n)]
    right = [*range(1, n + 1), 0]

    # The number rank * n + i sorts as (rank, i) does, and is compared faster.
    heap = [ranks[pair] * n + i for i, pair in enumerate(pairwise(ids)) if pair in ranks]
    heapify(heap)
    while heap:
        rank, i = divmod(heappop(heap), n)
        j = right[i]
        if ranks.get((ids[i], ids[j])) != rank:
            continue  # outdated: one of the two was joined to something else meanwhile
        ids[i], ids[j] = merged[rank], gone
        right[i] = right[j]
        left[right[j]] = i
        for start in (left[i], i):
            new_rank = ranks.get((ids[start], ids[right[start]]))
            if new_rank is not None:
                heappush(heap, new_rank * n + start)
    return [id for id in ids if id != gone]
