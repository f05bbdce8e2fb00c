r"""Where may a token end? Text is cut into words first, and byte pairs merge only inside one.

Without this step the most frequent pairs of a text are things like "e " and ", ", and tokens
straddle words. GPT-2 wrote the cut as one regular expression (Radford et al. 2019, released
`encoder.py`), and every family since has varied it. A model understands only text that is cut
the way it was in training:

    gpt-2      "I'll pay  $100"  ->  I|'ll| pay| | $|100
    smollm     the same, but every digit stands alone: 1|0|0
    llama-bpe  numbers fall into groups of up to three; line ends stick to punctuation before them
    qwen2      as llama-bpe, but every digit stands alone (and Qwen normalises text before)

Even before that, a text is cut at added tokens such as <|im_end|>, which no merge may touch.

Chapter 02_tokenizer tells the story. Left out on purpose: patterns that stand in files. A regular
expression from a stranger can take exponential time; files only *choose* from the table below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import regex

from .errors import InputError
from .unicode_versions import NEWER_THAN_UNICODE_16, normalize_nfc

# Rust's is_numeric, with which `tokenizers` isolates digits, is one version of Unicode ahead of
# the regular expressions there (see NEWER_THAN_UNICODE_16).
_DIGIT = r"[\p{N}\U00011DE0-\U00011DE9\U00016FF4-\U00016FF6]"
_LLAMA_BPE = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")

# The names are those of GGUF's `tokenizer.ggml.pre`. Mind `\s+(?!\S)`: of several spaces the last
# one is left to the word behind them.
FAMILIES = {
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # Digits are cut out before gpt-2's pattern sees the rest. Spaces before a digit therefore see
    # the end of the text and stay together, so here \S must not match one.
    "smollm": (rf"{_DIGIT}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?[^\s\p{{L}}{_DIGIT}]+|"
               rf"\s+(?![^\s{_DIGIT}])|\s+"),
    "llama-bpe": _LLAMA_BPE,
    "qwen2": _LLAMA_BPE.replace(r"\p{N}{1,3}", r"\p{N}"),
}


def compile_family(family: str) -> regex.Pattern:
    r"""The pattern whose `findall` cuts any text into pieces; nothing of the text is lost.

    >>> compile_family("gpt-2").findall("I'll pay  $100")
    ['I', "'ll", ' pay', ' ', ' $', '100']
    """
    if family not in FAMILIES:
        raise InputError(f"no pre-tokenizer {family!r}; there are {', '.join(FAMILIES)}")
    pattern = FAMILIES[family]
    for kind in (r"\p{L}", r"\p{N}"):
        pattern = pattern.replace(kind, f"[{kind}--[{NEWER_THAN_UNICODE_16}]]")
    return regex.compile(pattern, regex.VERSION1)  # version 1 of the syntax has set differences


def utf8(text: str) -> bytes:
    r"""The bytes of a text. Half of a surrogate pair, which has none, raises InputError.

    A str may hold one (json.loads('"\\ud83d"') returns one), although it is no character.
    """
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"text holds {text[error.start]!r}, half of a surrogate pair, which is no "
                         "character: send both halves or U+FFFD") from None


@dataclass(frozen=True)
class AddedToken:
    """A token that is looked for before the text is cut into words.

    A special one (<|im_end|>) steers the model, so it is recognised only where the caller says
    that the text may do that; any other (Qwen's <tool_call>) always. A `normalized` one is looked
    for after the text was normalised.
    """

    id: int
    text: str
    special: bool = True
    normalized: bool = False


class Pretokenizer:
    """Cuts text at added tokens, then into words.

    Raises InputError for an unknown family, and for added tokens that are empty or alike.
    """

    def __init__(self, family: str, added_tokens: Iterable[AddedToken] = (), nfc: bool = False):
        self.family, self.nfc = family, nfc
        self.added_tokens = tuple(added_tokens)
        self._family_pattern = compile_family(family)
        self._normalize = normalize_nfc if nfc else str
        self._added: dict[str, AddedToken] = {}
        self._added_normalized: dict[str, AddedToken] = {}
        for token in self.added_tokens:
            text = self._normalize(token.text) if token.normalized else token.text
            known = self._added_normalized if token.normalized else self._added
            if not text or text in known:
                problem = f"is spelled as {known[text].id} is" if text else "is empty"
                raise InputError(f"added token {token.id}, {token.text!r}, {problem}")
            known[text] = token
        self._added_pattern = _any_of(self._added)
        self._added_normalized_pattern = _any_of(self._added_normalized)

    def words(self, text: str) -> list[str]:
        """The words of a text that is looked through for no added tokens."""
        utf8(text)
        return self._family_pattern.findall(text)

    def split_added(self, text: str, allow_special: bool) -> list[str | int]:
        """The ids of the added tokens in a text, and the normalised text between them."""
        parts: list[str | int] = []
        for part in _split(text, self._added_pattern, self._added, allow_special):
            if isinstance(part, int):
                parts.append(part)
            else:
                parts += _split(self._normalize(part), self._added_normalized_pattern,
                                self._added_normalized, allow_special)
        return parts


def _any_of(texts: Iterable[str]) -> regex.Pattern:
    """Matches any of the texts, the longest where several begin; nothing if there are none."""
    longest_first = sorted(texts, key=len, reverse=True)
    return regex.compile("|".join(map(regex.escape, longest_first)) or "(?!)")


def _split(text: str, pattern: regex.Pattern, tokens: dict[str, AddedToken],
           allow_special: bool) -> list[str | int]:
    parts: list[str | int] = []
    end = 0
    for match in pattern.finditer(text):
        token = tokens[match[0]]
        if token.special and not allow_special:
            continue  # it is text like any other, and stays one piece with its surroundings
        if match.start() > end:
            parts.append(text[end : match.start()])
        parts.append(token.id)
        end = match.end()
    if end < len(text):
        parts.append(text[end:])
    return parts
