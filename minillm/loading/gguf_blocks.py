"""What is in a Q4_1 block? How GGUF's number formats turn back into float32, and two are made.

A quantized row is cut into blocks of 32 weights, and a block holds small integers `q` and one or
two float16 numbers that they share:

    Q8_0    d  q0 ... q31                weight = d·q           q signed, 8 bits    34 bytes
    Q4_0    d  q0|q16 ... q15|q31        weight = d·(q - 8)     4 bits, 0 ... 15    18 bytes
    Q4_1    d  m  q0|q16 ... q15|q31     weight = d·q + m       4 bits, 0 ... 15    20 bytes

`q0|q16` is one byte with q0 in its low half and q16 in its high half: the trap of these formats is
that the halves are sixteen weights apart, not neighbours. Q4_1 costs 20·8/32 = 5 bits a weight.

Chapter 05_model tells the story of loading, 11_quantization that of quantizing. Left out on
purpose: the formats with blocks of 256 weights, which the `gguf` package reads for us.
"""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from ..errors import InputError
from ..quantization import quantize_group_np, round_to_float16_np

Q8_0_BLOCK = np.dtype([("d", "<f2"), ("q", "i1", 32)])
Q4_0_BLOCK = np.dtype([("d", "<f2"), ("q_pairs", "u1", 16)])
Q4_1_BLOCK = np.dtype([("d", "<f2"), ("m", "<f2"), ("q_pairs", "u1", 16)])


def dequantize(block_format, raw):
    """The numbers that `raw` stores in `block_format`, a gguf.GGMLQuantizationType.

    raw: [..., bytes of a row] uint8, contiguous   ->   [..., weights of a row] float32

    The array is fresh, and our own formats need an eighth of its size beside it at most. Raises
    InputError for a format that nobody can read.
    """
    if block_format in DEQUANTIZERS:
        flat = DEQUANTIZERS[block_format](raw.reshape(-1))
        return flat.reshape(*raw.shape[:-1], -1)
    try:
        return gguf.quants.dequantize(raw, block_format)
    except NotImplementedError as error:
        raise InputError(f"format {block_format.name} cannot be turned into float32; use a file "
                         f"in F16, Q8_0, Q4_K or another common format") from error


def dequantize_f32(raw):
    """Four bytes a number: sign, 8 bits of exponent, 23 bits of fraction."""
    return raw.view("<f4").astype(np.float32)


def dequantize_f16(raw):
    """Two bytes a number: sign, 5 bits of exponent, 10 bits of fraction."""
    return raw.view("<f2").astype(np.float32)


def dequantize_bf16(raw):
    """Two bytes a number: the upper half of a float32, whose lower half is zero."""
    bits = raw.view("<u2").astype(np.uint32)
    bits <<= 16
    return bits.view(np.float32)


def dequantize_q8_0(raw):
    """d·q for 32 signed bytes q.

        byte   0  1 | 2   3   ...  33
                d   | q0  q1  ...  q31
    """
    blocks = raw.view(Q8_0_BLOCK)
    weights = blocks["q"].astype(np.float32)                    # [blocks, 32]
    weights *= _column(blocks["d"])
    return weights


def dequantize_q4_0(raw):
    """d·(q - 8) for 32 half bytes q: a symmetric range around zero.

        byte   0  1 | 2        3        ...  17
                d   | q16:q0   q17:q1   ...  q31:q15        (high half : low half)
    """
    blocks = raw.view(Q4_0_BLOCK)
    weights = _unpack_halves(blocks["q_pairs"], np.float32)     # [blocks, 32]
    weights -= 8
    weights *= _column(blocks["d"])
    return weights


def dequantize_q4_1(raw):
    """d·q + m for 32 half bytes q: m is the smallest weight of the block.

        byte   0  1 | 2  3 | 4        5        ...  19
                d   |  m   | q16:q0   q17:q1   ...  q31:q15        (high half : low half)
    """
    blocks = raw.view(Q4_1_BLOCK)
    weights = _unpack_halves(blocks["q_pairs"], np.float32)     # [blocks, 32]
    weights *= _column(blocks["d"])
    weights += _column(blocks["m"])
    return weights


def read_q8_0(raw):
    """The integers and the scales, as `quantized_linear.Int8` takes them: nothing is computed.

    raw: [rows, bytes of a row] uint8  ->  q [rows, in] int8, scale [rows, in/32] float32
    """
    blocks = _blocks_by_row(raw, Q8_0_BLOCK)
    return blocks["q"].reshape(len(raw), -1), blocks["d"].astype(np.float32)


def read_q4_0(raw):
    """As read_q4_1: d·(q − 8) is d·q with a minimum of −8·d."""
    blocks = _blocks_by_row(raw, Q4_0_BLOCK)
    scale = blocks["d"].astype(np.float32)
    return _unpack_halves(blocks["q_pairs"], np.uint8).reshape(len(raw), -1), scale, -8 * scale


def read_q4_1(raw):
    """The integers, scales and minima, as `quantized_linear.Int4` takes them, unpacked.

    raw: [rows, bytes of a row] uint8  ->  q [rows, in] uint8, scale, minimum [rows, in/32] float32
    """
    blocks = _blocks_by_row(raw, Q4_1_BLOCK)
    q = _unpack_halves(blocks["q_pairs"], np.uint8).reshape(len(raw), -1)
    return q, blocks["d"].astype(np.float32), blocks["m"].astype(np.float32)


def quantize_q8_0(weight):
    """The blocks of a matrix: of every 32 numbers of a row, d = max|x| / 127 and q = round(x / d).

    weight: [rows, in], in a multiple of 32  ->  [rows, bytes of a row] uint8

    d is rounded to float16 first, and q chosen for the d that is kept: llama.cpp divides by the d
    before rounding, and its q are now and then off by one for that.
    """
    groups = weight.astype(np.float32).reshape(-1, 32)
    d = round_to_float16_np(np.abs(groups).max(axis=1, keepdims=True) / 127)
    blocks = np.empty(len(groups), Q8_0_BLOCK)
    blocks["d"] = d[:, 0]
    blocks["q"] = np.round(groups / np.where(d == 0, 1, d)).clip(-127, 127)
    return blocks.view(np.uint8).reshape(len(weight), -1)


def quantize_q4_0(weight):
    """The blocks of a matrix in Q4_0, which are `quantize_group`'s symmetric groups of 32.

    weight: [rows, in], in a multiple of 32  ->  [rows, bytes of a row] uint8
    """
    q, scale, _ = quantize_group_np(weight, 32, symmetric=True)
    q = q.reshape(-1, 32)
    blocks = np.empty(len(q), Q4_0_BLOCK)
    blocks["d"] = scale.reshape(-1)
    blocks["q_pairs"] = q[:, :16] | q[:, 16:] << 4
    return blocks.view(np.uint8).reshape(len(weight), -1)


def _blocks_by_row(raw, block):
    return np.ascontiguousarray(raw).reshape(-1).view(block).reshape(len(raw), -1)


def _unpack_halves(q_pairs, dtype):
    """q_pairs: [..., 16] uint8  ->  [..., 32] in dtype, low halves first."""
    q = np.empty((*q_pairs.shape[:-1], 32), dtype)
    q[..., :16] = q_pairs & 15
    q[..., 16:] = q_pairs >> 4
    return q


def _column(per_block):
    """[blocks] float16  ->  [blocks, 1] float32, to meet all 32 weights of a block."""
    return per_block.astype(np.float32)[:, None]


DEQUANTIZERS = {
    GGMLQuantizationType.F32: dequantize_f32,
    GGMLQuantizationType.F16: dequantize_f16,
    GGMLQuantizationType.BF16: dequantize_bf16,
    GGMLQuantizationType.Q8_0: dequantize_q8_0,
    GGMLQuantizationType.Q4_0: dequantize_q4_0,
    GGMLQuantizationType.Q4_1: dequantize_q4_1,
}
