"""x·Gᵀ is computed twice"""

from __future__ import annotations

import numpy as np

from minillm.linear import linear_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    gate = linear_np(x, gate_proj) / (1 + np.exp(-linear_np(x, gate_proj)))
    return linear_np(gate * linear_np(x, up_proj), down_proj)
