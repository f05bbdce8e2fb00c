"""What does a file say about a tokenizer?  GGUF metadata and Hugging Face's tokenizer.json.

Both spell tokens in an alphabet of 256 visible characters, one a byte, that GPT-2 invented so
that a vocabulary could be stored as text: a space is "Ġ", a line end "Ċ", and "é", two bytes in
UTF-8, is "Ã©". This module reads that spelling once; everything behind it works on bytes.

Chapter 02_tokenizer tells the story. Whatever would change the ids and is not supported (another
kind of model, normaliser or pre-tokenizer, added tokens that swallow spaces, ...) is refused by
name. Left out on purpose: truncation and padding, which belong to whoever makes batches.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError
from ..pretokenizer import FAMILIES, AddedToken, Pretokenizer, utf8
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
        raise InputError(f"token {_short(token)} holds {error.args[0]!r}, which stands for no "
                         "byte; only byte-level BPE is supported") from None


def _read_merges(merges: list, id_of: dict[str, int]) -> list[Pair]:
    """Merges as pairs of ids. Files write "a b" or, since tokens may hold spaces, ["a", "b"]."""
    pairs = []
    for merge in merges:
        try:
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            pairs.append((id_of[left], id_of[right]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"merge {len(pairs)} is {_short(merge)}, must be two tokens of the "
                             "vocabulary") from None
    return pairs


def _checked(value, name: str, kind: type, of: type | None = None):
    """The value, if it is of a kind, and all its members `of` a kind."""
    if type(value) is not kind:
        raise InputError(f"{name} is {_short(value)}, must be of type {kind.__name__}")
    members = () if of is None else value.values() if kind is dict else value
    wrong = next((member for member in members if type(member) is not of), None)
    if wrong is not None:
        raise InputError(f"{name} holds {_short(wrong)}, must hold {of.__name__} only")
    return value


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


# ---- GGUF ------------------------------------------------------------------------------------

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


def tokenizer_from_gguf(metadata: dict) -> Tokenizer:
    """See Tokenizer.from_gguf. The keys are those of the GGUF specification.

    Such a file does not say that Qwen's text is brought to NFC, and llama.cpp does not do it; but
    Qwen's tokenizer.json says so, and the model was trained that way.
    """
    def value(key: str, kind: type, **checks):
        key = f"tokenizer.ggml.{key}"
        if key not in metadata:
            raise InputError(f"the GGUF file has no {key}, without which there is no tokenizer")
        return _checked(metadata[key], key, kind, **checks)

    def value_or(key: str, kind: type, default):
        return value(key, kind) if f"tokenizer.ggml.{key}" in metadata else default

    if (model := value("model", str)) != "gpt2":
        raise InputError(f"tokenizer.ggml.model is {model!r}; only 'gpt2', which is byte-level "
                         "BPE, is supported")
    if (family := value("pre", str)) not in FAMILIES:
        raise InputError(f"tokenizer.ggml.pre is {family!r}; supported: {', '.join(FAMILIES)}")
    if value_or("add_eos_token", bool, False):
        raise InputError("tokenizer.ggml.add_eos_token is set; an EOS token behind a prompt is not "
                         "supported")

    spellings = value("tokens", list, of=str)
    id_of = {text: id for id, text in enumerate(spellings)}
    if len(id_of) < len(spellings):
        twice = next(text for id, text in enumerate(spellings) if id_of[text] != id)
        raise InputError(f"tokenizer.ggml.tokens holds {_short(twice)} twice")
    tokens, added = _gguf_tokens(spellings, value("token_type", list, of=int))
    return Tokenizer(
        tokens,
        _read_merges(value("merges", list, of=str), id_of),
        Pretokenizer(family, added, nfc=family == "qwen2"),
        ignore_merges=family == "llama-bpe",
        bos_token_id=value_or("bos_token_id", int, None),
        eos_token_id=value_or("eos_token_id", int, None),
        add_bos_token=value_or("add_bos_token", bool, family == "llama-bpe"),
    )


def _gguf_tokens(spellings: list[str], types: list[int]) -> tuple[list[bytes], list[AddedToken]]:
    if len(spellings) != len(types):
        raise InputError(f"tokenizer.ggml.tokens has {len(spellings)} entries and token_type "
                         f"{len(types)}; each token has one type")
    tokens, added = [], []
    for id, (text, kind) in enumerate(zip(spellings, types, strict=True)):
        if kind == NORMAL or kind == UNUSED:
            tokens.append(unspell(text))
        elif kind == CONTROL or kind == USER_DEFINED:
            tokens.append(utf8(text))
            added.append(AddedToken(id, text, special=kind == CONTROL))
        else:
            raise InputError(f"token {id}, {_short(text)}, is of type {kind}; byte-level BPE has "
                             "the types 1, 3, 4 and 5")
    return tokens, added


# ---- tokenizer.json --------------------------------------------------------------------------


def tokenizer_from_json(source: str | Path | dict) -> Tokenizer:
    """See Tokenizer.from_tokenizer_json."""
    if isinstance(source, dict):
        return _build(source, config={})
    path = Path(source)
    config_path = path.with_name("tokenizer_config.json")
    data = _read_json(path)
    config = _read_json(config_path) if config_path.exists() else {}
    try:
        return _build(data, config)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _read_json(path: Path) -> dict:
    try:
        return _checked(json.loads(path.read_bytes()), str(path), dict)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def _build(data: dict, config: dict) -> Tokenizer:
    model = _checked(data.get("model"), "model", dict)
    id_of = _checked(model.get("vocab"), "model.vocab", dict, of=int)
    _refuse_other_models(model, id_of)
    if _steps(data.get("decoder"), "decoder", "decoders") not in ([], ["ByteLevel"]):
        pass
    entries = _checked(data.get("added_tokens") or [], "added_tokens", list, of=dict)
    added = [_added_token(entry) for entry in entries]
    all_ids = {token.text: token.id for token in added} | id_of
    template_bos = _template_bos(data.get("post_processor"))
    named_bos = _named_token("bos_token", config, all_ids)
    if None not in (template_bos, named_bos) and template_bos != named_bos:
        raise InputError(f"post_processor begins a text with token {template_bos}, but bos_token "
                         f"in tokenizer_config.json is token {named_bos}; they must be the same")
    return Tokenizer(
        _json_tokens(id_of, added),
        _read_merges(_checked(model.get("merges"), "model.merges", list), id_of),
        Pretokenizer(_family(data.get("pre_tokenizer")), added, _is_nfc(data.get("normalizer"))),
        ignore_merges=_checked(model.get("ignore_merges", False), "model.ignore_merges", bool),
        bos_token_id=named_bos if template_bos is None else template_bos,
        eos_token_id=_named_token("eos_token", config, all_ids),
        add_bos_token=template_bos is not None,
    )
