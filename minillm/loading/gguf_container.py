"""What is in a .gguf file? Metadata, a table of tensors, and the tensors' bytes.

    "GGUF" | version u32 | number of tensors u64 | number of keys u64
    for each key       its name, the type of its value u32, the value
    for each tensor    its name, number of dimensions u32, dimensions u64, type u32, offset u64
    padding            up to a multiple of general.alignment (32 bytes if no key says otherwise)
    data               the tensors' bytes; offsets count from here and are aligned too

All numbers are little-endian; a text is its length (u64) and that many bytes of UTF-8; an array is
the type of its items (u32), how many there are (u64), and the items.

A model file comes from strangers, so every length in it is a claim: it is compared with the bytes
that are really there before anything is allocated or looped over. Python's integers do not
overflow, so the products of such claims are safe to compute.

Chapter 05_model tells the story of loading; `gguf.py` says what the keys and tensors mean, and
`gguf_blocks.py` what the bytes of a tensor mean. Left out on purpose: writing, big-endian files,
arrays of arrays (llama.cpp refuses them too). The `gguf` package has a reader as well, but it
keeps an object for every element of every array, seconds of work, and believes what a file claims.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from ..errors import InputError

MAX_KEY_BYTES = 65535
MAX_NAME_BYTES = 63  # ggml's GGML_MAX_NAME is 64, with the zero byte that ends a C string
MAX_DIMENSIONS = 4

SMALLEST_KEY_BYTES = 8 + 1 + 4 + 1  # length, one letter, type, one byte of value
SMALLEST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # the same of a tensor with one dimension

STRUCT_CODES = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H", GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.UINT64: "Q", GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT32: "f", GGUFValueType.FLOAT64: "d",
    GGUFValueType.BOOL: "?",
}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor's bytes are, and what they are."""

    name: str
    shape: tuple[int, ...]  # in NumPy's order, rows last; the file has it the other way round
    block_format: GGMLQuantizationType
    offset: int  # from the beginning of the data section
    size_bytes: int

    @property
    def row_bytes(self):
        return self.size_bytes // math.prod(self.shape[:-1])


class GGUFContainer:
    """A .gguf file, mapped into memory: opening it reads the metadata, and no tensor.

    metadata: key -> int, float, bool, str, or a list of these
    tensors:  name -> TensorInfo
    The mapping lives as long as this object and the arrays that `raw` gave away.
    Raises InputError, one line that names the file, for whatever is wrong with it.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._file = _map_file(self.path)
        cursor = _Cursor(self.path, self._file)
        num_tensors, num_keys = _read_header(cursor)
        self.metadata = _read_metadata(cursor, num_keys)
        alignment = _alignment(cursor, self.metadata)
        self.tensors = _read_tensor_table(cursor, num_tensors)
        self._data_start = cursor.position + -cursor.position % alignment  # skip the padding
        self._check_data(cursor, alignment)

    def raw(self, name):
        """The bytes of tensor `name`: a read-only view [..., bytes of a row] uint8, not a copy."""
        info = self.tensors[name]
        flat = np.frombuffer(self._file, np.uint8, info.size_bytes, self._data_start + info.offset)
        return flat.reshape(*info.shape[:-1], info.row_bytes)

    def _check_data(self, cursor, alignment):
        """Every tensor is aligned, inside the file, and does not overlap the one before it."""
        data_bytes = len(self._file) - self._data_start
        previous_name, previous_end = None, 0
        for info in sorted(self.tensors.values(), key=lambda info: info.offset):
            end = info.offset + info.size_bytes
            if info.offset % alignment:
                raise cursor.damaged(f"tensor {info.name!r} has offset {info.offset}, which is no "
                                     f"multiple of the alignment {alignment}")
            if end > data_bytes:
                raise cursor.damaged(f"tensor {info.name!r} of shape {info.shape} needs bytes up "
                                     f"to {end} of the data section, which has "
                                     f"{max(data_bytes, 0)}")
            if info.offset < previous_end:
                raise cursor.damaged(f"tensors {previous_name!r} and {info.name!r} overlap")
            previous_name, previous_end = info.name, end


class _Cursor:
    """Reads one value after another, and never beyond the end of the file."""

    def __init__(self, path, data):
        self.path, self.data, self.position = path, data, 0

    def damaged(self, problem):
        return InputError(f"{self.path}: {problem}; the file is cut short or damaged, get it again")

    def require(self, count, item_bytes, what):
        """Raise unless `count` items of at least `item_bytes` bytes can still follow."""
        remaining = len(self.data) - self.position
        if count * item_bytes > remaining:
            raise self.damaged(f"{what}: {count * item_bytes} bytes are needed for {count} items, "
                               f"{remaining} bytes remain")

    def numbers(self, code, count, what):
        """`count` numbers of the type that the struct module calls `code`, as a tuple."""
        size_bytes = struct.calcsize("<" + code)
        self.require(count, size_bytes, what)
        values = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        self.position += count * size_bytes
        return values

    def number(self, code, what):
        return self.numbers(code, 1, what)[0]

    def texts(self, count, what):
        """`count` texts. A vocabulary has 10^5 of them, so this loop calls as little as it can."""
        self.require(count, 8, what)
        data, position, end = self.data, self.position, len(self.data)
        texts = []
        try:
            for _ in range(count):
                start = position + 8
                position = start + int.from_bytes(data[position:start], "little")
                if position > end:
                    raise self.damaged(f"{what}: a text ends at byte {position} of {end}")
                texts.append(data[start:position].decode())
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what}: a text is no UTF-8 ({error.reason})") from error
        self.position = position
        return texts

    def values(self, value_type, count, what):
        """`count` values of one type, as a list."""
        if value_type == GGUFValueType.STRING:
            return self.texts(count, what)
        if value_type in STRUCT_CODES:
            return list(self.numbers(STRUCT_CODES[value_type], count, what))
        if value_type == GGUFValueType.ARRAY:
            raise InputError(f"{self.path}: {what}: arrays of arrays are not supported")
        raise self.damaged(f"{what}: {value_type} is no type of value (0 ... 12)")


def _map_file(path):
    try:
        with open(path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:  # missing, a folder, not permitted
        raise InputError(f"{path} is no readable .gguf file: {error.strerror}") from error
    except ValueError as error:  # empty, or a path that no file can have
        raise InputError(f"{path} is no readable .gguf file: {error}") from error


def _read_header(cursor):
    """Checks that this is a GGUF file of a version we know; returns (tensors, keys) to expect."""
    if (magic := bytes(cursor.data[:4])) != b"GGUF":
        raise InputError(f"{cursor.path} is no .gguf file: it begins with {magic!r}, must begin "
                         "with b'GGUF'")
    cursor.position = 4
    version = cursor.number("I", "version")
    if version and version % 2**16 == 0:  # 3 written the other way round is 3·2^24
        raise InputError(f"{cursor.path} is big-endian, must be little-endian; convert it with "
                         "gguf-convert-endian from the gguf package")
    if version not in (2, 3):
        raise InputError(f"{cursor.path} is GGUF version {version}, must be 2 or 3; convert it "
                         "with a llama.cpp that knows that version")
    return cursor.numbers("Q", 2, "number of tensors and keys")


def _read_metadata(cursor, num_keys):
    cursor.require(num_keys, SMALLEST_KEY_BYTES, "number of keys")
    metadata = {}
    for index in range(num_keys):
        key = cursor.texts(1, f"name of key {index}")[0]
        if not 1 <= len(key.encode()) <= MAX_KEY_BYTES:
            raise cursor.damaged(f"name of key {index} has {len(key.encode())} bytes, must have "
                                 f"1 ... {MAX_KEY_BYTES}")
        what = f"key {key!r}"
        if key in metadata:
            raise cursor.damaged(f"{what} appears twice")
        value_type = cursor.number("I", what)
        if value_type == GGUFValueType.ARRAY:
            item_type, count = cursor.number("I", what), cursor.number("Q", what)
            metadata[key] = cursor.values(item_type, count, what)
        else:
            metadata[key] = cursor.values(value_type, 1, what)[0]
    return metadata


def _alignment(cursor, metadata):
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r:.80}, must be a power of 2 "
                             "and at least 8")
    return alignment


def _read_tensor_table(cursor, num_tensors):
    cursor.require(num_tensors, SMALLEST_TENSOR_BYTES, "number of tensors")
    tensors = {}
    for index in range(num_tensors):
        info = _read_tensor_info(cursor, f"tensor {index}")
        if info.name in tensors:
            raise cursor.damaged(f"tensor {info.name!r} appears twice")
        tensors[info.name] = info
    return tensors


def _read_tensor_info(cursor, what):
    name = cursor.texts(1, f"name of {what}")[0]
    if not 1 <= len(name.encode()) <= MAX_NAME_BYTES:
        raise cursor.damaged(f"name of {what} has {len(name.encode())} bytes, must have "
                             f"1 ... {MAX_NAME_BYTES}")
    what = f"tensor {name!r}"
    num_dimensions = cursor.number("I", what)
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise cursor.damaged(f"{what} has {num_dimensions} dimensions, must have "
                             f"1 ... {MAX_DIMENSIONS}")
    shape = cursor.numbers("Q", num_dimensions, what)[::-1]
    if 0 in shape:
        raise cursor.damaged(f"{what} has shape {shape}, must have no dimension of size 0")
    type_number, offset = cursor.number("I", what), cursor.number("Q", what)
    try:
        block_format = GGMLQuantizationType(type_number)
    except ValueError as error:
        raise cursor.damaged(f"{what} has type {type_number}, which ggml does not "
                             "define") from error
    weights_a_block, block_bytes = GGML_QUANT_SIZES[block_format]
    if shape[-1] % weights_a_block:
        raise cursor.damaged(f"{what} has rows of {shape[-1]} weights, must have a multiple of "
                             f"{weights_a_block} for {block_format.name}")
    size_bytes = math.prod(shape) // weights_a_block * block_bytes
    return TensorInfo(name, shape, block_format, offset, size_bytes)
