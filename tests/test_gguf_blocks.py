"""Our dequantization gives the very numbers of the `gguf` package and of the drawings."""

from __future__ import annotations

import tracemalloc

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Format

from minillm.errors import InputError
from minillm.loading.gguf_blocks import DEQUANTIZERS, dequantize
from minillm.loading.gguf_container import GGUFContainer


@pytest.mark.parametrize("block_format", DEQUANTIZERS)
@pytest.mark.parametrize("shape", [(32,), (3, 64), (2, 5, 96)])
def test_random_numbers_equal_gguf(block_format, shape):
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=shape).astype(np.float32) * rng.choice([1e-3, 1, 1e3], shape[-1])
    raw = gguf.quants.quantize(numbers.astype(np.float32), block_format).view(np.uint8)
    result = dequantize(block_format, raw)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, gguf.quants.dequantize(raw, block_format), strict=True)


@pytest.mark.parametrize("block_format", [Format.Q8_0, Format.Q4_0, Format.Q4_1])
def test_random_bytes_equal_gguf(block_format):
    """Any block, also those that no quantizer writes: odd scales, every pair of halves."""
    block_bytes = gguf.GGML_QUANT_SIZES[block_format][1]
    raw = np.random.default_rng(1).integers(0, 256, (40, 3 * block_bytes), np.uint8)
    raw.reshape(-1, block_bytes)[:, [1, 3]] &= 0xBB  # d and m: no exponent of infinities and NaN
    np.testing.assert_array_equal(
        dequantize(block_format, raw), gguf.quants.dequantize(raw, block_format), strict=True)


def block(*half_floats, q):
    return np.frombuffer(np.array(half_floats, "<f2").tobytes() + bytes(q), np.uint8)


def test_q8_0_by_hand():
    weights = dequantize(Format.Q8_0, block(0.5, q=[1, 254] + [0] * 30))
    assert weights.tolist() == [0.5, -1.0] + [0.0] * 30


def test_q4_0_by_hand():
    weights = dequantize(Format.Q4_0, block(0.5, q=[0x9F] + [0x88] * 15))
    assert weights.tolist() == [3.5] + [0.0] * 15 + [0.5] + [0.0] * 15  # 0.5·(15-8), 0.5·(9-8)


def test_q4_1_by_hand():
    weights = dequantize(Format.Q4_1, block(0.5, -1.0, q=[0x9F] + [0x22] * 15))
    assert weights.tolist() == [6.5] + [0.0] * 15 + [3.5] + [0.0] * 15  # 0.5·15 - 1, 0.5·9 - 1


def test_bf16_is_the_upper_half_of_float32():
    raw = np.array([0x3F80, 0xC020], "<u2").view(np.uint8)
    assert dequantize(Format.BF16, raw).tolist() == [1.0, -2.5]


@pytest.mark.parametrize("block_format", DEQUANTIZERS)
def test_little_memory_is_needed_beside_the_result(block_format):
    raw = gguf.quants.quantize(np.ones((256, 1024), np.float32), block_format).view(np.uint8)
    tracemalloc.start()
    result = dequantize(block_format, raw)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert result.flags.writeable and not np.shares_memory(result, raw)
    assert peak_bytes < 1.15 * result.nbytes


def test_other_formats_come_from_gguf():
    raw = np.random.default_rng(2).integers(0, 256, (4, 2 * 144), np.uint8)
    raw[:, [1, 3, 145, 147]] = 0x20  # small finite scales
    result = dequantize(Format.Q4_K, raw)
    assert result.shape == (4, 512)
    np.testing.assert_array_equal(result, gguf.quants.dequantize(raw, Format.Q4_K))


def test_format_that_nobody_reads_is_refused_by_name():
    with pytest.raises(InputError, match="Q8_K"):
        dequantize(Format.Q8_K, np.zeros((2, 292), np.uint8))


def test_default_model_equals_gguf(model_path):
    file = GGUFContainer(model_path)
    for name in ["token_embd.weight", "blk.0.attn_q.weight", "blk.7.ffn_down.weight",
                 "blk.29.ffn_up.weight", "output_norm.weight"]:
        info, raw = file.tensors[name], file.raw(name)[:1000]
        np.testing.assert_array_equal(
            dequantize(info.block_format, raw), gguf.quants.dequantize(raw, info.block_format),
            strict=True)
