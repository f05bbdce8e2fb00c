"""Grader of chapter 02_tokenizer. README.md in this folder tells how graders are written."""

from __future__ import annotations

import random
from collections import Counter
from numbers import Integral

from minillm.bpe import BYTES_IN_ORDER
from minillm.course import using
from minillm.course.check import check, equal, require
from minillm.pretokenizer import Pretokenizer
from minillm.tokenizer import Tokenizer

TEXT = """She sells sea shells by the sea shore; the shells that she sells are sea shells, I'm sure.
So if she sells 100 shells on the sea shore, then I'm sure she sells sea shore shells. Größe! """


def join_loop(ids, pair, joined):
    """Every place where the pair stands, from left to right."""
    out, i = [], 0
    while i < len(ids):
        is_pair = tuple(ids[i : i + 2]) == pair
        out.append(joined if is_pair else ids[i])
        i += 2 if is_pair else 1
    return out


def train_loop(words, num_tokens, spell=None, weighted=True, recount=True, tie=None, across=False):
    """Training as plain loops; the options make the usual mistakes."""
    tokens, merges = [bytes([byte]) for byte in BYTES_IN_ORDER], []
    spell = spell or (lambda word: [BYTES_IN_ORDER.index(byte) for byte in word.encode()])
    tie = tie or (lambda pair, tokens: pair)
    spellings = [(spell(word), count if weighted else 1) for word, count in words.items()]
    if across:
        spellings = [([id for ids, count in spellings for id in ids * count], 1)]
    at_first = counts_of(spellings)
    while len(tokens) < num_tokens:
        counts = counts_of(spellings)
        if not recount:
            counts = {pair: count for pair, count in at_first.items() if pair not in merges}
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], tie(pair, tokens)))
        merges.append(best)
        tokens.append(tokens[best[0]] + tokens[best[1]])
        spellings = [(join_loop(ids, best, len(tokens) - 1), count) for ids, count in spellings]
    return tokens, merges


def counts_of(spellings):
    counts = {}
    for ids, count in spellings:
        for i in range(len(ids) - 1):
            pair = ids[i], ids[i + 1]
            counts[pair] = counts.get(pair, 0) + count
    return counts


def encode_loop(ids, ranks, merged, choose=min, limit=None, replace=None):
    """Encoding as plain loops. choose: which of the (rank, place) of known pairs goes first."""
    ids, num_joined = list(ids), 0
    while limit is None or num_joined < limit:
        known = [(ranks[ids[i], ids[i + 1]], i) for i in range(len(ids) - 1)
                 if (ids[i], ids[i + 1]) in ranks]
        if not known:
            break
        rank, i = choose(known)
        ids = [*ids[:i], merged[rank] if replace is None else replace(rank), *ids[i + 2 :]]
        num_joined += 1
    return ids


# ── bpe_train ────────────────────────────────────────────────────────────────────────────────


def learned(result):
    """(tokens beyond the bytes, merges spelled out) of what bpe_train returned."""
    is_pair = isinstance(result, (tuple, list)) and len(result) == 2
    require(is_pair and all(isinstance(part, (list, tuple)) for part in result),
            "two lists, (tokens, merges)", type(result).__name__ if not is_pair
            else f"a {type(result[0]).__name__} and a {type(result[1]).__name__}",
            "is a `return tokens, merges` missing?")
    tokens, merges = result
    require(all(isinstance(token, bytes) for token in tokens), "tokens that are bytes",
            next((f"{token!r}, a {type(token).__name__}" for token in tokens
                  if not isinstance(token, bytes)), ""),
            "a token is the bytes that it stands for: bytes([byte]), and sums of those")
    for merge in merges:
        require(isinstance(merge, tuple) and len(merge) == 2 and all(
            isinstance(id, Integral) and 0 <= id < len(tokens) for id in merge),
            "merges that are pairs of ids, (left, right)", repr(merge),
            "a merge holds the ids of two tokens, their places in the list of tokens")
    return list(tokens[256:]), [(tokens[left], tokens[right]) for left, right in merges]


def learns(bpe_train, words, num_tokens, hint=None, **mistakes):
    """bpe_train learns what the loop learns.   mistakes: {symptom: options of train_loop}."""
    words = Counter(words)
    tokens, merges = learned(bpe_train(words, num_tokens))
    expected_tokens, expected_merges = learned(train_loop(words, num_tokens))
    wrong = {symptom: learned(train_loop(words, num_tokens, **options))[1]
             for symptom, options in mistakes.items()}
    equal(merges, expected_merges, hint,
          {symptom: each for symptom, each in wrong.items() if each != expected_merges})
    equal(tokens, expected_tokens, hint or "the n-th merge makes token 255 + n")


RECOUNT = {"the pairs were counted once, at the beginning: each merge changes what stands beside "
           "what, so count again": {"recount": False}}
BYTE_VALUES = {"ids are not byte values: byte b is the token at BYTES_IN_ORDER.index(b)": {
    "spell": lambda word: list(word.encode())}}
TIES = {
    "of equally frequent pairs the one met first was taken: the one with the smaller ids goes "
    "first": {"tie": lambda pair, tokens: 0},
    "of equally frequent pairs the one with the larger ids was taken": {
        "tie": lambda pair, tokens: (-pair[0], -pair[1])},
    "equally frequent pairs were compared by their bytes: compare their ids, which have another "
    "order": {"tie": lambda pair, tokens: (tokens[pair[0]], tokens[pair[1]])},
}


@check("the first 256 tokens are the single bytes, in their order")
def single_bytes(bpe_train):
    result = bpe_train(Counter({"abc": 2}), 256)
    learned(result)
    tokens, merges = result
    equal(len(tokens), 256, "num_tokens is 256: there is room for the bytes, and for nothing else")
    equal(tokens[220:225], [bytes([byte]) for byte in BYTES_IN_ORDER[220:225]], (
        "token i is the byte BYTES_IN_ORDER[i]: first the bytes that print, then the others"))
    equal(tokens, [bytes([byte]) for byte in BYTES_IN_ORDER], "token i is BYTES_IN_ORDER[i]")
    equal(merges, [], "no pair is joined: the vocabulary is full")


@check("the most frequent pair becomes the first token")
def most_frequent(bpe_train):
    learns(bpe_train, {"xaby": 1, "ab": 1, "zab": 1}, 257, "the pair a, b stands there most often",
           **BYTE_VALUES)


@check("a word that occurs n times counts n times")
def occurrences(bpe_train):
    learns(bpe_train, {"ab": 1, "abx": 1, "cd": 5, "cdy": 5}, 258, **{
        "every distinct word was counted once: add how often it occurs": {"weighted": False}})


@check("pairs are counted inside words, never across two")
def inside_words(bpe_train):
    learns(bpe_train, {"ba": 6, "b": 1, "cd": 2}, 258, **{
        "the last letter of a word and the first of the next were counted as a pair":
            {"across": True}})


@check("joined tokens are joined again: the counts follow the merges")
def again(bpe_train):
    learns(bpe_train, {"abcd": 4, "abc": 3, "bc": 2}, 259, **RECOUNT)


@check("in a run of equal letters pairs are joined from left to right")
def runs(bpe_train):
    learns(bpe_train, {"aaaaaaa": 3, "aaab": 1}, 260, (
        "aaaaaaa has 6 pairs a,a, and becomes aa aa aa a: a joined token is not joined again with "
        "a letter that it holds"), **RECOUNT)


@check("equally frequent pairs: the smaller ids first")
def ties(bpe_train):
    learns(bpe_train, {"xw": 2, "zy": 2, "z": 1, "cba": 2}, 259, **TIES)
    learns(bpe_train, {"b\x01": 2, " d": 2, "ed": 2, "~~": 2}, 259, **TIES)


@check("num_tokens is the size of the vocabulary, bytes included")
def size(bpe_train):
    words = {"abcdefgh": 3, "hgfedcba": 2}
    tokens, _ = learned(bpe_train(Counter(words), 262))
    require(len(tokens) == 6, "262 tokens, 6 of them joined", f"{256 + len(tokens)} tokens",
            "the 256 bytes count: num_tokens is the length of the list, not the number of merges")
    learns(bpe_train, words, 262, **TIES)


@check("when every word is a single token, training ends", hint=(
    "no neighbours are left to count: stop, even if the vocabulary is not full"))
def nothing_left(bpe_train):
    learns(bpe_train, {"ab": 3, "c": 1}, 300)
    equal(learned(bpe_train(Counter(), 300)), ([], []), "no words, no pairs")


@check("a word is its UTF-8 bytes", hint=(
    "word.encode() are the bytes; ü are two of them, and BYTES_IN_ORDER.index(byte) is a byte's "
    "token"))
def utf8(bpe_train):
    learns(bpe_train, {"grün": 3, "über": 2, "日本": 4, " a": 1}, 264, **TIES,
           **BYTE_VALUES)


@check("random words: the same merges as the definition")
def random_words(bpe_train):
    draw = random.Random(2)
    for _ in range(6):
        words = Counter({"".join(draw.choices("abcde é", k=draw.randint(1, 8))): draw.randint(1, 9)
                         for _ in range(12)})
        learns(bpe_train, words, 256 + draw.randint(5, 30), **RECOUNT, **TIES)


@check("Tokenizer.train learns with it")
def train_in_the_tokenizer(bpe_train):
    with using(bpe_train=bpe_train):
        tokenizer = Tokenizer.train(TEXT, vocab_size=290, special_tokens=["<|end|>"])
    words = Counter(Pretokenizer("gpt-2").words(TEXT))
    expected = [*train_loop(words, 289)[0][256:], b"<|end|>"]
    equal([tokenizer.token_bytes(id) for id in range(256, tokenizer.vocab_size)], expected)


# ── bpe_encode ───────────────────────────────────────────────────────────────────────────────

# Ids and ranks that cannot be mistaken for each other.
A, B, C, D, AB, BC, CD, ABC, AA = 70, 71, 72, 73, 900, 910, 920, 930, 940


def encodes(bpe_encode, ids, merges, hint=None):
    """merges: (left, right, joined) in the order of learning."""
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(merges)}
    merged = [joined for _, _, joined in merges]

    def wrong(**options):
        return encode_loop(ids, ranks, merged, **options)

    expected = wrong()
    mistakes = {
        "the leftmost known pair was joined, not the one that was learned first":
            wrong(choose=lambda known: min(known, key=lambda each: each[1])),
        "the pair that was learned last was joined first":
            wrong(choose=lambda known: max(known, key=lambda each: (each[0], -each[1]))),
        "where the pair stands several times, the rightmost was joined first":
            wrong(choose=lambda known: min(known, key=lambda each: (each[0], -each[1]))),
        "only one pair was joined: go on until no neighbours are a known pair": wrong(limit=1),
        "nothing was joined": wrong(limit=0),
        "a rank is not an id: the token is merged[rank]": wrong(replace=lambda rank: rank),
        "the new id was computed from the rank: look it up, merged[rank]":
            wrong(replace=lambda rank: 256 + rank),
    }
    equal(bpe_encode(list(ids), ranks, merged), expected, hint,
          {symptom: each for symptom, each in mistakes.items() if each != expected})


@check("a known pair becomes its token")
def one_pair(bpe_encode):
    encodes(bpe_encode, [C, A, B, D], [(A, B, AB)])


@check("neighbours that are no known pair stay as they are")
def unknown(bpe_encode):
    encodes(bpe_encode, [B, A, C], [(A, B, AB)], "the pair (a, b) is not the pair (b, a)")


@check("of two pairs that overlap, the one that was learned first is joined")
def earliest(bpe_encode):
    encodes(bpe_encode, [A, B, C], [(A, B, AB), (B, C, BC)])
    encodes(bpe_encode, [A, B, C], [(B, C, BC), (A, B, AB)])


@check("a joined token is joined again")
def ladder(bpe_encode):
    encodes(bpe_encode, [A, B, C, A, B, C, D], [(A, B, AB), (AB, C, ABC)])
    encodes(bpe_encode, [A, B, C, D], [(C, D, CD), (A, B, AB), (AB, CD, ABC)])


@check("where a pair stands several times, it is joined from the left")
def from_the_left(bpe_encode):
    encodes(bpe_encode, [A, A, A, B, A, A, A, A], [(A, A, AA)])


@check("a word of one byte, or of none", hint=(
    "one byte has no neighbour, and min() of nothing raises: look whether there is a pair first"))
def short(bpe_encode):
    encodes(bpe_encode, [A], [(A, A, AA)])
    encodes(bpe_encode, [], [(A, A, AA)])
    encodes(bpe_encode, [A, B], [])


@check("random words and learned merges: the same tokens as the definition")
def random_merges(bpe_encode):
    draw = random.Random(3)
    for _ in range(6):
        words = ["".join(draw.choices("abcd", k=draw.randint(2, 9))) for _ in range(15)]
        tokens, merges = train_loop(Counter(words), 256 + 20)
        new_id = {id: id for id in range(256)} | dict(
            zip(range(256, len(tokens)), draw.sample(range(1000, 2000), len(tokens) - 256)))
        triples = [(new_id[left], new_id[right], new_id[256 + rank])
                   for rank, (left, right) in enumerate(merges)]
        word = "".join(draw.choices("abcd", k=20))
        encodes(bpe_encode, [BYTES_IN_ORDER.index(byte) for byte in word.encode()], triples)


@check("the tokenizer encodes a text with it, and decoding gives the text back")
def encode_in_the_tokenizer(bpe_encode):
    words = Counter(Pretokenizer("gpt-2").words(TEXT))
    tokens, merges = train_loop(words, 290)
    ranks, merged = {pair: rank for rank, pair in enumerate(merges)}, range(256, 290)
    text = "Shells she sells, 2 naïve sea lions; 貝\n"
    with using(bpe_encode=bpe_encode):
        tokenizer = Tokenizer(tokens, merges, Pretokenizer("gpt-2"))
        ids = tokenizer.encode(text)
    expected = []
    for word in Pretokenizer("gpt-2").words(text):
        expected += encode_loop([BYTES_IN_ORDER.index(byte) for byte in word.encode()],
                                ranks, merged)
    equal(ids, expected)
    equal(tokenizer.decode(ids), text)


@check("your tokenizer: trained by your bpe_train, encoding by your bpe_encode")
def both(bpe_train, bpe_encode):
    with using(bpe_train=bpe_train, bpe_encode=bpe_encode):
        tokenizer = Tokenizer.train(TEXT, vocab_size=300)
        ids = tokenizer.encode(TEXT)
    equal(tokenizer.decode(ids), TEXT)
    words = Counter(Pretokenizer("gpt-2").words(TEXT))
    tokens, merges = train_loop(words, 300)
    ranks, merged = {pair: rank for rank, pair in enumerate(merges)}, range(256, len(tokens))
    most = sum(count * len(encode_loop([BYTES_IN_ORDER.index(byte) for byte in word.encode()],
                                       ranks, merged)) for word, count in words.items())
    equal(len(ids), most, "the text has another number of tokens than the merges allow")
