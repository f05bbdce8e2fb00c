"""weights.norm, is missing before the head"""

from __future__ import annotations

from minillm.linear import embedding_np, linear_np
from minillm.mlp import swiglu_np
from minillm.norm import rms_norm_np
from minillm.rope import rope_angles_np, rope_np


def forward_np(weights, tokens, positions, cache, rows=None):
    N, eps, (H, K, D) = len(tokens), weights.config.rms_norm_eps, weights.config.heads
    x = embedding_np(tokens, weights.embed_tokens)
    cos, sin = rope_angles_np(positions, weights.inv_freq)
    cos, sin = cos.astype(x.dtype), sin.astype(x.dtype)
    for index, layer in enumerate(weights.layers):
        h = rms_norm_np(x, layer.input_layernorm, eps)
        qkv = linear_np(h, layer.qkv_proj).reshape(N, H + 2 * K, D)
        qk, v = qkv[:, : H + K], qkv[:, H + K :]
        if layer.qk_norm is not None:
            qk = rms_norm_np(qk, layer.qk_norm, eps)
        qk = rope_np(qk, cos, sin)
        h = cache.attend(index, qk[:, :H], qk[:, H:], v).reshape(N, -1)
        x = x + linear_np(h, layer.o_proj)
        h = rms_norm_np(x, layer.post_attention_layernorm, eps)
        x = x + swiglu_np(h, layer.gate_proj, layer.up_proj, layer.down_proj)
    x = x if rows is None else x[rows]
    return linear_np(x, weights.lm_head)
