"""How does a layer multiply by its weights, and what is a weight?

A weight matrix is an object that knows how to compute x·Wᵀ and how to look up its rows. The model
only ever calls `linear_*` and `embedding_*`; a matrix of fewer bits, or a shard of a matrix, is
another class with these methods, put in place from outside (chapter 11_quantization), and the
model does not change by a line. Chapter 03_transformer_block tells the story.
"""

from __future__ import annotations

from dataclasses import dataclass

import lazy_loader as lazy
import numpy as np

torch = lazy.load("torch")


@dataclass(frozen=True)
class Dense:
    """A matrix stored whole, one number an entry, as Hugging Face stores it: a row an output.

    weight: [out, in]   bias: [out] or None;   both np.ndarray or both torch.Tensor
    """

    weight: np.ndarray | torch.Tensor
    bias: np.ndarray | torch.Tensor | None = None

    def converted(self, convert):
        """The same matrix, its arrays taken to where `convert` takes them."""
        return Dense(convert(self.weight), None if self.bias is None else convert(self.bias))

    def matmul_np(self, x):
        return x @ self.weight.T

    def matmul_torch(self, x):
        return x @ self.weight.T

    def rows_np(self, ids):
        return self.weight[ids]

    def rows_torch(self, ids):
        return self.weight[ids]


class PackedDense:
    """A bfloat16 matrix on a CPU, kept in the block order in which oneDNN's kernel reads it.

    Given the matrix row by row, the library reorders all of it at every product, and for one token
    that costs more than the product. A packed matrix cannot be read back: no rows, no transpose.
    """

    def __init__(self, dense):
        num_tokens = 1  # the product to arrange it for; others work too
        self.weight = torch.ops.mkldnn._reorder_linear_weight(dense.weight, num_tokens)
        self.bias = dense.bias

    def matmul_torch(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")


def linear_np(x, weight):
    """x·Wᵀ + b.   x: [N, in], weight: [out, in]  ->  [N, out].   Cost: 2·N·in·out FLOPs."""
    y = weight.matmul_np(x)
    return y if weight.bias is None else y + weight.bias


def linear_torch(x, weight):
    """Same contract as linear_np."""
    y = weight.matmul_torch(x)
    return y if weight.bias is None else y + weight.bias


def embedding_np(tokens, weight):
    """One row of the table for each token.   tokens: [N] int, weight: [V, C]  ->  [N, C]."""
    return weight.rows_np(tokens)


def embedding_torch(tokens, weight):
    """Same contract as embedding_np."""
    return weight.rows_torch(tokens)
