"""Numbers in few bits: the twins, worked examples, what rounding may cost, and gguf's answers."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Format
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.loading.gguf_blocks import read_q4_0, read_q4_1, read_q8_0
from minillm.quantization import (
    dequantize_group_np,
    dequantize_group_torch,
    pack_int4_np,
    pack_int4_torch,
    quantize_group_np,
    quantize_group_torch,
    quantize_int8_np,
    quantize_int8_torch,
    quantized_matmul_np,
    quantized_matmul_torch,
    unpack_int4_np,
    unpack_int4_torch,
)
from minillm.quantize_model import int4_matrix
from minillm.quantized_linear import Int8

every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
symmetric_or_not = pytest.mark.parametrize("symmetric", [False, True])
a_few = settings(max_examples=40, deadline=None)
SMALLEST_FLOAT16 = 2.0**-24
HALF_ULP = 2.0**-11  # a number rounded to float16 moves by this much of itself, or less


@st.composite
def matrices(draw):
    """[R, C] float32 of any size, one row and one column among them, and of any magnitude that
    weights have; with some zeros, and rows of the same sign."""
    R, C = draw(st.integers(1, 9)), draw(st.integers(1, 70))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(R, C)) * 10.0 ** rng.integers(-4, 3, size=(R, 1))
    x *= rng.random((R, C)) > 0.2
    x[::3] = np.abs(x[::3])
    return x.astype(np.float32)


def assert_same(actual, expected):
    """Every number the same, bit by bit, and in the same dtype."""
    np.testing.assert_array_equal(actual.cpu().numpy(), expected, strict=True)


# ── Twins: not a bit apart ───────────────────────────────────────────────────────────────────


@every_device
@a_few
@given(matrices())
def test_int8_twins(device, x):
    for each in (x, x.astype(np.float64), x.astype(np.float16)):
        twins = quantize_int8_torch(torch.from_numpy(each).to(device)), quantize_int8_np(each)
        for actual, expected in zip(*twins):
            assert_same(actual, expected)


@every_device
@symmetric_or_not
@a_few
@given(matrices(), st.integers(1, 80))
def test_group_twins(device, symmetric, x, group_size):
    there = torch.from_numpy(x).to(device)
    parts = quantize_group_np(x, group_size, symmetric)
    for actual, expected in zip(quantize_group_torch(there, group_size, symmetric), parts):
        assert_same(actual, expected)
    tensors = [torch.from_numpy(part).to(device) for part in parts]
    assert_same(dequantize_group_torch(*tensors, group_size),
                dequantize_group_np(*parts, group_size))
    assert_same(dequantize_group_torch(*tensors[:2], None, group_size),
                dequantize_group_np(*parts[:2], None, group_size))


@every_device
@a_few
@given(st.integers(1, 9), st.integers(1, 33), st.integers(0, 2**32 - 1))
def test_packing_twins_and_round_trip(device, R, C, seed):
    q = np.random.default_rng(seed).integers(0, 16, (R, C), dtype=np.uint8)
    packed = pack_int4_np(q)
    assert packed.shape == (R, (C + 1) // 2) and packed.dtype == np.uint8
    assert_same(pack_int4_torch(torch.from_numpy(q).to(device)), packed)
    assert_same(unpack_int4_torch(torch.from_numpy(packed).to(device), C), q)
    np.testing.assert_array_equal(unpack_int4_np(packed, C), q, strict=True)
    any_bytes = np.random.default_rng(seed).integers(0, 256, (R, C), dtype=np.uint8)
    np.testing.assert_array_equal(pack_int4_np(unpack_int4_np(any_bytes, 2 * C)), any_bytes)


@every_device
@symmetric_or_not
@a_few
@given(matrices(), st.integers(1, 80), st.integers(1, 5))
def test_a_product_group_by_group_is_the_product(device, symmetric, weight, group_size, N):
    """Against float64 with the dequantized matrix, relative to the sum of magnitudes."""
    q, scale, minimum = quantize_group_np(weight, group_size, symmetric)
    x = np.random.default_rng(N).normal(size=(N, weight.shape[1])).astype(np.float32)
    exact = dequantize_group_np(q, scale, minimum, group_size).astype(np.float64)
    parts = pack_int4_np(q), scale, minimum
    tensors = [torch.from_numpy(part).to(device) for part in (x, *parts)]
    # Of scale·(x·q) and minimum·Σx one may be large where their sum is small.
    magnitude = np.abs(x) @ (np.abs(exact) + 15 * np.abs(np.repeat(
        scale, group_size, axis=1)[:, : weight.shape[1]])).T + 1e-30
    for y in (quantized_matmul_np(x, *parts, group_size),
              quantized_matmul_torch(*tensors, group_size).cpu().numpy()):
        assert y.dtype == np.float32 and y.shape == (N, len(weight))
        assert (np.abs(y - x @ exact.T) / magnitude).max() < 1e-5


# ── By hand ──────────────────────────────────────────────────────────────────────────────────


def test_int8_by_hand():
    q, scale = quantize_int8_np(np.array([[254.0, -1.0, 3.0, 5.0], [0, 0, 0, 0]]))
    assert q.tolist() == [[127, 0, 2, 2], [0, 0, 0, 0]]  # a half goes to the even number
    assert scale[0].tolist() == [2.0] and scale[1] != 0


def test_asymmetric_groups_by_hand():
    """Groups of 3, the last one short: 10 … 25 in steps of 1; −3 … 0 in steps of 0.2."""
    q, scale, minimum = quantize_group_np(np.array([[10.0, 25.0, 17.4, 0.0, -3.0]]), 3)
    assert q.tolist() == [[0, 15, 7, 15, 0]]
    np.testing.assert_allclose(scale, [[1, 0.2]], rtol=HALF_ULP)
    assert minimum.tolist() == [[10, -3]]


def test_symmetric_groups_by_hand():
    """−8 … 7 in steps of 2 to the left of 0; mirrored, where the largest number is positive."""
    weight = np.array([[-16.0, 14.0, 15.0, 0.0], [16.0, -14.0, -15.0, 3.0]])
    q, scale, minimum = quantize_group_np(weight, 4, symmetric=True)
    assert scale.tolist() == [[2], [-2]] and minimum.tolist() == [[-16], [16]]
    assert q.tolist() == [[0, 15, 15, 8], [0, 15, 15, 6]]  # 15.5 would round to 16: clipped


def test_packing_by_hand():
    assert pack_int4_np(np.array([[1, 2, 3]], np.uint8)).tolist() == [[0x21, 0x03]]
    assert unpack_int4_np(np.array([[0x21, 0xF3]], np.uint8), 3).tolist() == [[1, 2, 3]]


def test_a_product_by_hand():
    """W = [0.5·2 + 1, 0.5·4 + 1, 2·3 − 1] = [2, 3, 5];  (1, 10, 100)·W = 532."""
    packed = pack_int4_np(np.array([[2, 4, 3]], np.uint8))
    scale, minimum = np.float32([[0.5, 2]]), np.float32([[1, -1]])
    assert quantized_matmul_np(np.float32([[1, 10, 100]]), packed, scale, minimum, 2) == 532


# ── What is lost ─────────────────────────────────────────────────────────────────────────────


@a_few
@given(matrices())
def test_int8_is_off_by_half_a_scale_at_most(x):
    q, scale = quantize_int8_np(x)
    assert np.abs(q.astype(int)).max() <= 127
    assert (np.abs(q * scale - x) <= scale * (0.5 + 1e-4)).all()
    largest = np.abs(x).max(axis=1)
    assert (np.abs(q.astype(int)).max(axis=1) == np.where(largest == 0, 0, 127)).all()


@symmetric_or_not
@a_few
@given(matrices(), st.integers(1, 80))
def test_groups_are_off_by_half_a_scale_and_what_float16_costs(symmetric, x, group_size):
    """Symmetric reaches from −8 to 7 scales only: what lies beyond 7 may lose a whole one."""
    q, scale, minimum = quantize_group_np(x, group_size, symmetric)
    assert q.max() <= 15
    for number in (scale, minimum):
        np.testing.assert_array_equal(number, number.astype(np.float16).astype(np.float32))
    step, low = (np.repeat(np.abs(each), group_size, axis=1)[:, : x.shape[1]]
                 for each in (scale, minimum))
    rounded = 15 * np.maximum(HALF_ULP * step, SMALLEST_FLOAT16) + HALF_ULP * low
    error = np.abs(dequantize_group_np(q, scale, minimum, group_size) - x)
    assert (error <= step * (1.0 if symmetric else 0.5) + 1.01 * rounded).all()


@a_few
@given(matrices(), st.integers(1, 80))
def test_symmetric_keeps_the_number_of_largest_magnitude(x, group_size):
    x = x.astype(np.float16).astype(np.float32)
    q, scale, minimum = quantize_group_np(x, group_size, symmetric=True)
    values = dequantize_group_np(q, scale, minimum, group_size)
    for start in range(0, x.shape[1], group_size):
        group = x[:, start : start + group_size]
        at = np.abs(group).argmax(axis=1)[:, None]
        largest = np.take_along_axis(group, at, axis=1)
        kept = np.take_along_axis(values[:, start : start + group_size], at, axis=1)
        is_normal = np.abs(largest) >= 2.0**-11  # an eighth of it is a float16 as well
        np.testing.assert_array_equal(kept[is_normal], largest[is_normal])


def test_more_bits_and_smaller_groups_lose_less():
    weight = np.random.default_rng(0).standard_t(4, size=(64, 576)).astype(np.float32)

    def error(q, scale, minimum, group_size):
        return np.square(dequantize_group_np(q, scale, minimum, group_size) - weight).mean()

    def of_groups(group_size, symmetric=False):
        return error(*quantize_group_np(weight, group_size, symmetric), group_size)

    losses = [error(*quantize_int8_np(weight), None, 576), of_groups(32), of_groups(64),
              of_groups(128)]
    assert losses == sorted(losses)
    assert of_groups(32) < of_groups(32, symmetric=True)


# ── Extremes ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1e-45, 2e-43, 1e-39, 1e-30, 1e-9, 1e30, 3e38])
def test_int8_of_tiny_and_huge_numbers(value):
    """Nothing overflows and nothing is divided by zero; what has no scale becomes 0."""
    x = np.array([[value, -value / 2, 0.0]], np.float32)
    q, scale = quantize_int8_np(x)
    assert q.tolist() in ([[127, -64, 0]], [[0, 0, 0]]) and scale > 0
    assert np.abs(q * scale - x).max() <= max(1e-30, value / 254 * 1.01)
    for actual, expected in zip(quantize_int8_torch(torch.from_numpy(x)), (q, scale)):
        assert_same(actual, expected)


@pytest.mark.filterwarnings("error")
@symmetric_or_not
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-39, 1e-9, 1e-7, 60000.0])
def test_groups_of_tiny_and_huge_numbers(symmetric, value):
    x = np.array([[value, -value, 0.0, value / 2, value]], np.float32)
    q, scale, minimum = quantize_group_np(x, 3, symmetric)
    values = dequantize_group_np(q, scale, minimum, 3)
    assert np.isfinite(values).all()
    assert np.abs(values - x).max() <= value / (7.9 if symmetric else 14) + 8 * SMALLEST_FLOAT16


def test_groups_of_equal_numbers():
    q, scale, minimum = quantize_group_np(np.full((2, 5), 0.75), 4)
    assert not q.any() and (scale == 1).all() and (minimum == 0.75).all()
    parts = quantize_group_np(np.full((2, 5), 0.75), 4, symmetric=True)
    assert (dequantize_group_np(*parts, 4) == 0.75).all()


@symmetric_or_not
def test_groups_stop_at_the_ends_of_float16(symmetric):
    for value in (3e6, np.inf):
        _, scale, minimum = quantize_group_np(np.array([[-value, value]]), 2, symmetric)
        assert np.abs(scale) == 65504 and np.isfinite(minimum).all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(value):
    """A row of activations with a NaN must not become a row of plausible integers."""
    x = np.array([[1.0, value, -2.0], [1.0, 2.0, -2.0]], np.float32)
    scales = quantize_int8_np(x)[1], quantize_int8_torch(torch.from_numpy(x))[1].numpy()
    for scale in scales:
        assert np.isfinite(scale).tolist() == [[False], [True]]
    if np.isnan(value):
        for scale, minimum in (quantize_group_np(x, 2)[1:],
                               quantize_group_torch(torch.from_numpy(x), 2)[1:]):
            assert np.isnan(np.asarray(scale)).tolist() == [[True, False], [False, False]]
            assert np.isnan(np.asarray(minimum))[0, 0]


def test_a_group_size_below_1_is_refused():
    for quantize, x in ((quantize_group_np, np.ones((2, 3))),
                        (quantize_group_torch, torch.ones(2, 3))):
        with pytest.raises(ValueError, match="group_size is 0, must be at least 1"):
            quantize(x, 0)


# ── gguf, the oracle ─────────────────────────────────────────────────────────────────────────

READERS = {Format.Q8_0: read_q8_0, Format.Q4_0: read_q4_0, Format.Q4_1: read_q4_1}


def matrix_of(block_format, raw):
    q, scale, *minimum = READERS[block_format](raw)
    assert q.shape == (len(raw), 32 * scale.shape[1]) and scale.dtype == np.float32
    return int4_matrix(q, scale, *minimum, 32) if minimum else Int8(q, scale, 32)


@pytest.mark.parametrize("block_format", READERS, ids=lambda each: each.name)
def test_a_matrix_of_blocks_has_the_numbers_of_gguf(block_format):
    """Of a real quantization, and of any bytes at all."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(7, 96)).astype(np.float32)
    block_bytes = gguf.GGML_QUANT_SIZES[block_format][1]
    any_bytes = rng.integers(0, 256, (40, 3 * block_bytes), np.uint8)
    any_bytes.reshape(-1, block_bytes)[:, [1, 3]] &= 0xBB  # no infinities and NaN in float16
    for raw in (gguf.quants.quantize(weight, block_format).view(np.uint8), any_bytes):
        matrix = matrix_of(block_format, raw)
        expected = gguf.quants.dequantize(raw, block_format)
        np.testing.assert_array_equal(matrix.dequantize_np(), expected, strict=True)
        np.testing.assert_array_equal(matrix.dequantize_np([5, 0]), expected[[5, 0]], strict=True)


@pytest.mark.parametrize("shape", [(64, 576), (33, 96)])
@pytest.mark.parametrize("kind", ["normal", "outliers"])
@pytest.mark.parametrize("block_format, symmetric", [(Format.Q4_0, True), (Format.Q4_1, False)],
                         ids=["Q4_0", "Q4_1"])
def test_rounding_to_4_bits_loses_no_more_than_gguf(shape, kind, block_format, symmetric):
    rng = np.random.default_rng(1)
    weight = (rng.normal(size=shape) if kind == "normal" else rng.standard_t(3, size=shape))
    weight = (0.05 * weight).astype(np.float32)
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight, block_format), block_format)
    ours = dequantize_group_np(*quantize_group_np(weight, 32, symmetric), 32)
    assert np.square(ours - weight).sum() <= np.square(theirs - weight).sum()


def test_int8_in_groups_of_32_is_that_of_gguf():
    """Q8_0 is our int8, with a row for every 32 numbers, and a scale in float16."""
    weight = np.random.default_rng(2).normal(size=(5, 96)).astype(np.float32)
    theirs, scale = read_q8_0(gguf.quants.quantize(weight, Format.Q8_0).view(np.uint8))
    q, ours = quantize_int8_np(weight.reshape(-1, 32))
    np.testing.assert_allclose(scale.reshape(-1, 1), ours, rtol=HALF_ULP)
    assert np.abs(q.reshape(theirs.shape).astype(int) - theirs).max() <= 1  # halves, otherwise
    assert (q.reshape(theirs.shape) == theirs).mean() > 0.99
