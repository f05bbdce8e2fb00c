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
from .pretokenizer import AddedToken, Pretokenizer

# Single bytes get their ids in GPT-2's order: first those that print as a visible character.
PRINTABLE_BYTES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES_IN_ORDER = [*PRINTABLE_BYTES, *sorted({*range(256)} - {*PRINTABLE_BYTES})]

LONG_PIECE = 64  # tokens; about where the heap overtakes the plain loop
MAX_CACHED_PIECES = 65_536

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

    tokens: the bytes of every id.  merges: pairs of ids, the earliest learned first.
    ignore_merges: a word that is a token is never built from pairs (Llama 3).
    unknown_token_id: stands for a byte that no token spells; None: such a byte is dropped
    (SmolLM2 knows no U+0004, for example).
    add_bos_token: whether a prompt should begin with bos_token_id; encode() never adds it.
    Raises InputError where the parts do not fit together.
    """

    def __init__(self, tokens: list[bytes], merges: list[Pair], pretokenizer: Pretokenizer, *,
                 ignore_merges: bool = False, unknown_token_id: int | None = None,
                 bos_token_id: int | None = None, eos_token_id: int | None = None,
                 add_bos_token: bool = False):
        for name, id in (("bos_token_id", bos_token_id), ("eos_token_id", eos_token_id)):
            if id is not None and not 0 <= id < len(tokens):
                raise InputError(f"{name} is {id}, must be from 0 to {len(tokens) - 1}")
        if add_bos_token and bos_token_id is None:
            raise InputError("prompts must begin with a BOS token, but bos_token_id is not given")
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.add_bos_token = add_bos_token

        added = pretokenizer.added_tokens
        self.special_tokens = {token.text: token.id for token in added if token.special}
        self._special_ids = frozenset(self.special_tokens.values())
        self._pretokenizer = pretokenizer
        self._tokens = tokens

        added_ids = {token.id for token in added}
        self._whole_words = {} if not ignore_merges else {
            token: id for id, token in enumerate(tokens) if id not in added_ids}
        id_of = {token: id for id, token in enumerate(tokens)}
        self._byte_ids = [id_of.get(bytes([byte]), unknown_token_id) for byte in range(256)]
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
        for part in self._pretokenizer.split_added(text, allow_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                for word in self._pretokenizer.words(part):
                    ids += self._encode_word(word)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """The ids of the special (and other added) tokens in a text, and the text between them.

        For callers that trust a part of a text, such as a chat template but not the messages.
        """
        return self._pretokenizer.split_added(text, allow_special=True)

    def _encode_word(self, word: str) -> list[int]:
        ids = self._cache.get(word)
        if ids is None:
            ids = self._merge(word.encode("utf-8"))
            if len(word) < LONG_PIECE:
                if len(self._cache) == MAX_CACHED_PIECES:
                    self._cache.clear()
                self._cache[word] = ids
        return ids

    def _merge(self, word: bytes) -> list[int]:
        if word in self._whole_words:
            return [self._whole_words[word]]
        ids = [id for byte in word if (id := self._byte_ids[byte]) is not None]
        merge = merge_pairs if len(ids) < LONG_PIECE else merge_pairs_fast
        return merge(ids, self._ranks, self._merged)

    def token_bytes(self, id: int) -> bytes:
        """What a token stands for: often a part of a word, sometimes a part of a character.

        Raises InputError for an id that is not in the vocabulary.
        """
        if not 0 <= id < len(self._tokens):
            raise InputError(f"token id {id} is not in the vocabulary, 0 to {self.vocab_size - 1}")
        return self._tokens[id]

    def decode(self, ids: Iterable[int], skip_special: bool = False) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD, as a model may produce any."""
        skipped = self._special_ids if skip_special else ()
        data = b"".join(self.token_bytes(id) for id in ids if id not in skipped)
        return data.decode("utf-8", errors="replace")

    @classmethod
    def train(cls, texts: str | Iterable[str], vocab_size: int, *, family: str = "gpt-2",
              special_tokens: Sequence[str] = ()) -> Tokenizer:
        """Learn a vocabulary: 256 bytes, then merges, and the special tokens at its end.

        The merges equal those of `tokenizers`' BpeTrainer, which puts special tokens first. The
        vocabulary is smaller than vocab_size if the texts have no more pairs to merge.
        """
        num_tokens = vocab_size - len(special_tokens)
        if num_tokens < 256:
            raise InputError(f"vocab_size {vocab_size} is too small: 256 bytes and "
                             f"{len(special_tokens)} special tokens need their ids")
        cut = Pretokenizer(family).words
        texts = [texts] if isinstance(texts, str) else texts
        words = Counter(word for text in texts for word in cut(text))
        tokens, merges = train_bpe(words, num_tokens)
        added = [AddedToken(len(tokens) + i, text) for i, text in enumerate(special_tokens)]
        tokens += [token.text.encode("utf-8") for token in added]
        return cls(tokens, merges, Pretokenizer(family, added))

    # Files are read in loading/, which needs this class: hence the imports inside.

    @classmethod
    def from_gguf(cls, metadata: dict) -> Tokenizer:
        """The tokenizer of a GGUF file, from its metadata {"tokenizer.ggml.model": "gpt2", ...}."""
        from .loading.tokenizer_files import tokenizer_from_gguf
        return tokenizer_from_gguf(metadata)

    @classmethod
    def from_tokenizer_json(cls, source: str | Path | dict) -> Tokenizer:
        """From Hugging Face's tokenizer.json, or what it contains as a dict.

        Beside a file, tokenizer_config.json is read for the BOS and EOS tokens if it is there.
        """
        from .loading.tokenizer_files import tokenizer_from_json
        return tokenizer_from_json(source)


class IncrementalDecoder:
    """decode() for streaming: feed(id) returns the text that is certain by now, flush() the rest.

    A character may be spread over several tokens; its text comes with the last of them. The
    pieces join to exactly decode(ids, skip_special).
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True):
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_tokens.values() if skip_special else ()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, id: int) -> str:
        if id in self._skipped:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """An unfinished character at the end, as U+FFFD; then the decoder is as new."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest
