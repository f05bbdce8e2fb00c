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

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import regex

from .errors import InputError

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

# The `regex` module knows letters and numbers that `tokenizers`, at Unicode 16, does not.
NEWER_THAN_UNICODE_16 = (
    r"\u0558\u058B-\u058C\u088F\u0C5C\u0CDC\u208F\u209D-\u209F\uA7CE-\uA7CF\uA7D2\uA7D4"
    r"\uA7DD-\uA7F1\uAB6C-\uAB6D\U000107BB-\U000107BF\U00010940-\U00010959"
    r"\U00010EC5-\U00010EEE\U00011B0A\U00011DB0-\U00011DF1\U0001246F-\U0001247F"
    r"\U00012550-\U00012686\U00016EA0-\U00016ED3\U00016FF2-\U00016FF6\U000187F8-\U000187FF"
    r"\U00018CD6-\U00018CDA\U00018D09-\U000191D2\U0001B123-\U0001B128\U0001B168\U0001D6A6"
    r"\U0001DF1F-\U0001DF24\U0001DF2B-\U0001DFFF\U0001E6C0-\U0001E6FF\U0002B73A-\U0002B73F"
    r"\U0002B81E\U0002CEA2-\U0002CEAD\U000323B0-\U0003FC3F"
)


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


# `tokenizers` normalises by Unicode 9: combining marks and compositions that are younger stand as
# they are there. (Between two of them these ranges also hold characters that never combine.)
_NOT_NEWER_THAN_UNICODE_9 = regex.compile(
    r"[^\u05C8-\u05C9\u07FD\u0897-\u08D3\u09FE\u0C3C\u0D3B-\u0D3C\u0EBA\u1715\u1ABF-\u1AF0"
    r"\u1DF6-\u1DFA\uA82C\U000105D2-\U000105DA\U00010D24-\U00010F85\U00011070\U0001133B"
    r"\U00011382-\U000113D0\U0001145E\U00011839-\U00011A99\U00011D42-\U0001612F"
    r"\U00016D63-\U00016FF1\U0001D127-\U0001D128\U0001D250-\U0001D281\U0001E08F-\U0001E6F5]+"
)
# U+0F73, 0F75 and 0F81 count as base characters, although each is made of two marks.
_LONG_RUN_OF_MARKS = regex.compile(r"[\P{ccc=0}\u0F73\u0F75\u0F81]{64,}")


def normalize_nfc(text: str) -> str:
    """One spelling for what looks the same: "e" and an acute accent become "é" (form NFC, UAX 15).

    The order of the marks on a letter is a stable sort by combining class, for which Python takes
    quadratic time: long runs of marks are handed to it sorted.
    """
    def normalize(run: regex.Match) -> str:
        return unicodedata.normalize("NFC", _LONG_RUN_OF_MARKS.sub(_sort_marks, run[0]))

    return _NOT_NEWER_THAN_UNICODE_9.sub(normalize, text)


def _sort_marks(run: regex.Match) -> str:
    marks = "".join(unicodedata.normalize("NFD", mark) for mark in run[0])
    return "".join(sorted(marks, key=unicodedata.combining))


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
