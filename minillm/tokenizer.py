r"""How does text become the integers that a model reads, and back?  Byte-level BPE.

*Encode*: cut the text into words (`pretokenizer.py`), and each word's bytes into tokens
(`bpe.py`). *Decode*: put the bytes of the tokens side by side.

    >>> tokenizer = Tokenizer.train("low low low lower lowest", vocab_size=256 + 4)
    >>> [tokenizer.token_bytes(id) for id in range(256, 260)]          # what it learned, in order
    [b'lo', b'low', b' low', b' lowe']
    >>> ids = tokenizer.encode("low lowered")
    >>> [tokenizer.token_bytes(id) for id in ids]
    [b'low', b' lowe', b'r', b'e', b'd']
    >>> tokenizer.decode(ids)
    'low lowered'

Chapter 02_tokenizer tells the story.
"""

from __future__ import annotations

import codecs
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from .bpe import Pair, bpe_encode_fast, bpe_train
from .errors import InputError
from .pretokenizer import AddedToken, Pretokenizer, utf8

MAX_CACHED_WORDS = 65_536
MAX_CACHED_CHARACTERS = 64  # of one word


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
        self.merges, self.ignore_merges = merges, ignore_merges
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

        Added tokens that are not special are recognised in any case, as in `tokenizers`.
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
                ids = bpe_encode_fast(known, self._ranks, self._merged)
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
        skipped = frozenset(self.special_tokens.values() if skip_special else ())
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
        tokens, merges = bpe_train(Counter(word for text in texts for word in cut(text)),
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
        self._skipped = frozenset(tokenizer.special_tokens.values() if skip_special else ())
        self._decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def feed(self, id: int) -> str:
        return "" if id in self._skipped else self._decode(self._token_bytes(id))

    def flush(self) -> str:
        """U+FFFD for a character that stayed unfinished; afterwards the decoder is as new."""
        return self._decode(b"", final=True)
