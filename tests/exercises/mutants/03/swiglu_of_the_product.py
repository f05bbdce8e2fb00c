"""silu is applied to the product of gate and up"""

from __future__ import annotations

from minillm.linear import linear_np
from minillm.mlp import silu_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    return linear_np(silu_np(linear_np(x, gate_proj) * linear_np(x, up_proj)), down_proj)
