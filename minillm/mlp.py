"""What does a layer do with what attention brought? SwiGLU, the gated feed-forward network.

Most of a layer's weights are here: two thirds and more. Chapter 03_transformer_block tells it.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .exercise import exercise
from .linear import linear_np, linear_torch

torch = lazy.load("torch")


def silu_np(x):
    """x·σ(x), element by element.   σ(x) = (1 + tanh(x/2)) / 2, a form that cannot overflow."""
    return x * (1 + np.tanh(x / 2)) / 2


def silu_torch(x):
    """Same contract as silu_np."""
    return torch.nn.functional.silu(x)


@exercise("03_transformer_block", order=3)
def swiglu_np(x, gate_proj, up_proj, down_proj):
    """(silu(x·Gᵀ) ⊙ x·Uᵀ)·Dᵀ: one projection decides how much of the other passes.

    x: [N, C], gate_proj and up_proj: [F, C], down_proj: [C, F]  ->  [N, C]
    (Shazeer 2020, "GLU variants improve transformer", eq. 6).   Cost: 6·N·C·F FLOPs.
    silu(z) = z·σ(z).  The three are no arrays but objects that multiply, perhaps of four bits an
    entry: linear_np(x, gate_proj) is x·Gᵀ, with the bias if there is one.
    """
    gate = silu_np(linear_np(x, gate_proj))  # [N, F]
    return linear_np(gate * linear_np(x, up_proj), down_proj)


def swiglu_torch(x, gate_proj, up_proj, down_proj):
    """Same contract as swiglu_np."""
    gate = silu_torch(linear_torch(x, gate_proj))
    return linear_torch(gate * linear_torch(x, up_proj), down_proj)
