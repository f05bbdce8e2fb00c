"""How are numbers written with fewer bits, and what is lost?

A decoded token reads every weight once, so fewer bytes a weight are more tokens a second. A row
(int8) or a group of a row (4 bits) shares one scale, and each number becomes a small integer:
value = scale·q, or scale·q + minimum. What is lost is what rounding takes, up to half a scale: it
is the largest number of a row that decides how coarse the others become.

Chapter 11_quantization tells the story. `quantized_linear.py` multiplies by such matrices,
`quantize_model.py` puts them in a model. Left out here: methods that look at data
(`smoothquant.py`, `gptq.py`), and formats of fewer than four bits.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .exercise import exercise

torch = lazy.load("torch")


@exercise("11_quantization", order=1)
def quantize_int8_np(x):
    """Symmetric int8, one scale a row: of a weight matrix, or of a token's activations.

        scale = max|row| / 127,   q = round(row / scale),   value = scale·q
                                            (Dettmers et al. 2022, "LLM.int8()", §2, row-wise)

    x: [rows, columns] float  ->  q [rows, columns] int8 in −127 … 127, scale [rows, 1] float32.
    −128 is not used, so that a range and its mirror image are one. A row of zeros has q = 0, and
    any scale but 0; so may one of numbers below 1e-30, since a 127th of them may be 0 in float32.
    The scale of a row with a NaN or an infinity is not finite, so that the mistake stays visible.

    >>> q, scale = quantize_int8_np(np.array([[0.6, -1.0, 0.25]]))
    >>> q, (scale * 127).round(3)
    (array([[  76, -127,   32]], dtype=int8), array([[1.]], dtype=float32))
    """
    wide = x.astype(np.float32)
    largest = np.abs(wide).max(axis=1, keepdims=True)  # [R, 1]
    scale = np.where(largest < 1e-30, np.ones_like(largest), largest / 127)
    return np.round(wide / scale).astype(np.int8), scale


def quantize_int8_torch(x):
    """Same contract as quantize_int8_np."""
    wide = x.to(torch.float32)
    largest = torch.abs(wide).amax(dim=1, keepdim=True)
    scale = torch.where(largest < 1e-30, torch.ones_like(largest), largest / 127)
    return torch.round(wide / scale).to(torch.int8), scale


@exercise("11_quantization", order=2)
def quantize_group_np(weight, group_size, symmetric=False):
    """4 bits a weight, with a scale and a minimum for every `group_size` neighbours of a row.

        asymmetric   scale = (max − min) / 15,                minimum = min           (GGUF's Q4_1)
        symmetric    scale = (what is largest in magnitude) / −8,   minimum = −8·scale     (Q4_0)
        q = round((value − minimum) / scale), clipped to 0 … 15;     value ≈ scale·q + minimum

    Symmetric puts the number of largest magnitude on q = 0 exactly, whatever its sign, for which
    the scale may be negative; then the minimum need not be stored. The scale, and the minimum of an
    asymmetric group, are rounded to float16, as files keep them, before q is chosen: rounding q
    makes up for it. A symmetric minimum is −8 times the rounded scale, and not rounded again.

    weight: [rows, columns]  ->  q [rows, columns] uint8, scale and minimum float32, each
    [rows, ⌈columns/group_size⌉]. Where group_size does not divide the columns, the last group of a
    row is the short one. An asymmetric group whose rounded scale would be 0, for one in which all
    numbers are equal, has scale 1 and q = 0. A symmetric group of zeros may have any scale and q
    for which scale·q + minimum is 0. What is rounded stops at float16's ends, ±65504; a NaN makes
    its group NaN.   Raises ValueError if group_size < 1.

    >>> q, scale, minimum = quantize_group_np(np.array([[0.0, 15.0, 1.75, -2.0]]), 2)
    >>> q.tolist(), scale.tolist(), minimum.tolist()
    ([[0, 15, 15, 0]], [[1.0, 0.25]], [[0.0, -2.0]])
    """
    check_group_size(group_size)
    groups = split_groups_np(weight.astype(np.float32), group_size)  # [R, groups, group_size]
    low, high = groups.min(axis=2), groups.max(axis=2)  # [R, groups]
    if symmetric:
        scale = np.where(-low >= high, low, high) / -8
    else:
        scale = (high - low) / 15
    scale = round_to_float16_np(scale)
    scale = np.where(scale == 0, np.ones_like(scale), scale)
    minimum = -8 * scale if symmetric else round_to_float16_np(low)
    q = np.round((groups - minimum[:, :, None]) / scale[:, :, None]).clip(0, 15)
    return q.astype(np.uint8).reshape(len(weight), -1)[:, : weight.shape[1]], scale, minimum


def quantize_group_torch(weight, group_size, symmetric=False):
    """Same contract as quantize_group_np."""
    check_group_size(group_size)
    groups = split_groups_torch(weight.to(torch.float32), group_size)
    low, high = groups.amin(dim=2), groups.amax(dim=2)
    if symmetric:
        scale = torch.where(-low >= high, low, high) / -8
    else:
        scale = (high - low) / 15
    scale = round_to_float16_torch(scale)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    minimum = -8 * scale if symmetric else round_to_float16_torch(low)
    q = torch.round((groups - minimum[:, :, None]) / scale[:, :, None]).clip(0, 15)
    return q.to(torch.uint8).reshape(len(weight), -1)[:, : weight.shape[1]], scale, minimum


def split_groups_np(x, group_size):
    """x: [rows, columns]  ->  [rows, ⌈columns/group_size⌉, group_size].

    A short last group is filled up with its last number.
    Repeating changes neither the largest nor the smallest number of the group.
    """
    R, C = x.shape
    padding = -C % group_size
    padded = np.concatenate([x, np.repeat(x[:, -1:], padding, axis=1)], axis=1)
    return padded.reshape(R, -1, group_size)


def split_groups_torch(x, group_size):
    """Same contract as split_groups_np."""
    R, C = x.shape
    padding = -C % group_size
    padded = torch.cat([x, x[:, -1:].repeat(1, padding)], dim=1)
    return padded.reshape(R, -1, group_size)


def round_to_float16_np(x):
    """The nearest float16 there is (65504 at most), in float32."""
    return x.clip(-65504, 65504).astype(np.float16).astype(np.float32)


def round_to_float16_torch(x):
    """Same contract as round_to_float16_np."""
    return x.clip(-65504, 65504).to(torch.float16).to(torch.float32)


@exercise("11_quantization", order=3)
def pack_int4_np(q):
    """Two 4-bit numbers a byte: entry 2i of a row in the low half of byte i, 2i + 1 in the high.

    q: [rows, columns] uint8 in 0 … 15  ->  [rows, ⌈columns/2⌉] uint8. Where there is an odd number
    of columns, the last high half is 0.

    >>> pack_int4_np(np.array([[1, 2, 15]], dtype=np.uint8))
    array([[33, 15]], dtype=uint8)
    """
    C = q.shape[1]
    even = np.concatenate([q, np.zeros_like(q[:, : C % 2])], axis=1)
    return even[:, 0::2] | even[:, 1::2] << 4


def pack_int4_torch(q):
    """Same contract as pack_int4_np."""
    C = q.shape[1]
    even = torch.cat([q, torch.zeros_like(q[:, : C % 2])], dim=1)
    return even[:, 0::2] | even[:, 1::2] << 4


def unpack_int4_np(packed, num_columns):
    """The inverse of pack_int4_np.

    packed: [rows, ⌈columns/2⌉] uint8, and the number of columns  ->  [rows, num_columns] uint8.
    """
    pairs = np.stack([packed & 15, packed >> 4], axis=2)  # [R, ⌈C/2⌉, 2]
    return pairs.reshape(len(packed), -1)[:, :num_columns]


def unpack_int4_torch(packed, num_columns):
    """Same contract as unpack_int4_np."""
    pairs = torch.stack([packed & 15, packed >> 4], dim=2)
    return pairs.reshape(len(packed), -1)[:, :num_columns]


def dequantize_group_np(q, scale, minimum, group_size):
    """scale·q + minimum, each number with the scale and the minimum of its group.

    q: [rows, columns] integers, scale and minimum: [rows, ⌈columns/group_size⌉]
    ->  [rows, columns] float32.   Without a minimum (None): scale·q.
    """
    C = q.shape[1]
    values = q.astype(np.float32) * np.repeat(scale, group_size, axis=1)[:, :C]
    return values if minimum is None else values + np.repeat(minimum, group_size, axis=1)[:, :C]


def dequantize_group_torch(q, scale, minimum, group_size):
    """Same contract as dequantize_group_np."""
    C = q.shape[1]
    values = q.to(torch.float32) * scale.repeat_interleave(group_size, dim=1)[:, :C]
    return (values if minimum is None
            else values + minimum.repeat_interleave(group_size, dim=1)[:, :C])


@exercise("11_quantization", order=4)
def quantized_matmul_np(x, packed, scale, minimum, group_size):
    """x·Wᵀ for a 4-bit matrix that is never there as a whole in float: group by group.

        y = Σ over groups g of   scale_g·(x_g·q_gᵀ) + minimum_g·Σ x_g

    The scale stands outside the product, and the minimum meets the sum of the group's activations:
    what is multiplied are the integers themselves, as in llama.cpp's product of Q4_1 blocks.

    x: [N, columns] float, packed: [rows, ⌈columns/2⌉] uint8 as pack_int4 makes it, scale and
    minimum: [rows, ⌈columns/group_size⌉], the last group perhaps short  ->  [N, rows] float32.
    """
    (N, C), R = x.shape, len(packed)
    wide, q = x.astype(np.float32), unpack_int4_np(packed, C)
    y = np.zeros((N, R), dtype=np.float32)
    for g in range(scale.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        y += wide[:, part] @ q[:, part].T.astype(np.float32) * scale[:, g]
        y += wide[:, part].sum(axis=1, keepdims=True) * minimum[:, g]
    return y


def quantized_matmul_torch(x, packed, scale, minimum, group_size):
    """Same contract as quantized_matmul_np."""
    (N, C), R = x.shape, len(packed)
    wide, q = x.to(torch.float32), unpack_int4_torch(packed, C)
    y = torch.zeros((N, R), dtype=torch.float32, device=x.device)
    for g in range(scale.shape[1]):
        part = slice(g * group_size, (g + 1) * group_size)
        y += wide[:, part] @ q[:, part].T.to(torch.float32) * scale[:, g]
        y += wide[:, part].sum(dim=1, keepdim=True) * minimum[:, g]
    return y


def check_group_size(group_size):
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}, must be at least 1")
