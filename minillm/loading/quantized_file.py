"""How is a quantized model kept? One safetensors file, from which it comes back bit for bit.

    length of the header | header in JSON: for every array its dtype, shape and bytes | the arrays

    model.layers.0.input_layernorm.weight     a norm
    model.layers.0.mlp.up_proj.packed         and the arrays of a quantized matrix, under the
    model.layers.0.mlp.up_proj.scale          names that `quantized_linear.py` gives them

The header's `__metadata__`, texts only, holds the rest: the version of this layout, the name of the
format, and as JSON the ModelConfig, the tokenizer, the chat template and which matrix is what.

Nothing is lost and nothing is said twice. Floats that fit are kept as float16 (scales and minima of
groups are, since quantizing rounds them to it), and the minima of a symmetric group are −8 times
its scales. Loading is reading: no number is computed but those minima. What a stranger's file
claims is compared with what `load_weights` will ask for before any array is read.

`quantized_writer.py` writes such a file, `stored_json.py` knows the metadata. Chapter
11_quantization tells the story. Left out on purpose: PyTorch's packed layouts, which depend
on the instruction set, and checksums; a changed byte in an array changes the model.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from ..errors import InputError
from ..linear import Dense
from ..quantized_linear import W8A8, Int4, Int8
from .checkpoint import Checkpoint
from .safetensors import read_header
from .stored_json import WRITE_AGAIN, config_from_dict, tokenizer_from_dict
from .weights import load_weights

VERSION = "1"
MATRIX_CLASSES = {each.__name__: each for each in (Dense, Int8, W8A8, Int4)}
DTYPES = {"F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
FLOATS = ("F32", "F16")
LARGEST_GROUP = 256  # of those that are larger than a row
ROPE_FACTORS = "rope_freq_factors"
METADATA_KEYS = ("minillm_version", "quantize", "config", "eos_token_ids", "chat_template",
                 "matrices", "tokenizer")


class Inventory(Checkpoint):
    """What does `load_weights` ask a checkpoint for? This one has no numbers, and writes it down.

    tensors: [(name, shape), ...]   matrices: [(name, parts, in_size, bias), ...], in their order.
    """

    rope_freq_factors = None

    def __init__(self, config):
        self.config = config
        self.tensors, self.matrices = [], []
        load_weights(self, convert=lambda array: None, convert_matrix=lambda matrix, has_rows: None)

    def tensor(self, name, shape):
        self.tensors.append((name, shape))
        return np.broadcast_to(np.float32(0), shape)

    def matrix(self, name, parts, in_size, bias):
        self.matrices.append((name, parts, in_size, bias))


class QuantizedFile(Checkpoint):
    """A checkpoint that write_quantized_file wrote.   quantize: the name of its format.

    Raises InputError, one line that names the file, for whatever is wrong with it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._metadata = read_metadata(self.path)
        self._stored = read_header(self.path)
        try:
            self.quantize = self._metadata["quantize"]
            self.config = config_from_dict(self._json("config", dict))
            self.eos_token_ids = self._read_eos_token_ids()
            self.chat_template = self._json("chat_template", str | None)
            self._matrices = self._json("matrices", dict)
            self._check_arrays()
            self.rope_freq_factors = self._read_rope_freq_factors()
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def tensor(self, name, shape):
        return self._read(name)

    def matrix(self, name, parts, in_size, bias):
        entry = self._matrices[name]
        fields = {field: self._read(f"{name}.{field}")
                  for field in self._expected(name, parts, in_size, bias)}
        if entry["kind"] == "Int4":
            fields.setdefault("minimum", -8 * fields["scale"])
            fields["in_size"] = in_size
        sizes = {key: value for key, value in entry.items() if key == "group_size"}
        return MATRIX_CLASSES[entry["kind"]](**fields, **sizes)

    def tokenizer(self):
        try:
            return tokenizer_from_dict(self._json("tokenizer", dict))
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def _read(self, name):
        """A stored array, fresh; floats in float32."""
        stored = self._stored[name]
        numbers = np.fromfile(stored.file, DTYPES[stored.dtype], math.prod(stored.shape),
                              offset=stored.offset)
        if stored.dtype in FLOATS:
            numbers = numbers.astype(np.float32, copy=False)
        return numbers.reshape(stored.shape)

    def _expected(self, name, parts, in_size, bias):
        """The arrays of a matrix: {field: (dtypes, shape)}."""
        entry, shape = self._matrices.get(name), (sum(size for _, size in parts), in_size)
        kind = entry.get("kind") if isinstance(entry, dict) else None
        if not isinstance(kind, str) or kind not in MATRIX_CLASSES:
            raise InputError(f"matrix {name!r} is {entry!r:.80}, must be one of "
                             f"{', '.join(MATRIX_CLASSES)}: {WRITE_AGAIN}")
        biases = {"bias": (FLOATS, shape[:1])} if bias else {}
        if kind == "Dense":
            return {"weight": (FLOATS, shape), **biases}
        group_size, largest = entry.get("group_size"), max(in_size, LARGEST_GROUP)
        least = in_size if kind == "W8A8" else 1
        if type(group_size) is not int or not least <= group_size <= largest:
            raise InputError(f"matrix {name!r} has groups of {group_size!r:.80}, must be from "
                             f"{least} to {largest}: {WRITE_AGAIN}")
        scale = (FLOATS, (shape[0], math.ceil(in_size / group_size)))
        if kind != "Int4":
            return {"q": (("I8",), shape), "scale": scale, **biases}
        minimum = {"minimum": scale} if f"{name}.minimum" in self._stored else {}
        return {"packed": (("U8",), (shape[0], math.ceil(in_size / 2))), "scale": scale,
                **minimum, **biases}

    def _check_arrays(self):
        """Everything that the configuration implies is there, and nothing else."""
        L, (H, _, D) = self.config.num_hidden_layers, self.config.heads
        if L > len(self._stored) or H * D > self.path.stat().st_size:
            raise InputError(f"the configuration has {L} layers and {H} heads of {D} numbers, more "
                             f"than there are in the file: {WRITE_AGAIN}")
        inventory = Inventory(self.config)
        expected = {name: (FLOATS, shape) for name, shape in inventory.tensors}
        for name, *arguments in inventory.matrices:
            for field, dtypes_and_shape in self._expected(name, *arguments).items():
                expected[f"{name}.{field}"] = dtypes_and_shape
        for name, (dtypes, shape) in expected.items():
            self._check_array(name, dtypes, shape)
        surplus = sorted(self._stored.keys() - expected.keys() - {ROPE_FACTORS})
        if surplus:
            raise InputError(f"array {surplus[0]!r:.80} is no part of the model that the "
                             f"configuration describes: {WRITE_AGAIN}")

    def _check_array(self, name, dtypes, shape):
        stored = self._stored.get(name)
        if stored is None:
            raise InputError(f"array {name!r} is missing: {WRITE_AGAIN}")
        if stored.dtype not in dtypes or stored.shape != tuple(shape):
            raise InputError(f"array {name!r} is {stored.dtype} {list(stored.shape)}, must be "
                             f"{' or '.join(dtypes)} {list(shape)}: {WRITE_AGAIN}")

    def _json(self, key, kind):
        try:
            value = json.loads(self._metadata[key])
        except (ValueError, RecursionError) as error:  # too deep, or a number of 5000 digits
            raise InputError(f"metadata {key!r} is no valid JSON ({error}): "
                             f"{WRITE_AGAIN}") from error
        if not isinstance(value, kind):
            raise InputError(f"metadata {key!r} is {value!r:.80}: {WRITE_AGAIN}")
        return value

    def _read_eos_token_ids(self):
        ids, limit = self._json("eos_token_ids", list), self.config.vocab_size
        if any(type(id) is not int or not 0 <= id < limit for id in ids):
            raise InputError(f"eos_token_ids is {ids!r:.80}, must be token ids from 0 to "
                             f"{limit - 1}: {WRITE_AGAIN}")
        return tuple(ids)

    def _read_rope_freq_factors(self):
        if ROPE_FACTORS not in self._stored:
            return None
        self._check_array(ROPE_FACTORS, FLOATS, (self.config.head_dim // 2,))
        factors = self._read(ROPE_FACTORS)
        if not np.all((factors > 0) & np.isfinite(factors)):
            raise InputError(f"{ROPE_FACTORS} holds {factors.min()} ... {factors.max()}, must hold "
                             f"positive numbers: {WRITE_AGAIN}")
        return factors


def read_metadata(path):
    """The metadata of a file that write_quantized_file wrote.   Raises InputError for any other."""
    folder = "give the folder that holds config.json and *.safetensors"
    try:
        with safe_open(path, framework="numpy") as file:  # checks every length, shape and offset
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path} is no whole safetensors file ({reason:.160}): {WRITE_AGAIN}, or "
                         f"{folder}") from error
    if "minillm_version" not in metadata:
        raise InputError(f"{path} was not written by minillm quantize; for the weights of a "
                         f"Hugging Face model, {folder}")
    if metadata["minillm_version"] != VERSION:
        raise InputError(f"{path} is of version {metadata['minillm_version']!r:.40}, this minillm "
                         f"reads version {VERSION!r}: {WRITE_AGAIN}")
    missing = [key for key in METADATA_KEYS if not metadata.get(key)]
    if missing:
        raise InputError(f"{path} has no metadata {missing[0]!r}: {WRITE_AGAIN}")
    return metadata
