"""Matrices of few bits multiply as their dequantized selves: both backends, every operator."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import quantized_linear
from minillm.linear import embedding_np, embedding_torch, linear_np, linear_torch
from minillm.quantization import pack_int4_np, quantize_int8_np
from minillm.quantized_linear import (
    W8A8,
    Int4,
    Int8,
    PackedInt4,
    PackedInt8,
    PackedInt8Groups,
    for_cpu_operator,
    int8_matmul_np,
    int8_matmul_torch,
    operator_group_size,
)

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
every_kind = pytest.mark.parametrize("kind", ["int8", "int8-groups", "int4", "w8a8"])
a_few = settings(max_examples=25, deadline=None)
# Of one product, relative to the largest: of the last rounding, and of those on the way to it.
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}


def random_matrix(kind, out_size, in_size, group_size=32, bias=False, seed=0):
    """Any integers, and scales that are the same number in bfloat16: 8 bits."""
    rng = np.random.default_rng(seed)
    if kind in ("int8", "w8a8"):
        group_size = in_size
    shape = out_size, -(-in_size // group_size)
    scale, minimum = (rng.integers(128, 256, shape) * 2.0**rng.integers(-12, -9, shape)
                      for _ in range(2))
    scale, minimum = scale.astype(np.float32), -4 * minimum.astype(np.float32)
    b = rng.normal(size=out_size).astype(np.float32) if bias else None
    if kind == "int4":
        q = rng.integers(0, 16, (out_size, in_size), dtype=np.uint8)
        return Int4(pack_int4_np(q), scale, minimum, group_size, in_size, b)
    lowest = -127 if kind == "w8a8" else -128  # which files may have
    q = rng.integers(lowest, 128, (out_size, in_size), dtype=np.int8)
    return (W8A8 if kind == "w8a8" else Int8)(q, scale, group_size, b)


def to_torch(matrix, dtype="float32", device="cpu"):
    dtype = getattr(torch, dtype)

    def move(array):
        return torch.from_numpy(array).to(device)

    return matrix.converted(move, lambda array: move(array).to(dtype), dtype)


def activations(N, in_size, seed=1):
    return np.random.default_rng(seed).normal(size=(N, in_size)).astype(np.float32)


def assert_close(y, expected, tolerance):
    y = y.double().cpu().numpy() if isinstance(y, torch.Tensor) else y
    assert y.shape == expected.shape
    np.testing.assert_allclose(y, expected, rtol=0,
                               atol=tolerance * max(1e-30, np.abs(expected).max(initial=0)))


def product(x, matrix):
    """x·Wᵀ + b in float64; for W8A8 with the activations that it rounds x to."""
    if type(matrix) is W8A8:
        q, scale = quantize_int8_np(x)
        x = q.astype(np.float64) * scale
    y = x.astype(np.float64) @ matrix.dequantize_np().astype(np.float64).T
    return y if matrix.bias is None else y + matrix.bias


# ── The reference classes ────────────────────────────────────────────────────────────────────


@every_kind
@a_few
@given(st.integers(0, 6), st.integers(1, 40), st.integers(1, 80), st.integers(1, 90), st.booleans())
def test_both_backends_multiply_by_the_dequantized_matrix(kind, N, out_size, in_size, group_size,
                                                          bias):
    matrix = random_matrix(kind, out_size, in_size, group_size, bias)
    x = activations(N, in_size)
    expected = product(x, matrix)
    assert matrix.shape == to_torch(matrix).shape == (out_size, in_size)
    for y in (linear_np(x, matrix), linear_torch(torch.from_numpy(x), to_torch(matrix))):
        assert_close(y, expected, TOLERANCE["float32"])


@every_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@every_kind
def test_every_dtype_is_kept(kind, dtype, device):
    """The product and the rows come in the dtype of the activations and of the model."""
    matrix = random_matrix(kind, 33, 70, 32, bias=True)
    there = to_torch(matrix, dtype, device)
    x = torch.from_numpy(activations(5, 70)).to(device, getattr(torch, dtype))
    y = linear_torch(x, there)
    assert y.dtype == x.dtype
    expected = product(x.float().cpu().numpy(), matrix)
    assert_close(y, expected, TOLERANCE[dtype])
    ids = [3, 0, 32, 3]
    rows = embedding_torch(torch.tensor(ids, device=device), there)
    assert rows.dtype == x.dtype
    assert_close(rows, matrix.dequantize_np()[ids], TOLERANCE[dtype])


@every_kind
def test_rows_and_dtypes_in_numpy(kind):
    for dtype in (np.float32, np.float64):
        matrix = random_matrix(kind, 33, 70, 32, bias=True).converted(
            np.asarray, lambda array, dtype=dtype: array.astype(dtype), np.dtype(dtype))
        rows = embedding_np(np.array([3, 0, 32, 3]), matrix)
        np.testing.assert_array_equal(
            rows, matrix.dequantize_np()[[3, 0, 32, 3]].astype(dtype), strict=True)
        assert linear_np(activations(2, 70).astype(dtype), matrix).dtype == dtype
        assert matrix.bias.dtype == dtype and matrix.scale.dtype == np.float32


@every_kind
def test_tiles_are_the_whole_matrix(kind, monkeypatch):
    """A matrix of more rows than are floats at once, and no whole number of tiles."""
    matrix, x = random_matrix(kind, 37, 70, bias=True), activations(3, 70)
    there = to_torch(matrix)
    whole = linear_np(x, matrix)
    monkeypatch.setattr(quantized_linear, "TILE_ROWS", 5)
    assert_close(linear_np(x, matrix), whole, 1e-6)
    assert_close(linear_torch(torch.from_numpy(x), there), whole, 1e-5)


def test_a_matrix_is_frozen_and_converted_to_another():
    matrix = random_matrix("int4", 4, 6)
    with pytest.raises(dataclasses.FrozenInstanceError):
        matrix.bias = None
    assert to_torch(matrix).packed.dtype == torch.uint8 and isinstance(matrix.packed, np.ndarray)


# ── Bytes times bytes ────────────────────────────────────────────────────────────────────────


@every_device
@a_few
@given(st.integers(0, 20), st.integers(1, 40), st.integers(1, 70))
def test_products_of_bytes_are_exact(device, N, R, K):
    rng = np.random.default_rng((N, R, K))
    a, b = (rng.integers(-127, 128, (rows, K), dtype=np.int8) for rows in (N, R))
    exact = a.astype(np.int64) @ b.T.astype(np.int64)
    there = int8_matmul_torch(torch.from_numpy(a).to(device), torch.from_numpy(b).to(device))
    assert there.dtype == torch.float32
    np.testing.assert_array_equal(there.cpu().numpy(), exact)
    np.testing.assert_array_equal(int8_matmul_np(a, b), exact)


def test_products_of_bytes_beyond_the_exact_integers_of_float32():
    """1536 · 127 · 127 needs 25 bits."""
    a = np.full((2, 1536), 127, np.int8)
    a[1, ::2] = -127
    for b in (np.full((3, 1536), 127, np.int8), np.full((3, 1536), -127, np.int8)):
        exact = a.astype(np.int64) @ b.T.astype(np.int64)
        np.testing.assert_allclose(int8_matmul_np(a, b), exact, rtol=1e-6)
        y = int8_matmul_torch(torch.from_numpy(a), torch.from_numpy(b)).numpy()
        np.testing.assert_array_equal(y, exact.astype(np.float32))


@every_device
@a_few
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 80))
def test_w8a8_twins_are_not_a_bit_apart(device, N, out_size, in_size):
    matrix, x = random_matrix("w8a8", out_size, in_size), activations(N, in_size)
    there = to_torch(matrix, device=device)
    y = there.matmul_torch(torch.from_numpy(x).to(device))
    np.testing.assert_array_equal(y.cpu().numpy(), matrix.matmul_np(x), strict=True)


def test_w8a8_by_hand():
    """x is 127·0.01 and −64·0.01 (0.635 rounded); its product with 100 and 50 is 9 500 wholes."""
    matrix = W8A8(np.array([[100, 50]], np.int8), np.array([[0.5]], np.float32), 2)
    y = matrix.matmul_np(np.array([[1.27, -0.64]], np.float32))
    np.testing.assert_allclose(y, [[9500 * 0.01 * 0.5]], rtol=1e-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_an_activation_that_is_no_number_spoils_its_token_and_no_other():
    matrix, x = random_matrix("w8a8", 5, 7), activations(3, 7)
    expected = matrix.matmul_np(x)
    for bad in (np.nan, np.inf):
        x[1, 2] = bad
        for y in (matrix.matmul_np(x), to_torch(matrix).matmul_torch(torch.from_numpy(x)).numpy()):
            assert not np.isfinite(y[1]).any()
            np.testing.assert_array_equal(y[[0, 2]], expected[[0, 2]])


# ── PyTorch's operators ──────────────────────────────────────────────────────────────────────

OPERATORS = {"int8": PackedInt8, "int8-groups": PackedInt8Groups, "int4": PackedInt4}


def assert_operator_reads_every_number(matrix, expected_class):
    """With unit vectors as activations an operator answers with its matrix, number by number."""
    there = to_torch(matrix, "bfloat16")
    fast = for_cpu_operator(there)
    assert type(fast) is expected_class
    values = matrix.dequantize_np()
    found = fast.matmul_torch(torch.eye(matrix.shape[1], dtype=torch.bfloat16)).float().T.numpy()
    # It rounds its numbers to bfloat16, those of 4 bits before and after it has added two.
    size = np.repeat(np.abs(matrix.scale), matrix.group_size, axis=1)[:, : matrix.shape[1]]
    size = np.abs(values) + (16 * size if expected_class is not PackedInt8 else 0)
    assert (np.abs(found - values) <= 2.0**-7 * size + 1e-30).all()
    for N in (0, 1, 5, 20):
        x = torch.from_numpy(activations(20, matrix.shape[1])).bfloat16()[:N]
        y = linear_torch(x, fast)
        assert y.dtype == torch.bfloat16
        assert_close(y, product(x.float().numpy(), matrix), TOLERANCE["bfloat16"])


@pytest.mark.parametrize("kind", OPERATORS)
@pytest.mark.parametrize("bias", [False, True])
@settings(max_examples=12, deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([32, 64, 128, 256, 96]))
def test_an_operator_multiplies_as_its_matrix(kind, bias, tiles, blocks, group_size):
    """Sizes with a short last group among them: a group of 128 has 32, 64 or 96 numbers there."""
    in_size = 32 * blocks
    if kind == "int8-groups" and group_size >= in_size:
        group_size, in_size = 32, in_size + 32  # one group a row would be "int8"
    matrix = random_matrix(kind, 16 * tiles, in_size, group_size, bias)
    assert_operator_reads_every_number(matrix, OPERATORS[kind])


@pytest.mark.parametrize("kind", ["int4", "int8-groups"])
@pytest.mark.parametrize("in_size", [576, 1536, 160])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_groups_of_the_default_models_sizes(kind, in_size, group_size):
    """576 has four groups of 128 and a half, 160 has one and a quarter."""
    matrix = random_matrix(kind, 48, in_size, group_size)
    assert_operator_reads_every_number(matrix, OPERATORS[kind])


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 70), st.integers(1, 9))
def test_int8_by_row_takes_any_number_of_rows(out_size, sixteens):
    matrix = random_matrix("int8", out_size, 16 * sixteens, bias=True)
    assert_operator_reads_every_number(matrix, PackedInt8)


@pytest.mark.parametrize("kind, out_size, in_size, group_size", [
    ("int8", 16, 24, None), ("int8", 16, 15, None),
    ("int4", 24, 64, 32), ("int4", 16, 48, 32), ("int4", 16, 48, 128), ("int4", 1, 64, 32),
    ("int4", 16, 64, 48), ("int4", 16, 64, 16), ("int8-groups", 24, 64, 32),
    ("int8-groups", 16, 80, 32),
])
def test_sizes_that_no_operator_takes(kind, out_size, in_size, group_size):
    matrix = to_torch(random_matrix(kind, out_size, in_size, group_size), "bfloat16")
    assert for_cpu_operator(matrix) is None


def test_w8a8_stays_as_it_is():
    matrix = to_torch(random_matrix("w8a8", 5, 7))
    assert for_cpu_operator(matrix) is matrix


@pytest.mark.parametrize("in_size, group_size, expected", [
    (576, 32, 32), (576, 64, 64), (576, 128, 64), (1536, 128, 128), (1536, 512, 256),
    (96, 96, 32), (48, 32, None), (64, 16, None), (100, 100, None),
])
def test_the_largest_group_that_an_operator_takes(in_size, group_size, expected):
    assert operator_group_size(in_size, group_size) == expected


@pytest.mark.parametrize("kind", OPERATORS)
def test_a_packed_embedding_has_the_rows_of_its_matrix(kind):
    matrix = random_matrix(kind, 32, 64)
    there = to_torch(matrix, "bfloat16")
    rows = embedding_torch(torch.tensor([31, 4]), for_cpu_operator(there))
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, torch.from_numpy(matrix.dequantize_np()[[31, 4]]).bfloat16())


@pytest.mark.parametrize("kind", ["int8-groups", "int4"])
def test_a_matrix_without_rows_is_not_kept_twice(kind):
    there = to_torch(random_matrix(kind, 32, 64), "bfloat16")
    fast = for_cpu_operator(there, has_rows=False)
    assert there not in vars(fast).values()
    x = torch.from_numpy(activations(3, 64)).bfloat16()
    assert torch.equal(linear_torch(x, fast), linear_torch(x, for_cpu_operator(there)))
