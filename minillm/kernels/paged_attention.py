"""How does a batch attend to a cache in blocks, without copying it together first?

One call a layer answers for all rows of a step, prompts and decodes alike, on a CPU in float32 or
bfloat16. What it computes is, row by row, `attention_np` over the positions that the row sees; how,
the C file beside this one says. Sums are float32 in both; from bfloat16 only the result is rounded.
It leaves out other dtypes, gradients and head sizes that are no multiple of 16:
`has_paged_attention` is False for them, and the caller gathers the blocks and masks them.
Chapter 09_paged_cache tells the story.
"""

from __future__ import annotations

import functools

import lazy_loader as lazy

from . import INT, POINTER, load_kernel

torch = lazy.load("torch")


def has_paged_attention(q):
    """True if PagedAttention takes queries like these [N, H, D], on this machine."""
    return (q.is_cpu and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-1] % 16 == 0
            and not q.requires_grad and paged_attention_kernel() is not None)


@functools.cache
def paged_attention_kernel():
    """{dtype: the function of paged_attention.c}, or None where it cannot be compiled."""
    library = load_kernel("paged_attention")
    if library is None:
        return None
    functions = {torch.float32: library.paged_attention_float32,
                 torch.bfloat16: library.paged_attention_bfloat16}
    for function in functions.values():
        function.argtypes, function.restype = (POINTER,) * 7 + (INT,) * 7, None
    return functions


class PagedAttention:
    """The attention of one step of N rows: built once a step, called once a layer.

    block_tables: [B, W] the ids of the blocks of every sequence, in order; those behind its last
                  block are not read, but must be ids of blocks
    table_of_row: [N] the sequence of a row      context_lens: [N] the positions that it sees, its
                  own included, at least 1
    All three are int32 and contiguous. They are kept here, since the kernel knows their addresses
    only, and must not change in place before the last call.
    Raises ValueError for tensors that do not belong together, and for indices out of their range:
    the kernel would read whatever lies there.
    """

    def __init__(self, block_tables, table_of_row, context_lens):
        (B, W), (N,) = block_tables.shape, table_of_row.shape
        self.kernels = paged_attention_kernel()
        if self.kernels is None:
            raise ValueError("there is no kernel on this machine: ask has_paged_attention first")
        self.tensors = block_tables, table_of_row, context_lens
        if not all(is_dense(tensor, torch.int32) for tensor in self.tensors):
            raise ValueError("block_tables, table_of_row and context_lens must be contiguous int32 "
                             "tensors on the CPU")
        if context_lens.shape != (N,) or 0 in (N, B, W):
            raise ValueError(f"block_tables {(B, W)}, table_of_row {(N,)} and context_lens "
                             f"{tuple(context_lens.shape)} must be [B, W], [N] and [N], not empty")
        (first_block, self.last_block), (first_table, last_table), (shortest, self.longest) = (
            (int(low), int(high)) for low, high in map(torch.aminmax, self.tensors))
        if first_block < 0 or first_table < 0 or last_table >= B or shortest < 1:
            raise ValueError(f"block ids from {first_block} (at least 0), tables {first_table} to "
                             f"{last_table} (0 to {B - 1}), context_lens from {shortest} (at least "
                             "1) must be in range")
        self.pointers = [tensor.data_ptr() for tensor in self.tensors]
        self.num_rows, self.width = N, W

    def __call__(self, q, keys, values):
        """softmax(q·kᵀ / √D)·v of every row, over its own positions, in one layer.

        q: [N, H, D]   keys, values: [num_blocks, block_size, K, D]   ->   [N, H, D], contiguous
        All are float32, or all bfloat16; q's rows may lie apart (a slice of fused queries, keys and
        values), the cache is contiguous. Query head h reads key/value head h // (H/K).
        """
        (N, H, D), (num_blocks, block_size, K, _) = q.shape, keys.shape
        if (N != self.num_rows or keys.shape != values.shape or keys.shape[3] != D or D % 16
                or H % K):
            raise ValueError(f"q {tuple(q.shape)}, keys {tuple(keys.shape)} and values "
                             f"{tuple(values.shape)} must be [{self.num_rows}, H, D] and twice "
                             "[num_blocks, block_size, K, D], H a multiple of K, D one of 16")
        if not (q.is_cpu and q.dtype in self.kernels and q.stride()[1:] == (D, 1)
                and is_dense(keys, q.dtype) and is_dense(values, q.dtype)):
            raise ValueError("q, keys and values must be all float32 or all bfloat16 on the CPU, "
                             "the cache contiguous, and q within each row")
        if self.last_block >= num_blocks or self.longest > self.width * block_size:
            raise ValueError(f"block {self.last_block} and {self.longest} positions must be within "
                             f"{num_blocks} blocks and {self.width} × {block_size} positions")
        out = q.new_empty(N, H, D)
        kernel = self.kernels[q.dtype]
        kernel(q.data_ptr(), keys.data_ptr(), values.data_ptr(), *self.pointers, out.data_ptr(),
               N, H, K, D, block_size, self.width, q.stride(0))
        return out


def is_dense(tensor, dtype):
    return tensor.is_cpu and tensor.dtype == dtype and tensor.is_contiguous()
