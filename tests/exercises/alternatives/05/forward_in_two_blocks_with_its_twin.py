"""One function a sublayer, and the PyTorch twin handed in too."""

from __future__ import annotations

import torch

from minillm.linear import embedding_np, embedding_torch, linear_np, linear_torch
from minillm.mlp import swiglu_np, swiglu_torch
from minillm.norm import rms_norm_np, rms_norm_torch
from minillm.rope import rope_angles_np, rope_angles_torch, rope_np, rope_torch


def forward(parts, weights, tokens, turn, cache, rows):
    embedding, linear, norm, swiglu = parts
    H, K, D = weights.config.heads

    def attention(index, layer, h):
        q, k, v = (linear(h, layer.qkv_proj).reshape(len(tokens), -1, D)[:, start:end]
                   for start, end in ((0, H), (H, H + K), (H + K, None)))
        if layer.qk_norm is not None:
            q, k = normed(q, layer.qk_norm[:H]), normed(k, layer.qk_norm[H:])
        return linear(cache.attend(index, turn(q), turn(k), v).reshape(len(tokens), H * D),
                      layer.o_proj)

    def normed(x, scales):
        return norm(x, scales, weights.config.rms_norm_eps)

    x = embedding(tokens, weights.embed_tokens)
    for index, layer in enumerate(weights.layers):
        x = x + attention(index, layer, normed(x, layer.input_layernorm))
        x = x + swiglu(normed(x, layer.post_attention_layernorm), layer.gate_proj, layer.up_proj,
                       layer.down_proj)
    x = normed(x, weights.norm)
    return linear(x[rows] if rows is not None else x, weights.lm_head)


def forward_np(weights, tokens, positions, cache, rows=None):
    cos, sin = rope_angles_np(positions, weights.inv_freq)
    parts = embedding_np, linear_np, rms_norm_np, swiglu_np

    def turn(x):
        return rope_np(x, cos.astype(x.dtype), sin.astype(x.dtype))

    return forward(parts, weights, tokens, turn, cache, rows)


def forward_torch(weights, tokens, positions, cache, rows=None):
    cos, sin = rope_angles_torch(positions, weights.inv_freq)
    parts = embedding_torch, linear_torch, rms_norm_torch, swiglu_torch

    def turn(x):
        return rope_torch(x, cos.to(x.dtype), sin.to(x.dtype))

    with torch.inference_mode():
        return forward(parts, weights, tokens, turn, cache, rows)
