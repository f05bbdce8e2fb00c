"""Exercise of chapter 02_tokenizer: write bpe_train and bpe_encode.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 02
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/02_tokenizer/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from minillm.bpe import BYTES_IN_ORDER, Pair, join


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
    raise NotImplementedError("bpe_train is yours to write")


def bpe_encode(ids: Sequence[int], ranks: dict[Pair, int], merged: Sequence[int]) -> list[int]:
    """BPE itself: join the pair that was learned first, until no neighbours are a known pair.

    ids: a word's bytes as tokens, perhaps none.   ranks[a, b] says how early the pair was learned,
    merged[rank] is the token it became. Where the pair stands several times, the leftmost is
    joined first. This is the definition; Tokenizer calls bpe_encode_fast, which returns the same
    for any input.

    >>> bpe_encode([0, 1, 0, 1, 2], ranks={(0, 1): 0, (3, 2): 1}, merged=[3, 4])
    [3, 4]
    """
    raise NotImplementedError("bpe_encode is yours to write")
