"""How do activations with outliers fit into eight bits? By leaving the outliers to the weights.

A token's activations share one scale (W8A8), so a channel that is a hundred times larger than the
others leaves them a handful of steps. Weights have no such channels. SmoothQuant divides each
channel of the activations by a factor, multiplies the matching column of the weights by it, and
the product stays what it was:  x·Wᵀ = (x / s)·(W·s)ᵀ          (Xiao et al. 2023, §4).

Nothing is divided at run time: what makes a channel is made smaller beforehand. Before q, k, v and
before gate and up this is the norm's weight, as in the paper. Two more places allow it exactly: the
rows of up_proj before down_proj, because silu(gate) ⊙ up is linear in up, and the rows of v before
o_proj, because attention averages values; query heads that share a value head share its factors.

Chapter 11_quantization tells the story. `calibration.py` measures the activations. Left out: a
search for each layer's best alpha.
"""

from __future__ import annotations

from dataclasses import replace

import lazy_loader as lazy
import numpy as np

from .linear import Dense

torch = lazy.load("torch")

ALPHA = 0.5  # half of the difficulty each; the paper's choice for most models, §4


def smoothing_factors_np(activation_max, weight_max, alpha=ALPHA):
    """What to divide each channel of the activations by, and multiply the weights' columns by.

        s_j = max|x_j|^alpha / max|W_j|^(1 − alpha)         (Xiao et al. 2023, eq. 4)

    activation_max, weight_max: [C], the largest magnitudes of each channel  ->  s [C] float32.
    alpha: 1 moves all of the outliers into the weights. A channel in which either is 0 has s = 1.
    Raises ValueError for an alpha outside 0 … 1.

    >>> smoothing_factors_np(np.array([16.0, 1.0, 0.0]), np.array([0.25, 1.0, 2.0]))
    array([8., 1., 1.], dtype=float32)
    """
    check_alpha(alpha)
    is_used = (activation_max > 0) & (weight_max > 0)
    activations = np.where(is_used, activation_max, np.ones_like(activation_max))
    columns = np.where(is_used, weight_max, np.ones_like(weight_max))
    return (activations**alpha / columns ** (1 - alpha)).astype(np.float32)


def smoothing_factors_torch(activation_max, weight_max, alpha=ALPHA):
    """Same contract as smoothing_factors_np."""
    check_alpha(alpha)
    is_used = (activation_max > 0) & (weight_max > 0)
    activations = torch.where(is_used, activation_max, torch.ones_like(activation_max))
    columns = torch.where(is_used, weight_max, torch.ones_like(weight_max))
    return (activations**alpha / columns ** (1 - alpha)).to(torch.float32)


def check_alpha(alpha):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha is {alpha}, must be from 0 to 1")


def smooth_layer(layer, seen, heads, alpha=ALPHA):
    """The layer with outliers migrated at its four inputs; in floating point it computes the same.

    layer: LayerWeights of NumPy arrays and Dense.   heads: (H, K, D).
    seen: {"qkv_proj", "o_proj", "gate_proj", "down_proj": [in], the largest magnitude that each
    channel of that matrix's input had}.   -> LayerWeights; the argument stays as it is.
    """
    norm, (qkv_proj,) = smooth_norm(layer.input_layernorm, [layer.qkv_proj], seen["qkv_proj"],
                                    alpha)
    qkv_proj, o_proj = smooth_values(qkv_proj, layer.o_proj, seen["o_proj"], heads, alpha)
    post_norm, (gate_proj, up_proj) = smooth_norm(
        layer.post_attention_layernorm, [layer.gate_proj, layer.up_proj], seen["gate_proj"], alpha)
    up_proj, down_proj = smooth_mlp(up_proj, layer.down_proj, seen["down_proj"], alpha)
    return replace(layer, input_layernorm=norm, qkv_proj=qkv_proj, o_proj=o_proj,
                   post_attention_layernorm=post_norm, gate_proj=gate_proj, up_proj=up_proj,
                   down_proj=down_proj)


def smooth_norm(norm, matrices, seen, alpha):
    """norm / s, and the columns of all the matrices behind it times s."""
    largest = np.max([column_max(matrix) for matrix in matrices], axis=0)
    s = smoothing_factors_np(seen, largest, alpha)
    return norm / s, [scale_columns(matrix, s) for matrix in matrices]


def smooth_mlp(up_proj, down_proj, seen, alpha):
    """The rows of up_proj / s, the columns of down_proj times s."""
    s = smoothing_factors_np(seen, column_max(down_proj), alpha)
    return divide_rows(up_proj, s), scale_columns(down_proj, s)


def smooth_values(qkv_proj, o_proj, seen, heads, alpha):
    """The rows of v / s, the columns of o_proj times s: one s for all that read a value head."""
    H, K, D = heads
    shared = [channels.reshape(K, H // K, D).max(axis=1) for channels in
              (seen, column_max(o_proj))]
    s = smoothing_factors_np(*shared, alpha)  # [K, D]
    rows = np.concatenate([np.ones((H + K) * D, dtype=s.dtype), s.reshape(-1)])
    columns = np.repeat(s, H // K, axis=0).reshape(-1)  # head h reads value head h // (H/K)
    return divide_rows(qkv_proj, rows), scale_columns(o_proj, columns)


def column_max(dense):
    return np.abs(dense.weight).max(axis=0)


def scale_columns(dense, s):
    return Dense(dense.weight * s, dense.bias)


def divide_rows(dense, s):
    return Dense(dense.weight / s[:, None], None if dense.bias is None else dense.bias / s)
