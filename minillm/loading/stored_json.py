"""The configuration and the tokenizer of a model as JSON, and back, with every value checked.

The part of `quantized_file.py` that is no array. Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import dataclasses
from typing import get_type_hints

from ..config import ModelConfig, RopeScaling
from ..errors import InputError
from ..pretokenizer import AddedToken, Pretokenizer
from ..tokenizer import Tokenizer
from .tokenizer_files import BYTE_OF, unspell

LARGEST_SIZE = 2**31 - 1
WRITE_AGAIN = "write it again with minillm quantize"


def config_from_dict(values):
    """The inverse of dataclasses.asdict(config)."""
    if isinstance(values.get("rope_scaling"), dict):
        scaling = RopeScaling(**_checked_fields(RopeScaling, values["rope_scaling"]))
        if scaling.rope_type not in ("linear", "llama3"):
            raise InputError(f"rope_type is {scaling.rope_type!r:.40}, must be linear or llama3: "
                             f"{WRITE_AGAIN}")
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise InputError(f"high_freq_factor {scaling.high_freq_factor} must be greater than "
                             f"low_freq_factor {scaling.low_freq_factor}: {WRITE_AGAIN}")
        values = {**values, "rope_scaling": scaling}
    return ModelConfig(**_checked_fields(ModelConfig, values))


def _checked_fields(cls, values):
    """The values, if they are one for each field of the dataclass, and of its type."""
    hints = get_type_hints(cls)
    if values.keys() != hints.keys():
        odd = sorted(values.keys() ^ hints.keys())[0]
        raise InputError(f"{odd!r:.80} is {'unknown' if odd in values else 'missing'} in the "
                         f"configuration: {WRITE_AGAIN}")
    for name, kind in hints.items():
        value = values[name]
        is_number = type(value) in (int, float)
        in_range = not is_number or 1e-12 <= value <= LARGEST_SIZE  # NaN is not
        right_type = isinstance(value, kind) and type(value) is not bool or type(value) is kind
        if not in_range or not (right_type or is_number and kind is float):
            raise InputError(f"{name} is {value!r:.40} in the configuration, which a model cannot "
                             f"have: {WRITE_AGAIN}")
    return values


SPELLING = {byte: character for character, byte in BYTE_OF.items()}
TOKENIZER_FLAGS = {"family": str, "nfc": bool, "ignore_merges": bool, "add_bos_token": bool,
                   "bos_token_id": int | None, "eos_token_id": int | None}


def tokenizer_to_dict(tokenizer):
    """What makes the same Tokenizer again, in JSON's types. Tokens are spelled as in vocabularies,
    a visible character for each byte."""
    pretokenizer = tokenizer.pretokenizer
    return {
        "family": pretokenizer.family,
        "nfc": pretokenizer.nfc,
        "added_tokens": [dataclasses.asdict(token) for token in pretokenizer.added_tokens],
        "tokens": ["".join(SPELLING[byte] for byte in tokenizer.token_bytes(id))
                   for id in range(tokenizer.vocab_size)],
        "merges": tokenizer.merges,
        "ignore_merges": tokenizer.ignore_merges,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "add_bos_token": tokenizer.add_bos_token,
    }


def tokenizer_from_dict(values):
    """The inverse of tokenizer_to_dict.   Raises InputError for what is no tokenizer."""
    tokens = _checked_list(values, "tokens", lambda item: isinstance(item, str))

    def is_id(item):
        return type(item) is int and 0 <= item < len(tokens)

    def is_pair(item):
        return isinstance(item, list) and len(item) == 2 and is_id(item[0]) and is_id(item[1])

    def is_added(item):
        return (isinstance(item, dict) and item.keys() == get_type_hints(AddedToken).keys()
                and is_id(item["id"]) and isinstance(item["text"], str)
                and type(item["special"]) is bool and type(item["normalized"]) is bool)

    merges = [tuple(pair) for pair in _checked_list(values, "merges", is_pair)]
    added = [AddedToken(**item) for item in _checked_list(values, "added_tokens", is_added)]
    for key, kind in TOKENIZER_FLAGS.items():
        if not isinstance(values.get(key, ...), kind):
            raise InputError(f"{key} is {values.get(key)!r:.40} in the tokenizer: {WRITE_AGAIN}")
    flags = {key: values[key] for key in TOKENIZER_FLAGS}
    cut = Pretokenizer(flags.pop("family"), added, flags.pop("nfc"))
    return Tokenizer([unspell(token) for token in tokens], merges, cut, **flags)


def _checked_list(values, key, is_right):
    items = values.get(key)
    if not isinstance(items, list):
        raise InputError(f"{key} is {items!r:.40} in the tokenizer, must be a list: {WRITE_AGAIN}")
    for item in items:
        if not is_right(item):
            raise InputError(f"{key} holds {item!r:.80} in the tokenizer: {WRITE_AGAIN}")
    return items
