"""exp(z) / (1 + exp(z)) is ∞/∞"""

from __future__ import annotations

import numpy as np

from minillm.linear import linear_np


def swiglu_np(x, gate_proj, up_proj, down_proj):
    gate = linear_np(x, gate_proj)
    sigmoid = np.exp(gate) / (1 + np.exp(gate))
    return linear_np(gate * sigmoid * linear_np(x, up_proj), down_proj)
