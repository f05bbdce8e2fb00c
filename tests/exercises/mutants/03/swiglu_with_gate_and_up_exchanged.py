"""silu is applied to up, not to the gate"""

from __future__ import annotations

from minillm.linear import linear_np
from minillm.mlp import silu_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    hidden = linear_np(x, gate_proj) * silu_np(linear_np(x, up_proj))
    return linear_np(hidden, down_proj)
