"""How do numbers get out of a Hugging Face folder? From safetensors files, one tensor at a time.

A safetensors file is eight bytes (the length of the header), a header in JSON that gives every
tensor's dtype, shape and byte range, and then those bytes. The `safetensors` library checks the
header against the file; the bytes are read here, because NumPy has no bfloat16 and the library's
NumPy side refuses it. Reading, and not mapping, keeps the peak of memory at one tensor: pages of
a mapped file would stay counted until the file is closed.

Chapter 05_model tells the story. Left out on purpose: quantized dtypes, and pickle checkpoints,
which can run any code when they are opened.
"""

from __future__ import annotations

import json
import math
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from ..config import ModelConfig
from ..errors import InputError
from .checkpoint import Checkpoint
from .config_json import config_from_json

NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
PICKLE_SUFFIXES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}


class StoredTensor(NamedTuple):
    """Where one tensor lies: its bytes begin at `offset` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class HuggingFaceFolder(Checkpoint):
    """A checkpoint: config.json, *.safetensors, tokenizer.json and their companions.

    Headers are read at once, so that a broken file is found before minutes of loading; tensors
    when they are asked for. Everything that is wrong with the files raises InputError.
    """

    rope_freq_factors = None  # a GGUF file may bring these; here rope_scaling says the same

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            refuse_pickle(self.path)
            raise InputError(f"{self.path} is not a folder: give the folder that holds config.json")
        self._tensors = _find_tensors(self.path)
        self.config = self._read_config()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as a fresh float32 array of that shape."""
        if name not in self._tensors:
            raise InputError(f"{self.path} has no tensor {name!r}, which its config.json implies: "
                             "download the checkpoint again")
        stored = self._tensors[name]
        if stored.shape != tuple(shape):
            raise InputError(f"{stored.file}: tensor {name!r} has shape {list(stored.shape)}, "
                             f"config.json implies {list(shape)}: take both from one checkpoint")
        if stored.dtype not in NUMPY_DTYPES:
            raise InputError(f"{stored.file}: tensor {name!r} is {stored.dtype}, supported are "
                             f"{', '.join(NUMPY_DTYPES)}: use an unquantized checkpoint")
        numbers = np.fromfile(stored.file, NUMPY_DTYPES[stored.dtype], math.prod(shape),
                              offset=stored.offset)
        if stored.dtype == "BF16":  # bfloat16 is the upper half of a float32
            numbers = np.left_shift(numbers, 16, dtype=np.uint32).view(np.float32)
        return numbers.astype(np.float32, copy=False).reshape(shape)

    def tokenizer(self):
        """The Tokenizer that tokenizer.json describes."""
        from ..tokenizer import Tokenizer  # not at the top: tensors alone need no tokenizer

        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise InputError(f"{self.path} has no tokenizer.json: download it next to the weights")
        return Tokenizer.from_tokenizer_json(file)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja template: a file of its own or, in older checkpoints, an entry in another."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return _read_text(file)
        file = self.path / "tokenizer_config.json"
        template = _read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, list):  # several templates, each with a name
            named = [entry for entry in template if isinstance(entry, dict)]
            template = next((entry.get("template") for entry in named
                             if entry.get("name") == "default"), None)
        if not isinstance(template, str | None):
            raise InputError(f"{file}: chat_template is {template!r:.40}, must be a string or a "
                             "list of named templates")
        return template

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer; generation_config.json knows more of them."""
        for file in (self.path / "generation_config.json", self.path / "config.json"):
            ids = _read_json(file).get("eos_token_id") if file.is_file() else None
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if any(type(id) is not int or id < 0 for id in ids):
                raise InputError(f"{file}: eos_token_id is {ids!r:.40}, must be a token id of 0 "
                                 "or more, or a list of them")
            return tuple(ids)
        return ()

    def _read_config(self) -> ModelConfig:
        file = self.path / "config.json"
        if not file.is_file():
            ggufs = sorted(self.path.glob("*.gguf"))
            advice = f"give the file {ggufs[0]}" if ggufs else "download it next to the weights"
            raise InputError(f"{self.path} has no config.json: {advice}")
        fields = _read_json(file)
        try:
            return config_from_json(fields)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error


def refuse_pickle(path: Path) -> None:
    """Raise InputError if the name is that of a pickle checkpoint. The file is never opened."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{path} is a pickle checkpoint, and opening one can run any code that "
                         "its author put in: use a safetensors version of it, or convert it with "
                         "transformers' save_pretrained where you trust it")


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return read_header(whole)
    if index.is_file():
        return _read_shards(index)
    for file in sorted(folder.iterdir()):
        refuse_pickle(file)
    raise InputError(f"{folder} has no model.safetensors and no {index.name}: give a folder with "
                     "config.json, safetensors weights and tokenizer.json")


def _read_shards(index: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint whose index says in which file each one lies."""
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index}: weight_map must be an object that gives each tensor's file: "
                         "download the index again")
    shards = {}
    for shard in sorted(set(weight_map.values())):
        # Only the name is judged: in the hub's cache every file is a link that leaves the folder.
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise InputError(f"{index}: weight_map names {shard!r:.80}, must be a .safetensors "
                             "file beside the index")
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard} is missing, which {index.name} lists: "
                             "download it too")
        shards[shard] = read_header(index.parent / shard)
    for name, shard in weight_map.items():
        if name not in shards[shard]:
            raise InputError(f"{index.parent / shard} has no tensor {name!r:.80}, which "
                             f"{index.name} lists: download both again")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(file, framework="numpy"):  # checks every length, shape and offset
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{file} is no whole safetensors file ({error}): "
                         "download it again") from error
    with open(file, "rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(header_bytes))
    header.pop("__metadata__", None)
    return {name: StoredTensor(file, entry["dtype"], tuple(entry["shape"]),
                               8 + header_bytes + entry["data_offsets"][0])
            for name, entry in header.items()}


def _read_json(file: Path) -> dict:
    try:
        value = json.loads(_read_text(file))
    except (ValueError, RecursionError) as error:  # too deep, or a number of 5000 digits
        raise InputError(f"{file} is no valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise InputError(f"{file} holds {type(value).__name__}, must be a JSON object")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as UTF-8 text ({error}): "
                         "download it again") from error
