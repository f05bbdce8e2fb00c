"""Exercise of chapter 03_transformer_block: write rms_norm_np, rope_np and swiglu_np.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 03
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/03_transformer_block/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write rms_norm_torch, rope_torch and
swiglu_torch below, in PyTorch, and the same checks run on them.

Shapes: N flattened new tokens of a whole batch · C hidden size · F feed-forward size · H query
heads · D head dimension.
"""

from __future__ import annotations

import numpy as np

from minillm.linear import linear_np
from minillm.mlp import silu_np


def rms_norm_np(x, weight, eps):
    """Scale each row to a root mean square of one, then by a learned weight.

        x / √(mean(x²) + eps) · weight              (Zhang and Sennrich 2019, eq. 4)

    x: [..., C], weight: [C]  ->  [..., C];   a row is the last axis, each has its own mean.
    The mean is taken in float32 at least, whatever x is: in float16 the square of 300 is infinite,
    and in bfloat16 a square keeps eight bits, and 576 of them do not add up.

    >>> rms_norm_np(np.array([3.0, 4.0]), np.ones(2), eps=0.0).round(3)
    array([0.849, 1.131])
    """
    raise NotImplementedError("rms_norm_np is yours to write")


def rope_np(x, cos, sin):
    """Turn every head of every token by the angles of its position.

        (a, b)  ->  (a·cos − b·sin,  b·cos + a·sin)             (Su et al. 2021, eq. 34)

    x: [N, H, D], cos and sin: [N, D/2], a row a token, the same for its H heads  ->  [N, H, D].
    Pair i of a head is (a, b) = its entries i and i + D/2: all a in the first half, all b in the
    second, before and after.

    >>> quarter_turn = np.array([[0.0]]), np.array([[1.0]])          # cos and sin of 90 degrees
    >>> rope_np(np.array([[[1.0, 0.0]]]), *quarter_turn)
    array([[[0., 1.]]])
    """
    raise NotImplementedError("rope_np is yours to write")


def swiglu_np(x, gate_proj, up_proj, down_proj):
    """(silu(x·Gᵀ) ⊙ x·Uᵀ)·Dᵀ: one projection decides how much of the other passes.

    x: [N, C], gate_proj and up_proj: [F, C], down_proj: [C, F]  ->  [N, C]
    (Shazeer 2020, "GLU variants improve transformer", eq. 6).   Cost: 6·N·C·F FLOPs.
    silu(z) = z·σ(z).  The three are no arrays but objects that multiply, perhaps of four bits an
    entry: linear_np(x, gate_proj) is x·Gᵀ, with the bias if there is one.
    """
    raise NotImplementedError("swiglu_np is yours to write")
