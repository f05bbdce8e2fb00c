"""Planes turned as complex numbers, norms written out, and the last layer's rows dropped early."""

from __future__ import annotations

import numpy as np

from minillm.linear import linear_np


def norm(x, scales, eps):
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * scales


def rotated(heads, turns):
    points = (heads[..., : turns.shape[-1]] + 1j * heads[..., turns.shape[-1] :]) * turns[:, None]
    return np.concatenate([points.real, points.imag], axis=-1).astype(heads.dtype)


def forward_np(weights, tokens, positions, cache, rows=None):
    config = weights.config
    heads, kv_heads, size = config.heads
    turns = np.exp(1j * np.outer(positions, weights.inv_freq))
    stream = np.stack([weights.embed_tokens.rows_np(token) for token in tokens])
    for number in range(config.num_hidden_layers):
        layer = weights.layers[number]
        projected = linear_np(norm(stream, layer.input_layernorm, config.rms_norm_eps),
                              layer.qkv_proj)
        q, k, v = (part.reshape(len(tokens), -1, size) for part in np.split(
            projected, [heads * size, (heads + kv_heads) * size], axis=1))
        if layer.qk_norm is not None:
            q = norm(q, layer.qk_norm[:heads], config.rms_norm_eps)
            k = norm(k, layer.qk_norm[heads:], config.rms_norm_eps)
        attended = cache.attend(number, rotated(q, turns), rotated(k, turns), v)
        attended = np.concatenate([attended[:, head] for head in range(heads)], axis=1)
        if rows is not None and number == config.num_hidden_layers - 1:
            # Nothing after the last attention looks at other tokens.
            stream, attended = stream[np.array(rows)], attended[np.array(rows)]
        stream = stream + linear_np(attended, layer.o_proj)
        h = norm(stream, layer.post_attention_layernorm, config.rms_norm_eps)
        gate = linear_np(h, layer.gate_proj)
        gate = gate / (1 + np.exp(-gate))
        stream = stream + linear_np(gate * linear_np(h, layer.up_proj), layer.down_proj)
    return linear_np(norm(stream, weights.norm, config.rms_norm_eps), weights.lm_head)
