"""A .gguf file is read as the `gguf` package reads it, or refused in one line."""

from __future__ import annotations

import os
import random
import struct
import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from minillm.errors import InputError
from minillm.loading.gguf_container import GGUFContainer

BIGGEST = 2**64 - 1


def text(value):
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


def key(name, value_type, value):
    return text(name) + struct.pack("<I", value_type) + value


def tensor(name="a", dimensions=(32,), type_number=0, offset=0, num_dimensions=None):
    count = len(dimensions) if num_dimensions is None else num_dimensions
    return (text(name) + struct.pack(f"<I{len(dimensions)}Q", count, *dimensions)
            + struct.pack("<IQ", type_number, offset))


def file_bytes(keys=(), tensors=(), data_bytes=4096, magic=b"GGUF", version=3,
               num_tensors=None, num_keys=None, alignment=32):
    header = magic + struct.pack("<IQQ", version,
                                 len(tensors) if num_tensors is None else num_tensors,
                                 len(keys) if num_keys is None else num_keys)
    table = header + b"".join(keys) + b"".join(tensors)
    return table + bytes(-len(table) % alignment) + bytes(data_bytes)


def alignment_key(value, value_type=GGUFValueType.UINT32):
    return key("general.alignment", value_type, struct.pack("<I", value))


U8, U32, STRING, ARRAY = (GGUFValueType.UINT8, GGUFValueType.UINT32, GGUFValueType.STRING,
                          GGUFValueType.ARRAY)
Q8_0, I8, I64 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.I8, GGMLQuantizationType.I64

MALFORMED = {
    "empty": (b"", "empty file"),
    "bad magic": (file_bytes(magic=b"FUGG"), "begins with b'FUGG'"),
    "version 0": (file_bytes(version=0), "version 0, must be 2 or 3"),
    "version 1": (file_bytes(version=1), "version 1, must be 2 or 3"),
    "version of the future": (file_bytes(version=4), "version 4, must be 2 or 3"),
    "big-endian": (file_bytes(version=3 << 24), "big-endian"),
    "2^64-1 tensors": (file_bytes(num_tensors=BIGGEST), "number of tensors"),
    "2^64-1 keys": (file_bytes(num_keys=BIGGEST), "number of keys"),
    "one key too many": (file_bytes([key("k", U8, b"1")], num_keys=2, data_bytes=0), "key"),
    "key of size -1": (file_bytes([struct.pack("<Q", BIGGEST) + b"k" * 99]), "name of key 0"),
    "empty key": (file_bytes([key("", U32, bytes(4))]), "name of key 0 has 0 bytes"),
    "long key": (file_bytes([key("k" * 65536, U8, b"1")]), "has 65536 bytes"),
    "duplicate key": (file_bytes([key("k", U8, b"1")] * 2), "key 'k' appears twice"),
    "key is no UTF-8": (file_bytes([key(b"\xff", U8, b"1")]), "name of key 0: .*no UTF-8"),
    "text is no UTF-8": (file_bytes([key("k", STRING, text(b"\xe2\x82"))]), "'k': .*no UTF-8"),
    "bad type of value": (file_bytes([key("k", 13, bytes(8))]), "'k': 13 is no type"),
    "bad type of items": (file_bytes([key("k", ARRAY, struct.pack("<IQ", 99, 1))]), "'k': 99 is"),
    "array of arrays": (
        file_bytes([key("k", ARRAY, struct.pack("<IQIQ", 9, 1, 4, 0))]), "arrays of arrays"),
    "2^64-1 numbers": (file_bytes([key("k", ARRAY, struct.pack("<IQ", 4, BIGGEST))]), "key 'k'"),
    "2^61 numbers": (file_bytes([key("k", ARRAY, struct.pack("<IQ", 10, 2**61))]), "key 'k'"),
    "2^64-1 texts": (file_bytes([key("k", ARRAY, struct.pack("<IQ", 8, BIGGEST))]), "key 'k'"),
    "text of size -1": (file_bytes([key("k", STRING, struct.pack("<Q", BIGGEST))]), "key 'k'"),
    "alignment 0": (file_bytes([alignment_key(0)]), "general.alignment is 0"),
    "alignment 4": (file_bytes([alignment_key(4)]), "general.alignment is 4"),
    "alignment 13": (file_bytes([alignment_key(13)]), "general.alignment is 13"),
    "alignment a float": (
        file_bytes([alignment_key(32, GGUFValueType.FLOAT32)]), "general.alignment is"),
    "alignment 2^31": (file_bytes([alignment_key(2**31)], [tensor()]), "data section, which has 0"),
    "tensor without a name": (file_bytes(tensors=[tensor("")]), "tensor 0 has 0 bytes"),
    "long tensor name": (file_bytes(tensors=[tensor("n" * 64)]), "tensor 0 has 64 bytes"),
    "duplicate tensor": (file_bytes(tensors=[tensor(), tensor(offset=128)]), "'a' appears twice"),
    "no dimensions": (file_bytes(tensors=[tensor(dimensions=())]), "has 0 dimensions"),
    "5 dimensions": (file_bytes(tensors=[tensor(dimensions=[1] * 5)]), "has 5 dimensions"),
    "2^32-1 dimensions": (
        file_bytes(tensors=[tensor(num_dimensions=2**32 - 1)]), "4294967295 dimensions"),
    "dimension 0": (file_bytes(tensors=[tensor(dimensions=(32, 0))]), "no dimension of size 0"),
    "dimension -1": (file_bytes(tensors=[tensor(dimensions=(BIGGEST,))]), "needs bytes up to"),
    "elements overflow": (file_bytes(tensors=[tensor(dimensions=(2**32,) * 4)]), "needs bytes"),
    "elements wrap to 0": (file_bytes(tensors=[tensor(dimensions=(2**32,) * 2)]), "needs bytes"),
    "bytes overflow": (file_bytes(tensors=[tensor(type_number=I64, dimensions=(2**61,))]), "needs"),
    "unknown type": (file_bytes(tensors=[tensor(type_number=99)]), "type 99"),
    "removed type": (file_bytes(tensors=[tensor(type_number=4)]), "type 4"),
    "half a block": (
        file_bytes(tensors=[tensor(type_number=Q8_0, dimensions=(48, 2))]), "multiple of 32"),
    "offset not aligned": (file_bytes(tensors=[tensor(offset=16)]), "offset 16"),
    "offset outside": (file_bytes(tensors=[tensor(offset=4096)]), "up to 4224"),
    "offset -32": (file_bytes(tensors=[tensor(offset=2**64 - 32)]), "needs bytes up to"),
    "overlapping tensors": (
        file_bytes(tensors=[tensor("a"), tensor("b", offset=96)]), "'a' and 'b' overlap"),
    "sum of sizes overflows": (
        file_bytes(tensors=[tensor("a", (0x7FFFFFFFFFFFFFC0,), I8),
                            tensor("b", (0x7FFFFFFFFFFFFFC0,), I8, 0x7FFFFFFFFFFFFFC0)]),
        "needs bytes up to"),
    "no data": (file_bytes(tensors=[tensor()], data_bytes=127), "data section, which has 127"),
}


def write(path, content):
    path.write_bytes(content)
    return path


def assert_one_line(error, path):
    message = str(error.value)
    assert str(path) in message and "\n" not in message


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_in_one_line(tmp_path, case):
    content, reason = MALFORMED[case]
    path = write(tmp_path / "bad.gguf", content)
    with pytest.raises(InputError, match=reason) as error:
        GGUFContainer(path)
    assert_one_line(error, path)


@pytest.mark.parametrize("version", [2, 3])
def test_the_builder_of_the_malformed_files_builds_a_good_one(tmp_path, version):
    content = file_bytes([key("k", U32, struct.pack("<I", 7)), alignment_key(64)],
                         [tensor("a" * 63, (32, 2)), tensor("b", (64,), Q8_0, 256)],
                         version=version, alignment=64)
    file = GGUFContainer(write(tmp_path / "good.gguf", content))
    assert file.metadata == {"k": 7, "general.alignment": 64}
    assert file.tensors["a" * 63].shape == (2, 32)
    assert file.raw("a" * 63).shape == (2, 128)
    assert file.raw("b").shape == (68,) and not file.raw("b").flags.writeable


def test_what_is_no_readable_file_is_refused(tmp_path):
    locked = write(tmp_path / "locked.gguf", file_bytes())
    locked.chmod(0)
    reasons = {tmp_path: "directory", tmp_path / "missing.gguf": "No such file",
               tmp_path / "zero\0byte.gguf": "null byte"}
    if not os.access(locked, os.R_OK):  # root may read everything
        reasons[locked] = "Permission denied"
    for path, reason in reasons.items():
        with pytest.raises(InputError, match=f"no readable .gguf file: .*{reason}") as error:
            GGUFContainer(path)
        assert_one_line(error, path)


def small_file(path):
    """One key of every type, three tensors; the last byte of the file is a tensor's."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in [("uint8", 200), ("int8", -3), ("uint16", 60000), ("int16", -300),
                        ("uint32", 2**31), ("int32", -70000), ("uint64", 2**63), ("int64", -2**40),
                        ("float32", 0.5), ("float64", 1e-300), ("bool", True),
                        ("string", "naïve €")]:
        getattr(writer, f"add_{name}")(f"a.{name}", value)
    writer.add_array("a.texts", ["", "x", "日本"])
    writer.add_array("a.numbers", [3, -1, 2])
    writer.add_array("a.floats", [0.25, -2.0])
    writer.add_array("a.flags", [True, False])
    rng = np.random.default_rng(0)
    writer.add_tensor("f32", rng.normal(size=(3, 5)).astype(np.float32))
    writer.add_tensor("f16", rng.normal(size=7).astype(np.float16))
    writer.add_tensor("q4_1", rng.integers(0, 256, (8, 40), np.uint8),
                      raw_dtype=GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def assert_same_as_reader(file, reader):
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(file.metadata) == list(fields)
    for name, field in fields.items():
        assert file.metadata[name] == field.contents(), name
    assert list(file.tensors) == [theirs.name for theirs in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert (ours.block_format, ours.size_bytes) == (theirs.tensor_type, theirs.n_bytes)
        assert file.raw(ours.name).tobytes() == theirs.data.tobytes()


def test_small_file_agrees_with_gguf_reader(tmp_path):
    path = small_file(tmp_path / "small.gguf")
    assert_same_as_reader(GGUFContainer(path), gguf.GGUFReader(path))
    assert GGUFContainer(path).metadata["a.string"] == "naïve €"


def test_default_model_agrees_with_gguf_reader(model_path):
    file = GGUFContainer(model_path)
    assert len(file.tensors) == 272
    assert_same_as_reader(file, gguf.GGUFReader(model_path))


def test_file_that_is_cut_anywhere_is_refused(tmp_path):
    content = small_file(tmp_path / "small.gguf").read_bytes()
    assert content[-320:] == GGUFContainer(tmp_path / "small.gguf").raw("q4_1").tobytes()
    for length in range(len(content)):
        path = write(tmp_path / "cut.gguf", content[:length])
        with pytest.raises(InputError) as error:
            GGUFContainer(path)
        assert_one_line(error, path)


def test_random_damage_is_harmless(tmp_path):
    """Whatever the bytes say, the file is read or refused, and nothing huge is allocated."""
    content = small_file(tmp_path / "small.gguf").read_bytes()
    rng = random.Random(0)
    num_refused = 0
    tracemalloc.start()
    for _ in range(1500):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 8])):
            value = rng.choice([0, 1, 9, 127, 255, rng.randrange(256)])
            damaged[rng.randrange(len(content))] = value
        try:
            file = GGUFContainer(write(tmp_path / "damaged.gguf", damaged))
        except InputError as error:
            assert "\n" not in str(error)
            num_refused += 1
        else:
            assert sum(file.raw(name).size for name in file.tensors) <= len(content)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 2**20
    assert 200 < num_refused < 1450


def test_every_type_that_ggml_defines_has_a_size():
    assert set(gguf.GGML_QUANT_SIZES) == set(GGMLQuantizationType)
