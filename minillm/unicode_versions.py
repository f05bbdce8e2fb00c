"""What is a letter? It depends on the version of Unicode, and so do a text's tokens.

A tokenizer gives the ids that its model was trained on only if it cuts text as the library
`tokenizers` does, which knows Unicode 16 in its regular expressions and Unicode 9 in its
normalisation. Both tables matter for a few rare characters; a first reading can skip this file.
"""

from __future__ import annotations

import unicodedata

import regex

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
