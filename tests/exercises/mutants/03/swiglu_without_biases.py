"""a product with gate_proj.weight alone does not"""

from __future__ import annotations

from minillm.mlp import silu_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    gate, up, down = (each.weight.T for each in (gate_proj, up_proj, down_proj))
    return (silu_np(x @ gate) * (x @ up)) @ down
