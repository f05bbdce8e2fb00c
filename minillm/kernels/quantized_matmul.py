"""Quantized matrices through our own kernel: a few tokens at a time, on a CPU with AVX-512 VNNI.

What they compute is what `Int4`, `Int8` and `W8A8` of `quantized_linear.py` state; how, the C file
beside this one says. Beyond MAX_TOKENS the arithmetic costs more than the bytes, and a product in
floats is cheaper: the matrix is turned into floats, tile by tile. Chapter 11_quantization tells the
story.
"""

from __future__ import annotations

import ctypes

import lazy_loader as lazy

from ..quantization import unpack_int4_torch
from ..quantized_linear import W8A8, Int4, Int8, row_tiles
from . import load_kernel

torch = lazy.load("torch")

MAX_TOKENS = 16


class KernelMatrix:
    """A matrix whose products the kernel computes.

    arguments: the tensors that the kernel reads, one row of each a row of the matrix; they are kept
    here, since the kernel knows their addresses only.
    """

    function = None

    def __init__(self, matrix, *arguments):
        self.arguments, self.bias, self.dtype = arguments, matrix.bias, matrix.dtype
        self.out_size, self.in_size = matrix.shape
        self.pointers = [argument.data_ptr() for argument in arguments]
        self.kernel = getattr(load_kernel("quantized_matmul"), self.function)
        self.kernel.argtypes = [ctypes.c_void_p] * (len(arguments) + 2) + [ctypes.c_int] * 3
        self.kernel.restype = None

    def matmul_torch(self, x):
        N, K = x.shape
        if K != self.in_size:  # the kernel would read whatever lies there
            raise ValueError(f"x has {K} columns, must have the {self.in_size} of the matrix")
        if N > MAX_TOKENS:
            return self.matmul_many(x)
        is_ready = x.dtype == torch.float32 and x.is_contiguous()  # or two calls that do nothing
        wide = x if is_ready else x.to(torch.float32).contiguous()
        y = wide.new_empty(N, self.out_size)
        self.kernel(wide.data_ptr(), *self.pointers, y.data_ptr(), N, K, self.out_size)
        return y if is_ready else y.to(x.dtype)


class KernelReference(KernelMatrix):
    """One that reads the bytes as they lie in `matrix`, which answers for all but few tokens."""

    def __init__(self, matrix, *arguments):
        super().__init__(matrix, *arguments)
        self.matrix = matrix

    def matmul_many(self, x):
        return self.matrix.matmul_torch(x)

    def rows_torch(self, ids):
        return self.matrix.rows_torch(ids)


class KernelInt8(KernelReference):
    """Int8 by row."""

    function = "int8_matmul"

    def __init__(self, matrix):
        super().__init__(matrix, matrix.q, matrix.scale)

    def matmul_many(self, x):
        """One scale a row can wait for the product."""
        wide, (q, scale) = x.to(torch.float32), self.arguments
        tiles = [wide @ q[rows].to(torch.float32).T for rows in row_tiles(q)]
        return (torch.cat(tiles, dim=1) * scale.T).to(x.dtype)


class KernelW8A8(KernelReference):
    function = "w8a8_matmul"

    def __init__(self, matrix):
        super().__init__(matrix, matrix.q, matrix.scale)


class KernelInt8Groups(KernelReference):
    """Int8 by groups of 32: GGUF's Q8_0."""

    function = "int8_group_matmul"

    def __init__(self, matrix):
        super().__init__(matrix, matrix.q, of_groups_of_32(matrix.scale, matrix))


class KernelInt4(KernelMatrix):
    """Int4. The bytes are laid out anew: one holds weights that are 32 apart, not neighbours."""

    function = "int4_matmul"

    def __init__(self, matrix):
        R, K = matrix.shape
        q = unpack_int4_torch(matrix.packed, K).reshape(R, K // 64, 2, 32)
        packed = (q[:, :, 0] | q[:, :, 1] << 4).reshape(R, K // 2)
        super().__init__(matrix, packed, of_groups_of_32(matrix.scale, matrix),
                         of_groups_of_32(matrix.minimum, matrix))

    def matmul_many(self, x):
        wide = x.to(torch.float32)
        tiles = [wide @ self.dequantize(rows).T for rows in row_tiles(self.arguments[0])]
        return torch.cat(tiles, dim=1).to(x.dtype)

    def rows_torch(self, ids):
        return self.dequantize(ids).to(self.dtype)

    def dequantize(self, rows):
        """Some rows, in float32.   rows: a slice, or a tensor of indices."""
        parts = [argument[rows] for argument in self.arguments]
        K = 2 * parts[0].shape[1]
        weight = torch.empty(len(parts[0]), K, dtype=torch.float32, device="cpu")
        function = load_kernel("quantized_matmul").int4_dequantize
        function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int] * 2
        function.restype = None
        function(*(part.data_ptr() for part in parts), weight.data_ptr(), K, len(weight))
        return weight


def of_groups_of_32(numbers, matrix):
    """Scales or minima [R, groups] as float16, one for every 32 weights of a row."""
    repeated = numbers.repeat_interleave(matrix.group_size // 32, dim=1)
    return repeated[:, : matrix.shape[1] // 32].to(torch.float16).contiguous()


def for_kernel(matrix):
    """The same matrix for the kernel; None where there is no kernel, or it takes no such size."""
    in_size = matrix.shape[1]
    if load_kernel("quantized_matmul") is None or in_size % 64:
        return None
    if isinstance(matrix, Int8) and matrix.group_size >= in_size:
        return KernelW8A8(matrix) if isinstance(matrix, W8A8) else KernelInt8(matrix)
    if isinstance(matrix, Int8):
        return KernelInt8Groups(matrix) if matrix.group_size == 32 else None
    fits = isinstance(matrix, Int4) and matrix.group_size % 32 == 0
    return KernelInt4(matrix) if fits and matrix.minimum.abs().max() <= 65504 else None  # float16
