"""What does the whole model compute? Everything, on one screen.

`forward_*` is prefill, decode, scoring and (in later chapters) a batch and the verification of
drafts: always one row a token, whichever requests the rows come from, with the cache in charge of
who attends to whom. Chapter 05_model tells the story.
"""

from __future__ import annotations

from dataclasses import dataclass

import lazy_loader as lazy
import numpy as np

from .config import ModelConfig
from .exercise import exercise
from .linear import Dense, embedding_np, embedding_torch, linear_np, linear_torch
from .mlp import swiglu_np, swiglu_torch
from .norm import rms_norm_fused, rms_norm_np
from .rope import rope_angles_np, rope_angles_torch, rope_fused, rope_np

torch = lazy.load("torch")


@dataclass
class LayerWeights:
    """One transformer block. Norms are vectors; projections are objects that multiply."""

    input_layernorm: np.ndarray | torch.Tensor  # [C]
    qkv_proj: Dense  # [(H + 2K)·D, C], the rows of q_proj, then k_proj, then v_proj
    o_proj: Dense  # [C, H·D]
    post_attention_layernorm: np.ndarray | torch.Tensor  # [C]
    gate_proj: Dense  # [F, C]
    up_proj: Dense  # [F, C]
    down_proj: Dense  # [C, F]
    qk_norm: np.ndarray | torch.Tensor | None = None  # [H + K, D], Qwen3: a norm for every head


@dataclass
class Weights:
    """A model: its shape and its numbers, under the names that vLLM and Hugging Face give them."""

    config: ModelConfig
    embed_tokens: Dense  # [V, C]
    layers: list[LayerWeights]
    norm: np.ndarray | torch.Tensor  # [C]
    lm_head: Dense  # [V, C]; the same object as embed_tokens where they are tied
    inv_freq: np.ndarray | torch.Tensor  # [D/2], float64: an angle can be thousands of radians

    def replace_layer_matrices(self, replacement):
        """Put replacement(matrix) where each matrix of each layer is, one after the other.

        The embedding, whose rows are looked up, and the head, often the same matrix, stay.
        """
        for layer in self.layers:
            for name, value in vars(layer).items():
                if isinstance(value, Dense):
                    setattr(layer, name, replacement(value))


@exercise("05_model")
def forward_np(weights, tokens, positions, cache, rows=None):
    """One pass through the transformer: token ids in, scores of every possible next token out.

        x = embedding(tokens)
        in each layer:   q, k, v = qkv_proj(norm(x))
                         x = x + o_proj(attend(rotated q, rotated k, v))
                         x = x + swiglu(norm(x))
        logits = lm_head(norm(x))                       (LLaMA: Touvron et al. 2023, §2.2)

    tokens, positions: [N] int.   rows: a list of R indices of tokens, the ones whose logits the
    caller wants (None: all N).   ->  logits [R, V], in the dtype of the weights. The head is a
    fifth of all weights of a small model, so it multiplies the R rows and no others.

    weights: `config`, with `heads`, which is (H, K, D), and `rms_norm_eps`;  `embed_tokens` [V, C];
    `layers`, a list;  `norm` [C];  `lm_head` [V, C];  `inv_freq` [D/2], in float64: cast the cos
    and sin of the angles to x's dtype, or all that they touch becomes float64 as well.
    Each layer: `input_layernorm` [C];  `qkv_proj` [(H + 2·K)·D, C], the rows of q's heads, then
    k's, then v's;  `o_proj` [C, H·D];  `post_attention_layernorm` [C];  `gate_proj` and `up_proj`
    [F, C];  `down_proj` [C, F];  `qk_norm` [H + K, D], a norm weight for every head of q and k, to
    be applied before they are rotated, or None. Norms are arrays. All the others are objects, for
    linear_np (which adds the bias where there is one), embedding_np and swiglu_np.

    cache: whatever has `attend(layer, q, k, v)`, with the layer's index, q [N, H, D], k and v
    [N, K, D]  ->  [N, H, D]. Call it once for each layer, in their order: it keeps k and v, and it
    knows which token sees which.

    Cost: about 2·N FLOPs a weight of the layers, plus attention.
    """
    N, eps, (H, K, D) = len(tokens), weights.config.rms_norm_eps, weights.config.heads
    x = embedding_np(tokens, weights.embed_tokens)  # [N, C]
    cos, sin = rope_angles_np(positions, weights.inv_freq)  # [N, D/2]
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    for index, layer in enumerate(weights.layers):
        h = rms_norm_np(x, layer.input_layernorm, eps)
        qkv = linear_np(h, layer.qkv_proj).reshape(N, H + 2 * K, D)
        qk, v = qkv[:, : H + K], qkv[:, H + K :]  # [N, H+K, D], [N, K, D]
        if layer.qk_norm is not None:
            qk = rms_norm_np(qk, layer.qk_norm, eps)
        qk = rope_np(qk, cos, sin)  # one position, one angle, for queries and keys
        h = cache.attend(index, qk[:, :H], qk[:, H:], v).reshape(N, -1)  # [N, H·D]
        x = x + linear_np(h, layer.o_proj)
        h = rms_norm_np(x, layer.post_attention_layernorm, eps)
        x = x + swiglu_np(h, layer.gate_proj, layer.up_proj, layer.down_proj)
    x = x if rows is None else x[rows]  # [R, C]
    return linear_np(rms_norm_np(x, weights.norm, eps), weights.lm_head)


def forward_torch(weights, tokens, positions, cache, rows=None):
    """Same contract as forward_np. (A `*_fused` step is `*_torch` in one call, where it can be.)"""
    N, eps, (H, K, D) = len(tokens), weights.config.rms_norm_eps, weights.config.heads
    x = embedding_torch(tokens, weights.embed_tokens)
    cos, sin = rope_angles_torch(positions, weights.inv_freq)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    for index, layer in enumerate(weights.layers):
        h = rms_norm_fused(x, layer.input_layernorm, eps)
        qkv = linear_torch(h, layer.qkv_proj).reshape(N, H + 2 * K, D)
        qk, v = qkv[:, : H + K], qkv[:, H + K :]
        if layer.qk_norm is not None:
            qk = rms_norm_fused(qk, layer.qk_norm, eps)
        qk = rope_fused(qk, cos, sin)
        h = cache.attend(index, qk[:, :H], qk[:, H:], v).reshape(N, -1)
        x = x + linear_torch(h, layer.o_proj)
        h = rms_norm_fused(x, layer.post_attention_layernorm, eps)
        x = x + swiglu_torch(h, layer.gate_proj, layer.up_proj, layer.down_proj)
    x = x if rows is None else x[rows]
    return linear_torch(rms_norm_fused(x, weights.norm, eps), weights.lm_head)
