"""Exercise of chapter 11_quantization: write quantize_int8_np, quantize_group_np, pack_int4_np and
quantized_matmul_np.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 11
    python -m minillm generate "Once upon a time" --temperature 0 --quantize int4 \
        --impl chapters/11_quantization/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write quantize_int8_torch,
quantize_group_torch, pack_int4_torch and quantized_matmul_torch below, in PyTorch, and the same
checks run on them.

Shapes: N flattened new tokens of a whole batch.
"""

from __future__ import annotations

import numpy as np

from minillm.quantization import (
    check_group_size,
    round_to_float16_np,
    split_groups_np,
    unpack_int4_np,
)


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
    raise NotImplementedError("quantize_int8_np is yours to write")


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
    raise NotImplementedError("quantize_group_np is yours to write")


def pack_int4_np(q):
    """Two 4-bit numbers a byte: entry 2i of a row in the low half of byte i, 2i + 1 in the high.

    q: [rows, columns] uint8 in 0 … 15  ->  [rows, ⌈columns/2⌉] uint8. Where there is an odd number
    of columns, the last high half is 0.

    >>> pack_int4_np(np.array([[1, 2, 15]], dtype=np.uint8))
    array([[33, 15]], dtype=uint8)
    """
    raise NotImplementedError("pack_int4_np is yours to write")


def quantized_matmul_np(x, packed, scale, minimum, group_size):
    """x·Wᵀ for a 4-bit matrix that is never there as a whole in float: group by group.

        y = Σ over groups g of   scale_g·(x_g·q_gᵀ) + minimum_g·Σ x_g

    The scale stands outside the product, and the minimum meets the sum of the group's activations:
    what is multiplied are the integers themselves, as in llama.cpp's product of Q4_1 blocks.

    x: [N, columns] float, packed: [rows, ⌈columns/2⌉] uint8 as pack_int4 makes it, scale and
    minimum: [rows, ⌈columns/group_size⌉], the last group perhaps short  ->  [N, rows] float32.
    """
    raise NotImplementedError("quantized_matmul_np is yours to write")
