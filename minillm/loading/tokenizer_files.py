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

from ..bpe import BYTES_IN_ORDER, PRINTABLE_BYTES, Pair
from ..errors import InputError
from ..pretokenizer import FAMILIES, AddedToken, Pretokenizer, utf8
from ..tokenizer import Tokenizer

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
    return text if len(text) <= 200 else text[:197] + "..."


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
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not JSON: {error}") from None
    return _checked(data, str(path), dict)


def _build(data: dict, config: dict) -> Tokenizer:
    model = _checked(data.get("model"), "model", dict)
    id_of = _checked(model.get("vocab"), "model.vocab", dict, of=int)
    _refuse_other_models(model, id_of)
    if any(step.get("type") != "ByteLevel" for step in _steps(data, "decoder", "decoders")):
        raise InputError(f"decoder {_short(data['decoder'])} is not supported; only ByteLevel is")
    entries = _checked(data.get("added_tokens", []), "added_tokens", list, of=dict)
    added = [_added_token(entry) for entry in entries]
    all_ids = {token.text: token.id for token in added} | id_of
    template_bos = _template_bos(data)
    named_bos = _named_token("bos_token", config, all_ids)
    if None not in (template_bos, named_bos) and template_bos != named_bos:
        raise InputError(f"post_processor begins a text with token {template_bos}, but bos_token "
                         f"in tokenizer_config.json is token {named_bos}; they must be the same")
    return Tokenizer(
        _json_tokens(id_of, added),
        _read_merges(_checked(model.get("merges"), "model.merges", list), id_of),
        Pretokenizer(_family(data), added, nfc=_is_nfc(data)),
        ignore_merges=_checked(model.get("ignore_merges", False), "model.ignore_merges", bool),
        bos_token_id=named_bos if template_bos is None else template_bos,
        eos_token_id=_named_token("eos_token", config, all_ids),
        add_bos_token=template_bos is not None,
    )


def _refuse_other_models(model: dict, id_of: dict[str, int]) -> None:
    harmless = {"type": (None, "BPE"), "dropout": (None, 0), "byte_fallback": (None, False),
                "continuing_subword_prefix": (None, ""), "end_of_word_suffix": (None, "")}
    if not BYTE_OF.keys() <= id_of.keys():
        harmless["unk_token"] = (None,)  # it would stand for the bytes that no token spells
    for key, values in harmless.items():
        if model.get(key) not in values:
            raise InputError(f"model.{key} is {_short(model[key])}; supported is only {values[-1]}")


def _added_token(entry: dict) -> AddedToken:
    text = _checked(entry.get("content"), "content of an added token", str)
    for flag in ("single_word", "lstrip", "rstrip"):
        if entry.get(flag):
            raise InputError(f"added token {_short(text)} sets {flag}, which is not supported")
    return AddedToken(_checked(entry.get("id"), f"id of added token {_short(text)}", int), text,
                      special=bool(entry.get("special")), normalized=bool(entry.get("normalized")))


def _json_tokens(id_of: dict[str, int], added: list[AddedToken]) -> list[bytes]:
    """The bytes of every id. Ids must run from 0 to the last without a gap."""
    added_texts = {token.text for token in added}
    entries = [(text, id, text not in added_texts or BYTE_OF.keys() >= set(text))
               for text, id in id_of.items()]
    entries += [(token.text, token.id, False) for token in added
                if id_of.get(token.text) != token.id]
    tokens: list[bytes | None] = [None] * len(entries)
    for text, id, is_spelled in entries:
        if not 0 <= id < len(tokens):
            raise InputError(f"token {_short(text)} has id {id}; the {len(tokens)} tokens must "
                             f"have the ids 0 to {len(tokens) - 1}")
        if tokens[id] is not None:
            raise InputError(f"token {_short(text)} has id {id}, and so has {tokens[id]!r}")
        tokens[id] = unspell(text) if is_spelled else utf8(text)
    return tokens


def _named_token(key: str, config: dict, ids: dict[str, int]) -> int | None:
    """The id of a token that tokenizer_config.json names, as a string or an object."""
    name = config.get(key)
    if isinstance(name, dict):
        name = name.get("content")
    if name is None:
        return None
    if _checked(name, f"{key} in tokenizer_config.json", str) not in ids:
        raise InputError(f"{key} in tokenizer_config.json is {_short(name)}, which is no token")
    return ids[name]


_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
# How files write each family. ByteLevel by itself cuts with GPT-2's pattern.
_FAMILY_STEPS = {
    "gpt-2": [_BYTE_LEVEL],
    "smollm": [{"type": "Digits", "individual_digits": True}, _BYTE_LEVEL],
    **{family: [{"type": "Split", "pattern": {"Regex": FAMILIES[family]}, "behavior": "Isolated",
                 "invert": False}, {**_BYTE_LEVEL, "use_regex": False}]
       for family in ("llama-bpe", "qwen2")},
}


def _family(data: dict) -> str:
    steps = []
    for step in _steps(data, "pre_tokenizer", "pretokenizers"):
        is_byte_level = step.get("type") == "ByteLevel"
        default = {"use_regex": True} if is_byte_level else {}
        steps.append({key: value for key, value in (default | step).items()
                      if key != "trim_offsets"})  # which moves offsets into the text, not ids
    for family, known_steps in _FAMILY_STEPS.items():
        if steps == known_steps:
            return family
    raise InputError(f"pre_tokenizer {_short(data.get('pre_tokenizer'))} is not supported; "
                     f"supported are those of {', '.join(FAMILIES)}")


def _is_nfc(data: dict) -> bool:
    steps = _steps(data, "normalizer", "normalizers")
    if any(step != {"type": "NFC"} for step in steps):
        raise InputError(f"normalizer {_short(data['normalizer'])} is not supported; only NFC is")
    return bool(steps)


def _template_bos(data: dict) -> int | None:
    """The token that the post-processor puts before a text; nothing else may it add."""
    bos = None
    for step in _steps(data, "post_processor", "processors"):
        match step:
            case {"type": "ByteLevel"}:
                continue  # it moves offsets into the text, not ids
            case {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A"}}]}:
                continue
            case {"type": "TemplateProcessing", "special_tokens": dict(templates),
                  "single": [{"SpecialToken": {"id": str(name)}}, {"Sequence": {"id": "A"}}]}:
                match templates.get(name):
                    case {"ids": [int(bos)]}:
                        continue
        raise InputError(f"post_processor {_short(step)} is not supported; only a "
                         "TemplateProcessing that puts one token before the text is")
    return bos


def _steps(data: dict, key: str, members: str) -> list[dict]:
    """What stands under a key: nothing, one step, or a Sequence of steps."""
    step = data.get(key)
    if step is None:
        return []
    if _checked(step, key, dict).get("type") != "Sequence":
        return [step]
    return _checked(step.get(members), f"{key}.{members}", list, of=dict)
