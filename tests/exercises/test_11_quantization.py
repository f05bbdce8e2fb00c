"""Grader of chapter 11_quantization. README.md in this folder tells how graders are written.

Where a number lies half-way between two levels, either may be right; the inputs have none of these.
"""

from __future__ import annotations

import math

import numpy as np

from minillm.config import ModelConfig
from minillm.course import using
from minillm.course.check import as_array, check, close, equal, peak_bytes, raises, require
from minillm.kv_cache import KVCache
from minillm.kv_cache_int8 import KVCacheInt8
from minillm.linear import Dense
from minillm.model import LayerWeights, Weights, forward_np
from minillm.quantize_model import QuantizationFormat, quantize_matrix

RANGE = "sixteen numbers, 0 … 15, have fifteen steps between them: (max − min) / 15"
WHOLE = ("the whole matrix is there with four or more bytes a number: take one group of columns, "
         "multiply, add to y, go on")


# ── The oracles: plain loops over float64 numbers; the options make the usual mistakes ────────


def int8_loop(x, largest=None, levels=127, to_integer=round, scales=None):
    """largest(row): what becomes `levels`.   scales: one for each row, instead of the row's own."""
    largest = largest or (lambda row: max(abs(number) for number in row))
    q, scale = np.zeros(x.shape), np.zeros((len(x), 1))
    for r, row in enumerate(x.astype(np.float64).tolist()):
        scale[r] = scales[r] if scales is not None else largest(row) / levels or 1.0
        q[r] = [to_integer(number / scale[r, 0]) for number in row]
    return q, scale


def group_loop(weight, group_size, symmetric=False, make=None, keep=None, to_integer=round,
               clip=True, choose_before_rounding=False):
    """make(group): scale and minimum of a list of numbers.   keep(number): as it is stored."""
    make = make or (symmetric_scale if symmetric else asymmetric_scale)
    keep = keep or (lambda number: float(np.float16(number)))
    (R, C), num_groups = weight.shape, math.ceil(weight.shape[1] / group_size)
    q, scale, minimum = np.zeros((R, C)), np.zeros((R, num_groups)), np.zeros((R, num_groups))
    for r, g in np.ndindex(R, num_groups):
        part = slice(g * group_size, min(C, (g + 1) * group_size))
        group = weight[r, part].astype(np.float64).tolist()
        exact_scale, exact_minimum = make(group)
        scale[r, g] = keep(exact_scale)
        minimum[r, g] = -8 * scale[r, g] if symmetric else keep(exact_minimum)
        s, m = ((exact_scale, exact_minimum) if choose_before_rounding
                else (scale[r, g], minimum[r, g]))
        levels = [to_integer((number - m) / s) for number in group]
        q[r, part] = [min(15, max(0, level)) for level in levels] if clip else levels
    return q, scale, minimum


def asymmetric_scale(group, levels=15):
    return (max(group) - min(group)) / levels or 1.0, min(group)


def symmetric_scale(group, divisor=-8.0, pick=None):
    pick = pick or (lambda group: max(group, key=abs))
    scale = pick(group) / divisor or 1.0
    return scale, -8 * scale


def pack_loop(q):
    R, C = q.shape
    packed = np.zeros((R, (C + 1) // 2), dtype=np.uint8)
    for r, c in np.ndindex(R, C):
        packed[r, c // 2] |= int(q[r, c]) * (16 if c % 2 else 1) % 256
    return packed


def matmul_loop(x, q, scale, minimum, group_size, group_of=None, sum_of=None, low_first=True):
    """group_of(c): whose scale and minimum entry c has.   sum_of(row, g): what meets minimum_g."""
    group_of = group_of or (lambda c: c // group_size)
    sum_of = sum_of or (lambda row, g: sum(row[g * group_size : (g + 1) * group_size]))
    N, R, y = len(x), len(q), np.zeros((len(x), len(q)))
    rows = x.astype(np.float64).tolist()
    for n, r in np.ndindex(N, R):
        for c, number in enumerate(rows[n]):
            other = c if low_first or (c ^ 1) >= len(rows[n]) else c ^ 1
            y[n, r] += number * float(scale[r, group_of(c)]) * int(q[r, other])
        y[n, r] += sum(sum_of(rows[n], g) * float(minimum[r, g]) for g in range(minimum.shape[1]))
    return y


# ── quantize_int8_np ─────────────────────────────────────────────────────────────────────────


@check("one row, by hand: −1 becomes −127")
def int8_by_hand(quantize_int8_np):
    compare_int8(quantize_int8_np, np.array([[0.6, -1.0, 0.25]]))


@check("each row has a scale of its own")
def int8_rows(quantize_int8_np):
    compare_int8(quantize_int8_np, int8_rows_without_ties(5, 7))


@check("q is int8, scale float32, whatever float comes in")
def int8_dtypes(quantize_int8_np):
    for dtype in (np.float16, np.float32, np.float64):
        x = np.array([[0.6, -1.0, 0.25], [30.0, 14.1, -3.1]], dtype)
        q, scale = parts(quantize_int8_np(x), 2)
        equal([dtype_of(q), dtype_of(scale)], ["int8", "float32"], hint=(
            "q.astype(np.int8) is a byte a number, and the scale is float32, not what x was"))


@check("a float16 row is divided in float32")
def int8_narrow(quantize_int8_np):
    x = int8_rows_without_ties(3, 9).astype(np.float16)
    compare_int8(quantize_int8_np, x, hint=(
        "the scale is computed in float16, with three digits: x.astype(np.float32) first"))


@check("a row of zeros has q = 0, and a scale that can be divided by")
def int8_zeros(quantize_int8_np):
    x = np.stack([np.zeros(4), np.array([1.0, 0.3, -0.4, 0.0])])
    with np.errstate(all="ignore"):
        q, scale = parts(quantize_int8_np(x), 2)
    scale = as_array(scale, "an array [R, 1]")
    usable = scale.shape == (2, 1) and np.isfinite(scale).all() and scale[0, 0] != 0
    require(usable, "a finite scale other than 0", f"{scale.ravel().tolist()}",
            "0/0: the scale of a row of zeros must not be 0; any other will do")
    close(q, int8_loop(x)[0])


@check("a row of tiny numbers has a scale that can be divided by, too")
def int8_tiny(quantize_int8_np):
    x = np.array([[1e-44, -3e-45, 0.0], [1.0, 0.3, -0.4]], np.float32)
    with np.errstate(all="ignore"):
        q, scale = (as_array(each, "an array") for each in parts(quantize_int8_np(x), 2))
    require(np.isfinite(scale).all() and (scale != 0).all(), "finite scales other than 0",
            f"{scale.ravel().tolist()}", "a 127th of a tiny number is 0 in float32: compare the "
            "largest with 1e-30, not with 0")
    close(q * scale, np.stack([np.zeros(3), (np.multiply(*int8_loop(x[1:])))[0]]))


@check("a NaN or an infinity in a row is not hidden: its scale is not finite")
def int8_not_finite(quantize_int8_np):
    x = np.array([[1.0, np.nan, 0.3], [0.6, -1.0, 0.25], [-np.inf, 1.0, 2.0]], np.float32)
    with np.errstate(all="ignore"):
        q, scale = (as_array(each, "an array") for each in parts(quantize_int8_np(x), 2))
    equal(np.isfinite(scale).ravel().tolist(), [False, True, False], hint=(
        "a comparison with NaN is False: ask whether the largest is below 1e-30, and keep it in "
        "every other case"))
    close(q[1], int8_loop(x[1:2])[0][0])


@check("a row and its negative have the same scale and opposite q: −128 is not used")
def int8_mirror(quantize_int8_np):
    x = int8_rows_without_ties(4, 6)
    (q, scale), (mirrored, same) = (parts(quantize_int8_np(each), 2) for each in (x, -x))
    lowest = min(int(as_array(each, "an array").min()) for each in (q, mirrored))
    require(lowest > -128, "q from −127 to 127", f"{lowest}",
            "the largest number is divided by 128: −128 is there, and its mirror image is not")
    close(same, as_array(scale, "an array"), hint="the scale is max|row| / 127, of either sign")
    close(mirrored, -as_array(q, "an array"))


@check("a small random model gives the right logits with it: W8A8, and a cache of int8")
def int8_in_the_engine(quantize_int8_np):
    in_the_engine("w8a8", tolerance=1e-2, quantize_int8_np=quantize_int8_np)


# ── quantize_group_np ────────────────────────────────────────────────────────────────────────


@check("two groups, by hand: 0 … 15 in steps of 1, −2 … 1.75 in steps of ¼")
def group_by_hand(quantize_group_np):
    compare_group(quantize_group_np, np.array([[0.0, 15.0, 1.75, -2.0]]), 2)


@check("each group of each row has a scale and a minimum of its own")
def groups(quantize_group_np):
    weight = grid(R=3, num_groups=4, group_size=6)
    compare_group(quantize_group_np, weight, 6)


@check("symmetric, by hand: what is largest in magnitude is q = 0, be it −8 or 8")
def symmetric_by_hand(quantize_group_np):
    compare_group(quantize_group_np, np.array([[-8.0, 6.2, 0.3], [8.0, -6.2, 0.3]]), 3, True)


@check("symmetric groups: the minimum is −8·scale")
def symmetric_groups(quantize_group_np):
    compare_group(quantize_group_np, grid(R=3, num_groups=5, group_size=4, symmetric=True), 4, True)


@check("symmetric: there are eight levels on one side and seven on the other")
def clipped(quantize_group_np):
    weight = np.array([[-8.0, 7.9, 1.2], [-3.95, -1.1, 4.0]])
    compare_group(quantize_group_np, weight, 3, True)


@check("a group of equal numbers has scale 1 and q = 0")
def constant(quantize_group_np):
    weight = np.array([[0.25, 0.25, -2.0, -2.0], [0.0, 0.0, 3.0, 6.75]])
    with np.errstate(all="ignore"):
        compare_group(quantize_group_np, weight, 2, hint=(
            "max − min is 0: where the scale would be 0, it is 1"))
        q, *scales = (as_array(each, "an array") for each in parts(
            quantize_group_np(np.array([[1e-9, 3e-9]]), 2), 3))  # equal, for float16
    close([*q.ravel(), *scales[0].ravel()], [0, 0, 1], hint=(
        "max − min is not 0, but the scale is, once it is rounded to float16: then it is 1"))


@check("symmetric: a group of zeros stays zeros, and one of equal numbers is q = 0")
def symmetric_constant(quantize_group_np):
    with np.errstate(all="ignore"):
        q, scale, minimum = (as_array(each, "an array") for each in parts(quantize_group_np(
            np.array([[0.0, 0.0, 2.0, 2.0]]), 2, True), 3))
    value = scale.repeat(2, axis=1) * q + minimum.repeat(2, axis=1)
    close(value, [[0, 0, 2, 2]], hint=(
        "a group of zeros makes the scale 0, and 0/0: take another scale there"))


@check("where group_size does not divide C, the last group is short")
def short_group(quantize_group_np):
    weight = np.concatenate([grid(R=3, num_groups=2, group_size=5),
                             7 + grid(R=3, num_groups=1, group_size=3)], axis=1)  # far from 0
    compare_group(quantize_group_np, weight, 5)


@check("a group may be longer than a row")
def long_group(quantize_group_np):
    weight = 7 + grid(R=2, num_groups=1, group_size=5)
    compare_group(quantize_group_np, weight, 8)


@check("scale and minimum are float16 numbers, and q is chosen for these")
def rounded(quantize_group_np):
    rng = np.random.default_rng(5)
    for weight in (untied(100.03 + 0.06 * rng.random((3, 8)).cumsum(axis=1), 4),
                   untied(rng.normal(size=(3, 12)), 4)):  # far from 0; and with larger scales
        compare_group(quantize_group_np, weight, 4, mistakes={
            "q is chosen before scale and minimum are rounded to float16: round them first":
                group_loop(weight, 4, choose_before_rounding=True),
            "scale and minimum are not rounded to float16: round_to_float16_np does that":
                group_loop(weight, 4, keep=lambda number: number)}, hint=(
            "is the scale a float16 number, and the minimum as well?"))


@check("symmetric: the scale is a float16 number too, and the minimum is −8 times that")
def symmetric_rounded(quantize_group_np):
    weight = untied(np.random.default_rng(6).normal(size=(4, 12)), 6, symmetric=True)
    compare_group(quantize_group_np, weight, 6, True, mistakes={
        "scale and minimum are not rounded to float16: round_to_float16_np does that":
            group_loop(weight, 6, True, keep=lambda number: number)})


@check("what is rounded to float16 stops at its ends, ±65504")
def huge(quantize_group_np):
    for weight, symmetric, right in (([[-1e6, 1e6]], False, (65504, -65504)),
                                     ([[2e6, -1e6]], True, (-65504, 8 * 65504))):
        with np.errstate(all="ignore"):
            _, *scales = parts(quantize_group_np(np.array(weight), 2, symmetric), 3)
        got = [as_array(each, "an array").item() for each in scales]
        close(got, right, mistakes={
            "the minimum of a symmetric group is −8·scale, and is not rounded again":
                (-65504, 65504)}, hint="astype(np.float16) makes infinities of them: "
            "round_to_float16_np clips first" if np.isinf(got).any() else
            "the scale is rounded to float16, and so is the minimum of an asymmetric group")


@check("a NaN makes its group NaN, and no other")
def not_a_number(quantize_group_np):
    weight = np.array([[1.0, 2.0, np.nan, 4.0, 5.0, 6.0, 8.0, 7.0]])
    for symmetric in (False, True):
        with np.errstate(all="ignore"):
            q, scale, minimum = (as_array(each, "an array") for each in parts(
                quantize_group_np(weight, 4, symmetric), 3))
            value = scale.repeat(4, axis=1) * q + minimum.repeat(4, axis=1)
        equal(np.isnan(value).tolist(), [[True] * 4 + [False] * 4], hint=(
            "a NaN in the weights is a mistake that must stay visible: its group's scale or "
            "minimum is NaN"))


@check("q is uint8, scale and minimum float32")
def group_dtypes(quantize_group_np):
    for symmetric in (False, True):
        answer = parts(quantize_group_np(grid(R=2, num_groups=2, group_size=3), 3, symmetric), 3)
        equal([dtype_of(each) for each in answer], ["uint8", "float32", "float32"], hint=(
            "q.astype(np.uint8) is a byte a number until two are packed into one; scale and "
            "minimum are float16 numbers that are stored as float32"))


@check("a group of less than one number is refused")
def no_group(quantize_group_np):
    quantize_group_np(np.ones((1, 4)), 1)
    for group_size in (0, -2):
        raises(ValueError, quantize_group_np, np.ones((1, 4)), group_size, hint=(
            f"group_size {group_size} is taken: check_group_size(group_size) refuses it"))


@check("a small random model gives the right logits with it, asymmetric and symmetric")
def group_in_the_engine(quantize_group_np):
    for symmetric in (False, True):
        in_the_engine("int4", symmetric, quantize_group_np=quantize_group_np)


# ── pack_int4_np ─────────────────────────────────────────────────────────────────────────────


@check("three numbers, by hand: 1 + 2·16, and 15")
def pack_by_hand(pack_int4_np):
    compare_packed(pack_int4_np, np.array([[1, 2, 15]], np.uint8))


@check("neighbours share a byte, the first in the low half")
def pack_rows(pack_int4_np):
    compare_packed(pack_int4_np, levels(3, 8))


@check("every pair of levels has a byte of its own")
def pack_pairs(pack_int4_np):
    pairs = np.array([[low, high] for high in range(16) for low in range(16)], np.uint8)
    compare_packed(pack_int4_np, pairs)


@check("each row starts a new byte, also where C is odd")
def pack_odd(pack_int4_np):
    for R, C in ((1, 1), (4, 5), (2, 7)):
        compare_packed(pack_int4_np, levels(R, C))


@check("a packed row is bytes")
def pack_dtype(pack_int4_np):
    packed = pack_int4_np(levels(2, 6))
    require(packed is not None, "an array", "None", "is a `return` missing?")
    equal(dtype_of(packed), "uint8", hint="wider integers than q's own save nothing")


@check("a small random model gives the right logits with it")
def pack_in_the_engine(pack_int4_np):
    in_the_engine("int4", pack_int4_np=pack_int4_np)


# ── quantized_matmul_np ──────────────────────────────────────────────────────────────────────


@check("two weights, by hand: ½·3 − 1 and ½·5 − 1, times 1 and 2")
def matmul_by_hand(quantized_matmul_np):
    compare_matmul(quantized_matmul_np, np.array([[1.0, 2.0]]), np.array([[3, 5]], np.uint8),
                   np.array([[0.5]], np.float32), np.array([[-1.0]], np.float32), 2)


@check("each group has its own scale")
def matmul_scales(quantized_matmul_np):
    x, q, scale, minimum = problem(N=3, R=5, C=12, group_size=4)
    compare_matmul(quantized_matmul_np, x, q, scale, 0 * minimum, 4)


@check("each group's minimum meets the sum of that group's activations")
def matmul_minimum(quantized_matmul_np):
    compare_matmul(quantized_matmul_np, *problem(N=3, R=5, C=12, group_size=4), 4)


@check("groups of an odd size: their borders are in the middle of a byte")
def matmul_odd_groups(quantized_matmul_np):
    compare_matmul(quantized_matmul_np, *problem(N=2, R=4, C=15, group_size=3), 3, hint=(
        "unpack first (unpack_int4_np), then cut into groups"))


@check("the last group may be short, and C odd")
def matmul_short(quantized_matmul_np):
    for C, group_size in ((11, 4), (10, 4), (5, 8)):
        compare_matmul(quantized_matmul_np, *problem(N=2, R=3, C=C, group_size=group_size),
                       group_size, hint="the last group ends at C: how many columns does it have?")


@check("a scale may be negative, as symmetric groups have it")
def matmul_negative(quantized_matmul_np):
    x, q, scale, _ = problem(N=2, R=4, C=8, group_size=4)
    scale = scale * np.where(np.arange(scale.size).reshape(scale.shape) % 2, -1, 1)
    scale = scale.astype(np.float32)
    compare_matmul(quantized_matmul_np, x, q, scale, -8 * scale, 4)


@check("the answer is float32, and float16 activations do not overflow on the way", hint=(
    "the products are summed in float16: x.astype(np.float32) first"))
def matmul_narrow(quantized_matmul_np):
    x, q, scale, minimum = problem(N=2, R=3, C=8, group_size=4)
    for dtype, factor in ((np.float16, 3000), (np.float32, 1), (np.float64, 1)):
        narrow = (factor * x).astype(dtype)
        with np.errstate(all="ignore"):
            got = quantized_matmul_np(narrow, pack_loop(q), scale, minimum, 4)
        close(got, matmul_loop(narrow, q, scale, minimum, 4), tolerance=1e-4)
        equal(dtype_of(got), "float32", hint=(
            f"{np.dtype(dtype)} activations make another dtype: y is float32"))


@check("the matrix is never there as a whole in float", twin=False)  # NumPy's memory
def matmul_memory(quantized_matmul_np):
    x, q, scale, minimum = problem(N=1, R=512, C=1024, group_size=32)
    packed = q[:, 0::2] | q[:, 1::2] << 4
    quantized_matmul_np(x[:, :64], packed[:2, :32], scale[:2, :2], minimum[:2, :2], 32)
    peak = peak_bytes(quantized_matmul_np, x, packed, scale, minimum, 32)
    require(peak < 4 * q.size, f"less than the {4 * q.size:,} bytes of the matrix in float32",
            f"{peak:,} bytes at the peak", WHOLE)


@check("a small random model gives the right logits with it")
def matmul_in_the_engine(quantized_matmul_np):
    in_the_engine("int4", quantized_matmul_np=quantized_matmul_np)


# ── Comparing, with the usual mistakes ───────────────────────────────────────────────────────


def parts(answer, count):
    """The answer of a function that returns several arrays."""
    names = "q, scale, minimum".split(", ")[:count]
    require(isinstance(answer, (tuple, list)) and len(answer) == count,
            f"{count} arrays: {', '.join(names)}", f"a {type(answer).__name__}",
            f"the function ends in `return {', '.join(names)}`")
    return answer


def dtype_of(value):
    return str(np.asarray(value).dtype)


def compare_int8(quantize_int8_np, x, hint=None):
    with np.errstate(all="ignore"):
        answer = parts(quantize_int8_np(x), 2)
    everything, columns = np.abs(x).max(), np.abs(x).max(axis=0)
    mistakes = {
        "the largest number is divided by 128: −128 is there, and its mirror image is not":
            int8_loop(x, levels=128),
        "the largest number is divided by 255: there are 127 steps on each side of 0":
            int8_loop(x, levels=255),
        "the largest number is taken with its sign: a row whose largest is negative needs |row|":
            int8_loop(x, largest=max),
        "one scale is taken for all rows: max over axis 1, and keep that axis":
            int8_loop(x, scales=[float(everything) / 127] * len(x)),
        "astype cuts the fraction off: round first": int8_loop(x, to_integer=int),
        "the fraction is cut off downwards: round to the nearest":
            int8_loop(x, to_integer=math.floor),
        "the scale is upside down: 127 / max|row| multiplies, max|row| / 127 divides":
            (int8_loop(x)[0], 1 / int8_loop(x)[1]),
    }
    expected = int8_loop(x)
    shape_hints = {
        (len(x),): "the scale is [R, 1], so that it divides a row: keepdims=True",
        (): "one scale is taken for all rows: max over axis 1, and keep that axis",
        (1, 1): "one scale is taken for all rows: max over axis 1, and keep that axis",
        (1, len(columns)): "a scale is taken for each column, not for each row",
    }
    compare(("scale", "q"), reversed(answer), reversed(expected),
            {symptom: wrong[::-1] for symptom, wrong in mistakes.items()}, hint, shape_hints)


def compare_group(quantize_group_np, weight, group_size, symmetric=False, hint=None, mistakes=()):
    with np.errstate(all="ignore"):
        q, *scales = parts(quantize_group_np(weight, group_size, symmetric), 3)
    expected = group_loop(weight, group_size, symmetric)
    row = weight.shape[1]
    known = dict(mistakes) | {"q is cut off, not rounded": group_loop(
        weight, group_size, symmetric, to_integer=int)}
    if symmetric:
        known |= {
            "symmetric is not looked at": group_loop(weight, group_size),
            "the scale is that of the magnitude: what is largest is divided by −8 with its sign":
                group_loop(weight, group_size, True, lambda group: magnitude(group, 8)),
            "the scale is max|value| / 7, which leaves one of the sixteen levels unused":
                group_loop(weight, group_size, True, lambda group: magnitude(group, 7)),
            "the largest number is taken, not the one of largest magnitude":
                group_loop(weight, group_size, True,
                           lambda group: symmetric_scale(group, pick=max)),
            "the number of largest magnitude is divided by 8, not by −8":
                group_loop(weight, group_size, True, lambda group: symmetric_scale(group, 8.0)),
            "q is not clipped: 16 does not fit in four bits":
                group_loop(weight, group_size, True, clip=False),
        }
    else:
        known |= {
            f"the range is divided by 16: {RANGE}": group_loop(
                weight, group_size, make=lambda group: asymmetric_scale(group, 16)),
            "the minimum is not a number of the row but a level (a zero point)":
                zero_point(*expected),
        }
        if row % group_size:
            known["the short group is filled up with zeros, and these take part in its range: "
                  "repeat one of its numbers instead, as split_groups_np does"] = group_loop(
                weight, group_size, make=lambda group: (
                    with_zero if len(group) < group_size else asymmetric_scale)(group))
        known["the range always contains 0"] = group_loop(weight, group_size, make=with_zero)
        if group_size < row:
            known["one scale is taken for the whole row"] = repeated_row(weight, group_size)
    compare(("scale", "minimum", "q"), (*scales, q), (*expected[1:], expected[0]),
            {symptom: (*wrong[1:], wrong[0]) for symptom, wrong in known.items()}, hint,
            {(len(weight), row // group_size): "the short last group has no scale of its own",
             (len(weight), 1): "one scale is taken for the whole row"})


def magnitude(group, levels):
    scale = max(map(abs, group)) / levels or 1.0
    return scale, -8 * scale


def with_zero(group):
    return asymmetric_scale([*group, 0.0])


def zero_point(q, scale, minimum):
    return q, scale, np.round(-minimum / scale)


def repeated_row(weight, group_size):
    q, scale, minimum = group_loop(weight, weight.shape[1])
    num_groups = math.ceil(weight.shape[1] / group_size)
    return q, scale.repeat(num_groups, axis=1), minimum.repeat(num_groups, axis=1)


def compare(names, answer, expected, mistakes, hint, shape_hints):
    """Array by array. What is off by one in the last digit is a matter of float32."""
    for index, (name, got, right) in enumerate(zip(names, answer, expected)):
        got = as_array(got, f"{name}, an array of shape {right.shape}")
        require(got.shape == right.shape, f"{name} of shape {right.shape}",
                f"shape {got.shape}", shape_hints.get(got.shape))
        close(got, right, tolerance=2e-6, hint=hint, mistakes={
            symptom: wrong[index] for symptom, wrong in mistakes.items()})


def compare_packed(pack_int4_np, q):
    packed, (R, C), right = pack_int4_np(q), q.shape, pack_loop(q)
    packed = as_array(packed, f"an array of shape {right.shape}")
    flat = pack_loop(q.reshape(1, -1))
    require(packed.shape == right.shape, f"an array of shape {right.shape}",
            f"one of shape {packed.shape}", {
                (R, C // 2): "where C is odd, the last number is lost: it has a byte too",
                flat.shape: "rows run into each other: each starts a new byte",
                flat.shape[1:]: "rows run into each other: each starts a new byte",
                (R, C): "nothing is packed: two numbers share a byte",
                ((R + 1) // 2, C): "two rows share a byte: neighbours of a row do",
            }.get(packed.shape))
    half = (C + 1) // 2
    swapped = pack_loop(padded(q, 2 * half).reshape(R, half, 2)[:, :, ::-1].reshape(R, -1))
    halves = q[:, :half] + 16 * padded(q[:, half:].astype(int), half)
    close(packed, right, mistakes={
        "the halves are exchanged: entry 2i is in the low half": swapped,
        "where C is odd, the last number stands in the high half": odd_in_high_half(q, right),
        "the halves of a row share bytes, as in GGUF's blocks: here it is neighbours": halves,
        "the shift is lost: high << 4 is high·16": q[:, 0::2] | padded(q[:, 1::2], half),
        "the shift is by 8 bits, which leaves nothing of a byte: by 4": q[:, 0::2],
    })


def padded(q, C):
    return np.pad(q, ((0, 0), (0, C - q.shape[1])))


def odd_in_high_half(q, right):
    wrong = right.astype(int)
    if q.shape[1] % 2:
        wrong[:, -1] = 16 * q[:, -1].astype(int)
    return wrong


def compare_matmul(quantized_matmul_np, x, q, scale, minimum, group_size, hint=None):
    def wrong(x=x, minimum=minimum, **options):
        return matmul_loop(x, q, scale, minimum, group_size, **options)

    num_groups = scale.shape[1]
    with np.errstate(all="ignore"):
        got = quantized_matmul_np(x, pack_loop(q), scale, minimum, group_size)
    mistakes = {
        "the minimum is left out": wrong(minimum=0 * minimum),
        "the minimum is added once, and not for every activation: it meets their sum":
            wrong(sum_of=lambda row, g: 1.0),
        "the minimum meets the sum of all activations, not of its group's":
            wrong(sum_of=lambda row, g: sum(row)),
        "the minimum is subtracted": wrong(minimum=-minimum),
        "the minimum is multiplied by the scale: it is a value, not a level":
            wrong(minimum=minimum * scale),
        "all groups have the first group's scale": wrong(group_of=lambda c: 0),
        "scales go by column number modulo the groups: they are of neighbours":
            wrong(group_of=lambda c: c % num_groups),
        "the two halves of a byte are exchanged: the first is the low one":
            wrong(low_first=False),
        "8 is taken off q, which the minimum does already":
            wrong() - 8 * matmul_loop(x, np.ones_like(q), scale, 0 * minimum, group_size),
    }
    if q.shape[1] % group_size:
        full = q.shape[1] // group_size * group_size
        if full:
            mistakes["the short last group is left out"] = matmul_loop(
                x[:, :full], q[:, :full], scale[:, :-1], minimum[:, :-1], group_size)
    right = wrong()
    require(np.shape(got) != right.T.shape or right.shape == right.T.shape,
            f"an array of shape {right.shape}", f"one of shape {right.T.shape}",
            "the answer is [N, R], a row a token")
    close(got, right, tolerance=1e-5, hint=hint, mistakes=mistakes)


# ── Inputs ───────────────────────────────────────────────────────────────────────────────────


def int8_rows_without_ties(R, C):
    """Each row has its largest, of either sign, and numbers at most 0.3 steps from a level."""
    rng = np.random.default_rng([R, C])
    x = rng.integers(-100, 100, size=(R, C)) + rng.uniform(-0.3, 0.3, size=(R, C))
    x[np.arange(R), rng.permutation(C)[:R]] = [127 * (-1) ** r for r in range(1, R + 1)]
    return x * (0.37 + 0.61 * np.arange(R))[:, None]


def grid(R, num_groups, group_size, symmetric=False):
    """Groups whose scale and minimum float16 has, and numbers at most 0.3 steps from a level."""
    rng = np.random.default_rng([R, num_groups, group_size])
    shape = (R, num_groups, group_size)
    q = rng.integers(1, 15, size=shape) + rng.uniform(-0.3, 0.3, size=shape)
    scale = rng.integers(8, 40, size=(R, num_groups, 1)) / 64
    minimum = rng.integers(-90, 40, size=(R, num_groups, 1)) / 32
    if symmetric:
        scale = scale * np.where(rng.permutation(R * num_groups).reshape(R, num_groups, 1) % 2,
                                 -1, 1)
        minimum = -8 * scale
    q[:, :, 1] = 0
    q[:, :, 2 % group_size] = 14.8 if symmetric else 15
    return (q * scale + minimum).reshape(R, -1)


def untied(weight, group_size, symmetric=False):
    """The weights in float32, but those close to the middle of two levels are moved onto one."""
    weight = weight.astype(np.float32)
    q, scale, minimum = (each.repeat(group_size, axis=1)[:, : weight.shape[1]] if number else each
                         for number, each in enumerate(group_loop(weight, group_size, symmetric)))
    is_tie = np.abs(np.abs((weight - minimum) / scale - q) - 0.5) < 0.1
    return np.where(is_tie, scale * q + minimum, weight).astype(np.float32)


def levels(R, C):
    return np.random.default_rng([R, C]).integers(0, 16, size=(R, C), dtype=np.uint8)


def problem(N, R, C, group_size):
    """x [N, C], q [R, C] and the scales and minima of its groups."""
    rng = np.random.default_rng([N, R, C])
    num_groups = math.ceil(C / group_size)
    scale = rng.uniform(0.1, 1, size=(R, num_groups)).astype(np.float32)
    minimum = rng.uniform(-3, 1, size=(R, num_groups)).astype(np.float32)
    return rng.normal(size=(N, C)).astype(np.float32), levels(R, C), scale, minimum


def in_the_engine(method, symmetric=False, tolerance=1e-4, **students):
    """Logits of a random model, quantized with one student's function and our loops."""
    loops = {"quantize_int8_np": typed_int8, "quantize_group_np": typed_group,
             "pack_int4_np": pack_loop, "quantized_matmul_np": packed_matmul}
    quantization_format = QuantizationFormat(method, 4, symmetric)
    with using(**loops):
        expected = logits_of_random_model(quantization_format)
    with using(**loops | students):
        got = logits_of_random_model(quantization_format)
    close(got, expected, tolerance=tolerance, hint=(
        "where all checks above pass, is the result of another shape or dtype?"))


def typed_int8(x):
    q, scale = int8_loop(x)
    return q.astype(np.int8), scale.astype(np.float32)


def typed_group(weight, group_size, symmetric=False):
    q, scale, minimum = group_loop(weight, group_size, symmetric)
    return q.astype(np.uint8), scale.astype(np.float32), minimum.astype(np.float32)


def packed_matmul(x, packed, scale, minimum, group_size):
    q = np.stack([packed % 16, packed // 16], axis=2).reshape(len(packed), -1)[:, : x.shape[1]]
    return matmul_loop(x, q, scale, minimum, group_size).astype(np.float32)


def logits_of_random_model(quantization_format):
    config = ModelConfig(vocab_size=13, hidden_size=11, intermediate_size=14, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=6)
    (H, K, D), C, rng = config.heads, config.hidden_size, np.random.default_rng(11)

    def matrix(rows, columns, is_layer=True):
        dense = Dense(rng.normal(size=(rows, columns)) / math.sqrt(columns))
        return quantize_matrix(dense, quantization_format, is_layer)

    layers = [LayerWeights(
        input_layernorm=rng.normal(size=C), qkv_proj=matrix((H + 2 * K) * D, C),
        o_proj=matrix(C, H * D), post_attention_layernorm=rng.normal(size=C),
        gate_proj=matrix(config.intermediate_size, C), up_proj=matrix(config.intermediate_size, C),
        down_proj=matrix(C, config.intermediate_size))
        for _ in range(config.num_hidden_layers)]
    embed_tokens = matrix(config.vocab_size, C, is_layer=False)
    weights = Weights(config, embed_tokens, layers, rng.normal(size=C), embed_tokens,
                      100.0 ** (-np.arange(D // 2) / (D // 2)))
    cache = (KVCacheInt8 if quantization_format.method == "w8a8" else KVCache)(config, 5)
    forward_np(weights, np.array([1, 2, 3]), np.arange(3), cache)
    return forward_np(weights, np.array([4, 5]), np.arange(3, 5), cache)
