"""What stands in a file about a tokenizer?  GGUF metadata and Hugging Face's tokenizer.json.

Both spell tokens in an alphabet of 256 visible characters, one a byte, that GPT-2 invented so
that a vocabulary could be stored as text: a space is "Ġ", a line end "Ċ", and "é", two bytes in
UTF-8, is "Ã©". This module reads that spelling once, and everything behind it works on bytes.

Chapter 02_tokenizer tells the story. Whatever would change the ids and is not supported (another
kind of model, normaliser or pre-tokenizer, added tokens that swallow spaces, ...) is refused by
name. Left out on purpose: truncation and padding, which belong to whoever makes batches.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..pretokenizer import FAMILIES, AddedToken, Pretokenizer
from ..tokenizer import BYTES_IN_ORDER, PRINTABLE_BYTES, Pair, Tokenizer

# Bytes that print stand for themselves, the others for U+0100 and up, in order.
BYTE_OF = {chr(byte) if i < len(PRINTABLE_BYTES) else chr(256 + i - len(PRINTABLE_BYTES)): byte
           for i, byte in enumerate(BYTES_IN_ORDER)}


def unspell(token: str) -> bytes:
    """The bytes of a token of the vocabulary.

    >>> unspell("Ġcaf"), unspell("Ã©").decode("utf-8")
    (b' caf', 'é')
    """
    try:
        return bytes([BYTE_OF[character] for character in token])
    except KeyError as error:
        raise InputError(f"token {token!r} holds {error.args[0]!r}, which stands for no byte: "
                         "only byte-level BPE is supported") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"added token {text!r} holds half of a surrogate pair") from None


def _read_merges(merges: list[str] | list[list[str]], id_of: dict[str, int]) -> list[Pair]:
    """Merges as pairs of ids. Files write "a b" or, since tokens may hold spaces, ["a", "b"]."""
    pairs = []
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        try:
            left, right = parts
            pairs.append((id_of[left], id_of[right]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"merge {len(pairs)} is {merge!r}, must be two tokens of the "
                             "vocabulary") from None
    return pairs


# ---- GGUF ------------------------------------------------------------------------------------

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def tokenizer_from_gguf(metadata: dict) -> Tokenizer:
    """See Tokenizer.from_gguf. The keys are those of the GGUF specification.

    A GGUF file does not say that Qwen's text is brought to NFC (llama.cpp does not do it), but
    the model was trained on such text, and its tokenizer.json says so.
    """
    model = _gguf_value(metadata, "model", str)
    if model != "gpt2":
        raise InputError(f"tokenizer.ggml.model is {model!r}; only 'gpt2' (byte-level BPE) is "
                         "supported")
    family = _gguf_value(metadata, "pre", str)
    if family not in FAMILIES:
        raise InputError(f"tokenizer.ggml.pre is {family!r}; supported: {', '.join(FAMILIES)}")
    if _gguf_value(metadata, "add_eos_token", bool, False):
        raise InputError("tokenizer.ggml.add_eos_token is set; EOS after a prompt is not supported")

    spellings = _gguf_value(metadata, "tokens", list, of=str)
    types = _gguf_value(metadata, "token_type", list, of=int)
    if len(spellings) != len(types):
        raise InputError(f"tokenizer.ggml.tokens has {len(spellings)} entries, token_type "
                         f"{len(types)}: there must be one type for each token")
    id_of = dict(zip(spellings, range(len(spellings)), strict=True))
    if len(id_of) < len(spellings):
        twice = next(text for id, text in enumerate(spellings) if id_of[text] != id)
        raise InputError(f"tokenizer.ggml.tokens holds {twice!r} twice")

    tokens, added = [], []
    for id, (text, kind) in enumerate(zip(spellings, types, strict=True)):
        if kind == NORMAL or kind == UNUSED:
            tokens.append(unspell(text))
        elif kind == CONTROL or kind == USER_DEFINED:
            tokens.append(_utf8(text))
            added.append(AddedToken(id, text, special=kind == CONTROL))
        else:
            raise InputError(f"token {id}, {text!r}, is of type {kind}; byte-level BPE has 1, 3, 4 "
                             "and 5")
    return Tokenizer(
        tokens, _read_merges(_gguf_value(metadata, "merges", list, of=str), id_of),
        Pretokenizer(family, added, nfc=family == "qwen2"),
        ignore_merges=family == "llama-bpe",
        bos_token_id=_gguf_value(metadata, "bos_token_id", int, None),
        eos_token_id=_gguf_value(metadata, "eos_token_id", int, None),
        add_bos_token=_gguf_value(metadata, "add_bos_token", bool, family == "llama-bpe"),
    )


_REQUIRED = object()


def _gguf_value(metadata: dict, key: str, kind: type, default=_REQUIRED, of: type | None = None):
    key = f"tokenizer.ggml.{key}"
    if key not in metadata:
        if default is _REQUIRED:
            raise InputError(f"the GGUF file has no {key}: it holds no tokenizer to read")
        return default
    return _checked(metadata[key], key, kind, of)


def _checked(value, name: str, kind: type, of: type | None = None):
    """The value, if it is of a kind (and all its members `of` a kind)."""
    if type(value) is not kind:
        raise InputError(f"{name} is {_short(value)}, must be of type {kind.__name__}")
    if of is not None:
        members = value.values() if kind is dict else value
        wrong = next((member for member in members if type(member) is not of), None)
        if wrong is not None:
            raise InputError(f"{name} holds {_short(wrong)}, must hold only {of.__name__}")
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- tokenizer.json --------------------------------------------------------------------------


def tokenizer_from_json(source: str | Path | dict) -> Tokenizer:
    """See Tokenizer.from_tokenizer_json."""
    if isinstance(source, dict):
        return _build(source, config={})
    path = Path(source)
    config_path = path.with_name("tokenizer_config.json")
    config = _read_json(config_path) if config_path.exists() else {}
    try:
        return _build(_read_json(path), config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        return _checked(json.loads(path.read_bytes()), path.name, dict)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _build(data: dict, config: dict) -> Tokenizer:
    model = _model(data)
    id_of = _checked(model.get("vocab"), "model.vocab", dict, of=int)
    added = [_added_token(entry) for entry in
             _checked(data.get("added_tokens") or [], "added_tokens", list, of=dict)]
    bos_token_id = _template_bos(data.get("post_processor"))
    all_ids = {**{token.text: token.id for token in added}, **id_of}
    config_bos_id = _named_token(config, "bos_token", all_ids)
    if None not in (bos_token_id, config_bos_id) and bos_token_id != config_bos_id:
        raise InputError(f"post_processor begins a text with token {bos_token_id}, but bos_token "
                         f"of tokenizer_config.json is token {config_bos_id}: make them agree")
    return Tokenizer(
        _tokens(id_of, added),
        _read_merges(_checked(model.get("merges"), "model.merges", list), id_of),
        Pretokenizer(_family(data.get("pre_tokenizer")), added,
                     nfc=_is_nfc(data.get("normalizer"))),
        ignore_merges=bool(model.get("ignore_merges")),
        unknown_token_id=_unknown_token(model, id_of),
        bos_token_id=config_bos_id if bos_token_id is None else bos_token_id,
        eos_token_id=_named_token(config, "eos_token", all_ids),
        add_bos_token=bos_token_id is not None,
    )


def _model(data: dict) -> dict:
    """The part with vocabulary and merges, if nothing in it or behind it changes what they mean."""
    model = _checked(data.get("model"), "model", dict)
    harmless = {"type": (None, "BPE"), "dropout": (None, 0), "byte_fallback": (None, False),
                "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    for key, values in harmless.items():
        if model.get(key) not in values:
            raise InputError(f"model.{key} is {_short(model[key])}; only {values[-1]!r} is "
                             "supported")
    decoder = data.get("decoder")
    if decoder is not None and _checked(decoder, "decoder", dict).get("type") != "ByteLevel":
        raise InputError(f"decoder is {_short(decoder)}; only ByteLevel is supported")
    return model


def _added_token(entry: dict) -> AddedToken:
    text = _checked(entry.get("content"), "added_tokens: content", str)
    for flag in ("single_word", "lstrip", "rstrip"):
        if entry.get(flag):
            raise InputError(f"added token {text!r} sets {flag}, which is not supported")
    return AddedToken(_checked(entry.get("id"), f"id of added token {text!r}", int), text,
                      special=bool(entry.get("special")), normalized=bool(entry.get("normalized")))


def _tokens(id_of: dict[str, int], added: list[AddedToken]) -> list[bytes]:
    """The bytes of every id. Ids must run from 0 to the last without a gap."""
    beside = [token for token in added if id_of.get(token.text) != token.id]
    added_texts = {token.text for token in added}
    entries = [(text, id, text not in added_texts or BYTE_OF.keys() >= set(text))
               for text, id in id_of.items()]
    entries += [(token.text, token.id, False) for token in beside]

    tokens: list[bytes | None] = [None] * len(entries)
    for text, id, is_spelled in entries:
        if not 0 <= id < len(tokens):
            raise InputError(f"token {_short(text)} has id {id}: the {len(tokens)} tokens must "
                             f"have the ids 0 to {len(tokens) - 1}")
        if tokens[id] is not None:
            raise InputError(f"token {_short(text)} has id {id}, as {tokens[id]!r} has")
        tokens[id] = unspell(text) if is_spelled else _utf8(text)
    return tokens


def _unknown_token(model: dict, id_of: dict[str, int]) -> int | None:
    """What the file wants in the place of a byte that no token spells, if it lacks any."""
    unknown = model.get("unk_token") or None
    if unknown is None or BYTE_OF.keys() <= id_of.keys():
        return None
    if model.get("fuse_unk") or _checked(unknown, "model.unk_token", str) not in id_of:
        raise InputError(f"model.unk_token {_short(unknown)} stands for bytes without a token; "
                         "that works only if it is in model.vocab, and without fuse_unk")
    return id_of[unknown]


def _named_token(config: dict, key: str, ids: dict[str, int]) -> int | None:
    """The id of a token that tokenizer_config.json names, as a string or an object."""
    name = config.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        return None
    if _checked(name, f"{key} of tokenizer_config.json", str) not in ids:
        raise InputError(f"{key} of tokenizer_config.json is {_short(name)}, which is no token")
    return ids[name]


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# How files write each family. ByteLevel by itself cuts with GPT-2's pattern.
_FAMILY_STEPS = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    **{family: [{"type": "Split", "pattern": {"Regex": FAMILIES[family]},
                 "behavior": "Isolated", "invert": False},
                {**_BYTE_LEVEL, "use_regex": False}] for family in ("llama-bpe", "qwen2")},
}


def _family(pre_tokenizer: dict | None) -> str:
    steps = []
    for step in _steps(pre_tokenizer, "pre_tokenizer", "pretokenizers"):
        step = {key: value for key, value in step.items() if key != "trim_offsets"}
        steps.append({"use_regex": True, **step} if step.get("type") == "ByteLevel" else step)
    for family, known_steps in _FAMILY_STEPS.items():
        if steps == known_steps:
            return family
    raise InputError(f"pre_tokenizer {_short(pre_tokenizer)} is not supported; supported are "
                     f"those of {', '.join(FAMILIES)}")


def _is_nfc(normalizer: dict | None) -> bool:
    steps = _steps(normalizer, "normalizer", "normalizers")
    if any(step != {"type": "NFC"} for step in steps):
        raise InputError(f"normalizer {_short(normalizer)} is not supported; only NFC is")
    return bool(steps)


def _template_bos(post_processor: dict | None) -> int | None:
    """The token that a post-processor puts before a text; no other addition is supported."""
    bos_token_id = None
    for step in _steps(post_processor, "post_processor", "processors"):
        if step.get("type") == "ByteLevel":
            continue  # it adjusts offsets into the text, not ids
        match step:
            case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
                continue
            case {"type": "TemplateProcessing", "special_tokens": dict(special_tokens),
                  "single": [{"SpecialToken": {"id": str(name)}}, {"Sequence": {"id": "A"}}]}:
                match special_tokens.get(name):
                    case {"ids": [int(bos_token_id)]}:
                        continue
        raise InputError(f"post_processor {_short(step)} is not supported; only a "
                         "TemplateProcessing that puts one token before a text is")
    return bos_token_id


def _steps(step: dict | None, name: str, members: str) -> list[dict]:
    """A step, or those of a Sequence, or none."""
    if step is None:
        return []
    if _checked(step, name, dict).get("type") == "Sequence":
        return _checked(step.get(members), f"{name}.{members}", list, of=dict)
    return [step]
