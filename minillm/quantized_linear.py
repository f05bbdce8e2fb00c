"""How does a layer multiply by a matrix of few bits?

Each class is a weight like `linear.Dense`: it computes x·Wᵀ and looks up rows, and the model cannot
tell. `Int8`, `Int4` and `W8A8` state the arithmetic in both backends, for any size. The classes
below them hand a matrix to an operator of PyTorch that reads the few bits as they are; these need a
CPU, bfloat16 activations and certain sizes. `kernels/quantized_matmul.py` goes before them where
the CPU has the instructions for it. Chapter 11_quantization tells the story.

NumPy has no product of integers that is fast: it turns each tile of a matrix into floats when it
multiplies. There, few bits save memory and cost time.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import lazy_loader as lazy
import numpy as np

from .quantization import (
    dequantize_group_np,
    dequantize_group_torch,
    quantize_int8_np,
    quantize_int8_torch,
    quantized_matmul_np,
    quantized_matmul_torch,
    unpack_int4_np,
    unpack_int4_torch,
)

torch = lazy.load("torch")

TILE_ROWS = 4096  # rows of a matrix that are floats at the same time


@dataclass(frozen=True)
class QuantizedMatrix:
    """What the classes below share."""

    def converted(self, move, convert, dtype):
        """The same matrix elsewhere: move(array) keeps an array's dtype, convert(array) gives it
        the model's, which is `dtype` and belongs to biases."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)}
        moved = {name: move(value) for name, value in arrays.items()
                 if isinstance(value, np.ndarray)}
        bias = None if self.bias is None else convert(self.bias)
        return replace(self, **{**moved, "bias": bias, "dtype": dtype})


@dataclass(frozen=True)
class Int8(QuantizedMatrix):
    """Signed bytes; a scale for each row, or for every `group_size` of a row (GGUF's Q8_0: 32).

    q: [out, in] int8   scale: [out, ⌈in/group_size⌉] float32   bias: [out] or None
    dtype: of the rows that it looks up, the dtype of the model.
    """

    q: np.ndarray | torch.Tensor
    scale: np.ndarray | torch.Tensor
    group_size: int
    bias: np.ndarray | torch.Tensor | None = None
    dtype: np.dtype | torch.dtype = np.float32

    @property
    def shape(self):
        return tuple(self.q.shape)

    def dequantize_np(self, rows=slice(None)):
        return dequantize_group_np(self.q[rows], self.scale[rows], None, self.group_size)

    def dequantize_torch(self, rows=slice(None)):
        return dequantize_group_torch(self.q[rows], self.scale[rows], None, self.group_size)

    def matmul_np(self, x):
        tiles = [x @ self.dequantize_np(rows).T.astype(x.dtype) for rows in row_tiles(self.q)]
        return np.concatenate(tiles, axis=1)

    def matmul_torch(self, x):
        tiles = [x @ self.dequantize_torch(rows).T.to(x.dtype) for rows in row_tiles(self.q)]
        return torch.cat(tiles, dim=1)

    def rows_np(self, ids):
        return self.dequantize_np(ids).astype(self.dtype)

    def rows_torch(self, ids):
        return self.dequantize_torch(ids).to(self.dtype)


@dataclass(frozen=True)
class Int4(QuantizedMatrix):
    """Two weights a byte; a scale and a minimum for every `group_size` of a row.

    packed: [out, ⌈in/2⌉] uint8 of `pack_int4`   scale, minimum: [out, ⌈in/group_size⌉] float32
    """

    packed: np.ndarray | torch.Tensor
    scale: np.ndarray | torch.Tensor
    minimum: np.ndarray | torch.Tensor
    group_size: int
    in_size: int
    bias: np.ndarray | torch.Tensor | None = None
    dtype: np.dtype | torch.dtype = np.float32

    @property
    def shape(self):
        return len(self.packed), self.in_size

    def dequantize_np(self, rows=slice(None)):
        q = unpack_int4_np(self.packed[rows], self.in_size)
        return dequantize_group_np(q, self.scale[rows], self.minimum[rows], self.group_size)

    def dequantize_torch(self, rows=slice(None)):
        q = unpack_int4_torch(self.packed[rows], self.in_size)
        return dequantize_group_torch(q, self.scale[rows], self.minimum[rows], self.group_size)

    def matmul_np(self, x):
        return quantized_matmul_np(x, self.packed, self.scale, self.minimum,
                                   self.group_size).astype(x.dtype)

    def matmul_torch(self, x):
        return quantized_matmul_torch(x, self.packed, self.scale, self.minimum,
                                      self.group_size).to(x.dtype)

    def rows_np(self, ids):
        return self.dequantize_np(ids).astype(self.dtype)

    def rows_torch(self, ids):
        return self.dequantize_torch(ids).to(self.dtype)


@dataclass(frozen=True)
class W8A8(Int8):
    """Bytes times bytes: the activations of each token are quantized as well, when they arrive.

    The sum of products is an integer, and is scaled once:  y = (q_x·q_Wᵀ)·scale_x·scale_W
    (Xiao et al. 2023, "SmoothQuant", eq. 2; dynamic, by token). One scale a row: group_size = in.
    """

    def matmul_np(self, x):
        q_x, scale_x = quantize_int8_np(x)
        y = int8_matmul_np(q_x, self.q) * scale_x * self.scale.T
        return y.astype(x.dtype)

    def matmul_torch(self, x):
        q_x, scale_x = quantize_int8_torch(x)
        y = int8_matmul_torch(q_x, self.q) * scale_x * self.scale.T
        return y.to(x.dtype)


def int8_matmul_np(a, b):
    """a·bᵀ of signed bytes, a [N, K], b [R, K]  ->  [N, R], whole numbers as float32.

    BLAS knows no bytes, so the integers are multiplied as float32: exact while a sum stays below
    2²⁴, and beyond (more than 1040 products of 127·127) rounded in its last bits.
    """
    return a.astype(np.float32) @ b.T.astype(np.float32)


def int8_matmul_torch(a, b):
    """Same contract as int8_matmul_np; on a CPU exact, by an operator that sums in int32."""
    if a.device.type == "cpu" and a.shape[1] > 1:  # of one column, its answers are wrong
        return torch._int_mm(a, b.T).to(torch.float32)
    return a.to(torch.float32) @ b.T.to(torch.float32)


def row_tiles(matrix):
    """Slices that cover the rows of a matrix, a tile each."""
    return [slice(start, start + TILE_ROWS) for start in range(0, len(matrix), TILE_ROWS)]


class PackedInt8:
    """Int8 by row through PyTorch's operator, which turns bytes into floats in its registers."""

    def __init__(self, matrix):
        self.matrix = matrix  # the operator reads q as it is
        self.scale = matrix.scale[:, 0].to(torch.bfloat16)
        self.bias = matrix.bias

    def matmul_torch(self, x):
        return torch.ops.aten._weight_int8pack_mm(x, self.matrix.q, self.scale)

    def rows_torch(self, ids):
        return self.matrix.rows_torch(ids)


class PackedInt4:
    """Int4 in the order in which PyTorch's operator reads it; what it computes is

        value = scale·(q − 8) + zero        so that   zero = minimum + 8·scale

    The order depends on the instruction set and is never stored. A packed matrix has no rows: where
    these are looked up (has_rows), the one that it was made from is kept beside it.
    """

    def __init__(self, matrix, has_rows):
        self.matrix = matrix if has_rows else None
        q = unpack_int4_torch(matrix.packed, matrix.in_size)
        scale, minimum = (regroup(each, matrix.in_size, matrix.group_size)
                          for each in (matrix.scale, matrix.minimum))
        self._pack(q, scale, minimum + 8 * scale)
        self.bias = matrix.bias

    def _pack(self, q, scale, zero):
        """q: [out, in] in 0 … 15; scale and zero: [out, groups], the groups as the operator's."""
        self.group_size = q.shape[1] // scale.shape[1]
        scale_zero = torch.stack([scale, zero], dim=2).transpose(0, 1)  # [groups, out, 2]
        self.scale_zero = scale_zero.to(torch.bfloat16).contiguous()
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)

    def matmul_torch(self, x):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, self.group_size,
                                                          self.scale_zero)

    def rows_torch(self, ids):
        return self.matrix.rows_torch(ids)


class PackedInt8Groups(PackedInt4):
    """Int8 with groups (Q8_0), for which PyTorch has no operator: as two matrices of 4 bits.

    A signed byte is 16·high + low, with high in −8 … 7 and low in 0 … 15. So the matrix is two,
    side by side, with scales 16·scale and scale, that meet the same activations twice: nothing is
    rounded again.
    """

    def __init__(self, matrix, has_rows):
        self.matrix = matrix if has_rows else None
        self.bias = matrix.bias
        high, low = matrix.q >> 4, matrix.q & 15  # >> keeps the sign
        halves = torch.cat([high + 8, low], dim=1)
        scale = regroup(matrix.scale, matrix.shape[1], matrix.group_size)
        zero = torch.cat([torch.zeros_like(scale), 8 * scale], dim=1)
        self._pack(halves, torch.cat([16 * scale, scale], dim=1), zero)

    def matmul_torch(self, x):
        return super().matmul_torch(torch.cat([x, x], dim=1))


def operator_group_size(in_size, group_size):
    """The largest group that the operator takes and that has one scale; None if there is none.

    >>> operator_group_size(576, 128)      # 4 groups and a half are 9 groups of 64
    64
    """
    sizes = (size for size in (256, 128, 64, 32) if in_size % size == 0 and group_size % size == 0)
    return next(sizes, None)


def regroup(per_group, in_size, group_size):
    """[out, groups]: a group that the operator does not know, or a short last one, becomes smaller
    ones that have the same scale."""
    smaller = operator_group_size(in_size, group_size)
    return per_group.repeat_interleave(group_size // smaller, dim=1)[:, : in_size // smaller]


def for_cpu_operator(matrix, has_rows=True):
    """The same matrix for PyTorch's CPU operators; None where these do not take its size.

    has_rows: False for one that only multiplies, which costs less memory.
    """
    out_size, in_size = matrix.shape
    is_by_row = isinstance(matrix, Int8) and matrix.group_size >= in_size
    if type(matrix) is W8A8:
        return matrix  # reads its bytes as they are
    if is_by_row:  # where in_size is no multiple of 16, the operator answers wrongly
        return PackedInt8(matrix) if in_size % 16 == 0 else None
    if out_size % 16 or operator_group_size(in_size, matrix.group_size) is None:
        return None
    packed = PackedInt4 if isinstance(matrix, Int4) else PackedInt8Groups
    return packed(matrix, has_rows)
