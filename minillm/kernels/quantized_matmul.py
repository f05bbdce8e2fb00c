"""Quantized matrices through our own kernel, on a CPU with AVX-512 VNNI.

What they compute is what `Int4`, `Int8` and `W8A8` of `quantized_linear.py` state; how, the C file
beside this one says. It takes any number of tokens, and a token's result is the same to the last
bit whichever tokens are beside it. The bytes are laid out anew once, when the model loads, in
blocks of 16 rows. Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import ctypes

import lazy_loader as lazy

from ..quantization import dequantize_group_torch, unpack_int4_torch
from ..quantized_linear import W8A8, Int4, Int8
from . import load_kernel

torch = lazy.load("torch")

BLOCK_ROWS = 16  # ROWS of the C file
GROUP_SIZE = 32  # GROUP


class KernelMatrix:
    """A matrix whose products the kernel computes.

    blocks: the tensors that the kernel reads, of `in_blocks`; they are kept here, since the kernel
    knows their addresses only.
    """

    function = None

    def __init__(self, matrix, *blocks):
        self.blocks, self.bias, self.dtype = blocks, matrix.bias, matrix.dtype
        self.out_size, self.in_size = matrix.shape
        self.pointers = [each.data_ptr() for each in blocks]
        self.kernel = getattr(load_kernel("quantized_matmul"), self.function)
        self.kernel.argtypes = [ctypes.c_void_p] * (len(blocks) + 2) + [ctypes.c_int] * 3
        self.kernel.restype = None

    def matmul_torch(self, x):
        N, K = x.shape
        if K != self.in_size:  # the kernel would read whatever lies there
            raise ValueError(f"x has {K} columns, must have the {self.in_size} of the matrix")
        is_ready = x.dtype == torch.float32 and x.is_contiguous()  # or two calls that do nothing
        wide = x if is_ready else x.to(torch.float32).contiguous()
        y = wide.new_empty(N, self.out_size)
        self.kernel(wide.data_ptr(), *self.pointers, y.data_ptr(), N, K, self.out_size)
        return y if is_ready else y.to(x.dtype)

    def rows_of_blocks(self, ids):
        """The numbers of some rows, from each of the blocks."""
        block, row = ids // BLOCK_ROWS, ids % BLOCK_ROWS
        return [each[block, :, row] for each in self.blocks]


class KernelInt8(KernelMatrix):
    """Int8 by row. Each byte is stored + 128, as the unsigned one that the kernel multiplies."""

    function = "int8_matmul"

    def __init__(self, matrix):
        self.group_size = matrix.group_size
        fours = (matrix.q.view(torch.uint8) ^ 128).view(torch.int32)
        super().__init__(matrix, in_blocks(fours), in_blocks(self.kernel_scale(matrix)))

    def kernel_scale(self, matrix):
        return matrix.scale

    def rows_torch(self, ids):
        fours, scale = self.rows_of_blocks(ids)
        q = (fours.view(torch.uint8) ^ 128).view(torch.int8)
        return dequantize_group_torch(q, scale, None, self.group_size).to(self.dtype)


class KernelW8A8(KernelInt8):
    function = "w8a8_matmul"


class KernelInt8Groups(KernelInt8):
    """Int8 by groups of 32: GGUF's Q8_0."""

    function = "int8_group_matmul"

    def kernel_scale(self, matrix):
        return of_kernel_groups(matrix.scale, matrix)


class KernelInt4(KernelMatrix):
    """Int4. A byte holds two weights that are four columns apart, not neighbours."""

    function = "int4_matmul"

    def __init__(self, matrix):
        fours = unpack_int4_torch(matrix.packed, matrix.in_size).view(torch.int32)
        q = in_blocks(fours).view(torch.uint8)  # [blocks, K/4, 16·4]
        super().__init__(matrix, (q[:, 0::2] | q[:, 1::2] << 4).view(torch.int32),
                         in_blocks(of_kernel_groups(matrix.scale, matrix)),
                         in_blocks(of_kernel_groups(matrix.minimum, matrix)))

    def rows_torch(self, ids):
        fours, scale, minimum = self.rows_of_blocks(ids)
        packed = fours.view(torch.uint8).reshape(len(ids), -1, 4)
        q = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1)
        return dequantize_group_torch(q, scale, minimum, GROUP_SIZE).to(self.dtype)


def in_blocks(numbers):
    """[R, M]  ->  [⌈R/16⌉, M, 16]: a number of each of 16 rows, then the next of each.

    Zeros fill up the last block. Bytes come as int32, four to a number: a lane of a register.

    >>> in_blocks(torch.arange(6).reshape(2, 3))[0, :, :3].tolist()    # the others are 0
    [[0, 3, 0], [1, 4, 0], [2, 5, 0]]
    """
    R, M = numbers.shape
    filled = torch.cat([numbers, numbers.new_zeros(-R % BLOCK_ROWS, M)])
    return filled.reshape(-1, BLOCK_ROWS, M).transpose(1, 2).contiguous()


def of_kernel_groups(numbers, matrix):
    """Scales or minima [R, groups] as float16, one for every 32 weights of a row."""
    repeated = numbers.repeat_interleave(matrix.group_size // GROUP_SIZE, dim=1)
    return repeated[:, : matrix.shape[1] // GROUP_SIZE].to(torch.float16)


def for_kernel(matrix):
    """The same matrix for the kernel; None where there is no kernel, or it takes no such size."""
    in_size = matrix.shape[1]
    if load_kernel("quantized_matmul") is None or in_size % GROUP_SIZE:
        return None
    if isinstance(matrix, Int8) and matrix.group_size >= in_size:
        return KernelW8A8(matrix) if isinstance(matrix, W8A8) else KernelInt8(matrix)
    if isinstance(matrix, Int8):
        return KernelInt8Groups(matrix) if matrix.group_size == GROUP_SIZE else None
    fits = isinstance(matrix, Int4) and matrix.group_size % GROUP_SIZE == 0
    return KernelInt4(matrix) if fits and matrix.minimum.abs().max() <= 65504 else None  # float16
