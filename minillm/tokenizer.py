r"""How does text become the integers that a model reads, and back?  Byte-level BPE.

Start from the 256 bytes, so that any text can be written. *Train*: join the most frequent pair
of neighbouring tokens into a new token, and again, until the vocabulary is full; the order in
which pairs were joined, the merges, is all that training learns. *Encode*: replay the merges on
new text, the earliest learned first. *Decode*: put the bytes of the tokens side by side.
(Sennrich et al. 2016, algorithm 1; over bytes instead of characters: GPT-2, Radford et al. 2019)

    >>> tokenizer = Tokenizer.train("low low low lower lowest", vocab_size=256 + 4)
    >>> [tokenizer.token_bytes(id) for id in range(256, 260)]          # what it learned, in order
    [b'lo', b'low', b' low', b' lowe']
    >>> ids = tokenizer.encode("low lowered")
    >>> [tokenizer.token_bytes(id) for id in ids]
    [b'low', b' lowe', b'r', b'e', b'd']
    >>> tokenizer.decode(ids)
    'low lowered'

Chapter 02_tokenizer tells the story, and `pretokenizer.py` the part before it: pairs merge only
inside a word. Left out on purpose: unigram and WordPiece models, BPE over characters, dropout.
"""

from __future__ import annotations

import codecs
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import inf
from pathlib import Path

from .errors import InputError
from .pretokenizer import AddedToken, Pretokenizer, utf8

# Single bytes get their ids in GPT-2's order: first those that print as a visible character.
PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_IN_ORDER = [*PRINTABLE_BYTES, *sorted({*range(256)} - {*PRINTABLE_BYTES})]

MAX_CACHED_WORDS = 65_536
MAX_CACHED_CHARACTERS = 64  # of one word

Pair = tuple[int, int]


# ---- train -----------------------------------------------------------------------------------


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


def train_bpe(words: Counter[str], num_tokens: int) -> tuple[list[bytes], list[Pair]]:
    """Learn merges from words and how often each occurs, until there are num_tokens tokens.

    Among equally frequent pairs the one with the smaller ids goes first. Fewer tokens come out if
    every word is a single token before that. A merge costs the words that contain its pair, not
    the whole text: the counts are kept up to date instead of counted again.

    >>> tokens, merges = train_bpe(Counter({"aab": 3, "ab": 2}), num_tokens=258)
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


# ---- encode one word -------------------------------------------------------------------------


def merge_pairs(ids: Sequence[int], ranks: dict[Pair, int], merged: Sequence[int]) -> list[int]:
    """BPE itself: join the pair that was learned first, until no neighbours are a known pair.

    ranks[a, b] says how early the pair was learned, merged[rank] is the token it became.

    >>> merge_pairs([0, 1, 0, 1, 2], ranks={(0, 1): 0, (3, 2): 1}, merged=[3, 4])
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


def merge_pairs_fast(ids: Sequence[int], ranks: dict[Pair, int],
                     merged: Sequence[int]) -> list[int]:
    """Same contract as merge_pairs, in O(n log n) instead of O(n²).

    merge_pairs looks at all n pairs again before each of its merges, although a merge changes
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


# ---- the tokenizer ---------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back: the same ids as the library `tokenizers` for the same files.

    tokens: the bytes of every id; a byte that none of them spells is dropped from a text, as
    `tokenizers` does (SmolLM2 has no U+0004).  merges: pairs of ids, the earliest learned first.
    ignore_merges: a word that is a token is never built from pairs (Llama 3).
    add_bos_token: a prompt should begin with bos_token_id; encode() itself never adds it.
    Raises InputError where the parts do not fit together.
    """

    def __init__(self, tokens: list[bytes], merges: list[Pair], pretokenizer: Pretokenizer, *,
                 ignore_merges: bool = False, bos_token_id: int | None = None,
                 eos_token_id: int | None = None, add_bos_token: bool = False):
        for name, id in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)):
            if id is not None and not 0 <= id < len(tokens):
                raise InputError(f"{name} is {id}, must be from 0 to {len(tokens) - 1}")
        if add_bos_token and bos_token_id is None:
            raise InputError("prompts must begin with a BOS token, but bos_token_id is not given")
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.add_bos_token = add_bos_token
        self.pretokenizer = pretokenizer
        self.special_tokens = {
            token.text: token.id for token in pretokenizer.added_tokens if token.special}

        added_ids = {token.id for token in pretokenizer.added_tokens}
        learned = {token: id for id, token in enumerate(tokens) if id not in added_ids}
        id_of = {tokens[id]: id for id in added_ids} | learned
        self._tokens = tokens
        self._byte_ids = [id_of.get(bytes([byte])) for byte in range(256)]
        self._whole_words = learned if ignore_merges else {}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        try:
            self._merged = [id_of[tokens[left] + tokens[right]] for left, right in merges]
        except KeyError as error:
            raise InputError(f"a merge makes {error.args[0]!r}, which is no token") from None
        self._cache: dict[str, list[int]] = {}

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """The ids of a text. "<|im_end|>" in it is plain text, unless allow_special is set.

        Raises InputError for half of a surrogate pair, which is no text.
        """
        ids: list[int] = []
        for part in self.pretokenizer.split_added(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self.pretokenizer.words(part):
                    ids += self._encode_word(word)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """The ids of the special (and other added) tokens in a text, and the text between them.

        For callers that trust a part of a text, such as a chat template but not the messages.
        """
        return self.pretokenizer.split_added(text, allow_special=True)

    def _encode_word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            data = utf8(word)
            if data in self._whole_words:
                ids = [self._whole_words[data]]
            else:
                known = [id for byte in data if (id := self._byte_ids[byte]) is not None]
                ids = merge_pairs_fast(known, self._ranks, self._merged)
            if len(word) <= MAX_CACHED_CHARACTERS:
                if len(self._cache) >= MAX_CACHED_WORDS:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for: often a part of a word, sometimes a part of a character.

        Raises InputError for an id that is not in the vocabulary.
        """
        if not 0 <= id < len(self._tokens):
            raise InputError(f"token id {id} is not in the vocabulary, 0 to {self.vocab_size - 1}")
        return self._tokens[id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids. A model may produce any bytes: those that are no UTF-8 become U+FFFD."""
        skipped = self.special_tokens.values() if skip_special else ()
        data = b"".join(self.token_bytes(id) for id in ids if id not in skipped)
        return data.decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, *, family: str = "gpt-2",
              special_tokens: Sequence[str] = ()) -> Tokenizer:
        """Learn a vocabulary: 256 bytes, then merges, then the special tokens.

        The merges equal those of `tokenizers`' BpeTrainer, which puts special tokens first. The
        vocabulary stays smaller than vocab_size if the texts have no more pairs to merge.
        """
        num_tokens = vocab_size - len(special_tokens)
        if num_tokens < 256:
            raise InputError(f"vocab_size is {vocab_size}, must be at least 256 for the bytes and "
                             f"{len(special_tokens)} for the special tokens")
        cut = Pretokenizer(family).words
        texts = [texts] if isinstance(texts, str) else texts
        tokens, merges = train_bpe(Counter(word for text in texts for word in cut(text)),
                                   num_tokens)
        added = [AddedToken(len(tokens) + i, text) for i, text in enumerate(special_tokens)]
        tokens += [utf8(token.text) for token in added]
        return cls(tokens, merges, Pretokenizer(family, added))

    # The readers of files build on this module, so it cannot import them before it is complete.

    @classmethod
    def from_gguf(cls, metadata: dict) -> Tokenizer:
        """The tokenizer of a GGUF file, from its metadata {"tokenizer.ggml.model": "gpt2", ...}."""
        from .loading.tokenizer_files import tokenizer_from_gguf

        return tokenizer_from_gguf(metadata)

    @classmethod
    def from_tokenizer_json(cls, source: str | Path | dict) -> Tokenizer:
        """From Hugging Face's tokenizer.json, given as a path or as what it contains.

        Beside a file, tokenizer_config.json names the BOS and EOS tokens, if it is there.
        """
        from .loading.tokenizer_files import tokenizer_from_json

        return tokenizer_from_json(source)


class IncrementalDecoder:
    """decode() for streaming: feed(id) returns the text that is certain by now, flush() the rest.

    The bytes of a character may come in several tokens; it appears with the last of them. The
    pieces join to exactly decode(ids, skip_special).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._token_bytes = tokenizer.token_bytes
        self._skipped = tokenizer.special_tokens.values() if skip_special else ()
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def feed(self, id: int) -> str:
        return "" if id in self._skipped else self._decode(self._token_bytes(id))

    def flush(self) -> str:
        """U+FFFD for a character that stayed unfinished; afterwards the decoder is as new."""
        return self._decode(b"", final=True)
