"""How is a quantized model written to one file? See `quantized_file.py` for what is in it.

Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from ..errors import InputError
from .quantized_file import DTYPES, MATRIX_CLASSES, ROPE_FACTORS, VERSION, Inventory
from .stored_json import tokenizer_to_dict


class Written(NamedTuple):
    """What became of a model: its file, and the bits that a weight takes in it on average."""

    path: Path
    size_bytes: int
    bits_a_weight: float


def write_quantized_file(checkpoint, path):
    """Write a quantized checkpoint to the file `path`; -> Written.

    checkpoint: its matrices are Dense, Int8, W8A8 or Int4, of NumPy arrays; one is in memory at a
    time. The header, which comes first, is known last: until then the arrays are in a file beside.
    """
    inventory = Inventory(checkpoint.config)
    matrices, num_weights = {}, 0
    with (whole_file(path) as partial,
          open(partial.with_name(f"{partial.name}.arrays"), "w+b") as arrays):
        store = _ArrayStore(arrays)
        with tqdm(total=len(inventory.tensors) + len(inventory.matrices), desc="quantizing",
                  unit="matrix", disable=None) as bar:
            for name, shape in inventory.tensors:
                store.add(name, checkpoint.tensor(name, shape))
                num_weights += math.prod(shape)
                bar.update()
            for name, parts, in_size, bias in inventory.matrices:
                matrix = checkpoint.matrix(name, parts, in_size, bias)
                matrices[name] = _store_matrix(store, name, matrix)
                num_weights += (in_size + bool(bias)) * sum(size for _, size in parts)
                bar.update()
        if checkpoint.rope_freq_factors is not None:
            store.add(ROPE_FACTORS, checkpoint.rope_freq_factors)
        array_bytes = arrays.tell()
        _write_file(partial, _metadata(checkpoint, matrices), store.header, arrays)
    return Written(Path(path), os.path.getsize(path), 8 * array_bytes / num_weights)


class _ArrayStore:
    """Writes arrays one behind the other, and notes where each one is."""

    def __init__(self, stream):
        self.stream, self.header = stream, {}

    def add(self, name, array):
        if array.dtype == np.float32:
            array = _as_float16_if_exact(array)
        dtype = next((key for key, value in DTYPES.items() if array.dtype == value), None)
        if dtype is None:
            raise ValueError(f"{name} is of dtype {array.dtype}, must be one of {list(DTYPES)}")
        start = self.stream.tell()
        self.stream.write(np.ascontiguousarray(array).data)
        self.header[name] = {"dtype": dtype, "shape": list(array.shape),
                             "data_offsets": [start, self.stream.tell()]}


def _as_float16_if_exact(array):
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    same = np.array_equal(half.astype(np.float32).view(np.uint32), array.view(np.uint32))
    return half if same else array


def _store_matrix(store, name, matrix):
    """Store a matrix's arrays; -> what else there is to know about it."""
    kind = type(matrix).__name__
    if MATRIX_CLASSES.get(kind) is not type(matrix):
        raise ValueError(f"{name} is a {kind}, must be one of {list(MATRIX_CLASSES)}")
    arrays = {field.name: getattr(matrix, field.name) for field in dataclasses.fields(matrix)}
    if kind == "Int4" and np.array_equal(matrix.minimum, -8 * matrix.scale):
        del arrays["minimum"]
    for field, array in arrays.items():
        if isinstance(array, np.ndarray):
            store.add(f"{name}.{field}", array)
    return {"kind": kind} if kind == "Dense" else {"kind": kind, "group_size": matrix.group_size}


def _metadata(checkpoint, matrices):
    values = {
        "config": dataclasses.asdict(checkpoint.config),
        "eos_token_ids": list(checkpoint.eos_token_ids),
        "chat_template": checkpoint.chat_template,
        "matrices": matrices,
        "tokenizer": tokenizer_to_dict(checkpoint.tokenizer()),
    }
    return {"minillm_version": VERSION, "quantize": checkpoint.quantize,
            **{key: json.dumps(value) for key, value in values.items()}}


def _write_file(path, metadata, header, arrays):
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays begin at a multiple of 8
    arrays.seek(0)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        shutil.copyfileobj(arrays, file)


def check_output(path, force=False):
    """Raise InputError where no file can be written, or where there is one, unless forced."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        what = f"{path} is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{what}: give the path of a new file in a folder that exists")
    if path.exists() and not force:
        raise InputError(f"{path} exists already: give another path, or add --force to replace it")


@contextmanager
def whole_file(path):
    """A path to write to, in a folder of its own beside `path`; it becomes `path` at the end, by
    one rename. An exception or Ctrl-C leaves nothing behind, and `path` as it was; the folder of a
    process that is killed stays."""
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix=".quantize-", dir=path.parent,
                                     ignore_cleanup_errors=True) as folder:
        partial = Path(folder) / path.name
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())  # or a power failure could leave the new name with no contents
        os.replace(partial, path)
