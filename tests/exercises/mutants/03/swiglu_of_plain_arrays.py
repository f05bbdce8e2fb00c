"""a projection is an object"""

from __future__ import annotations

from minillm.mlp import silu_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    gate = silu_np(x @ gate_proj.weight.T)
    return gate * (x @ up_proj.weight.T) @ down_proj.weight.T
