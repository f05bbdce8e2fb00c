"""Positions as a running count; a mask that is added, and einsum; the PyTorch twin; arrays."""

from __future__ import annotations

import numpy as np
import torch


def pad_batch(prompts, pad_token_id=0):
    lengths = np.array([len(prompt) for prompt in prompts])
    is_own = np.arange(lengths.max())[::-1] < lengths[:, None]
    tokens = np.where(is_own, 0, pad_token_id)
    tokens[is_own] = np.concatenate(prompts)
    positions = (np.cumsum(is_own, axis=1) - 1).clip(0)
    return tokens, positions, lengths.max() - lengths


def masked_attention_np(q, k, v, visible):
    (B, H, T, D), K = q.shape, k.shape[1]
    q = q.reshape(B, K, H // K, T, D)
    bias = np.where(visible, 0.0, -np.inf).astype(q.dtype)[:, None, None]
    scores = np.einsum("bkgtd,bksd->bkgts", q, k) / float(D) ** 0.5 + bias
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("bkgts,bksd->bkgtd", weights, v).reshape(B, H, T, D)


def masked_attention_torch(q, k, v, visible):
    H, K = q.shape[1], k.shape[1]
    k, v = k.repeat_interleave(H // K, dim=1), v.repeat_interleave(H // K, dim=1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def decode_batch(forward, logits, positions, pick):
    B, passes = len(positions), 0
    tokens, active = np.zeros(B, dtype=int), np.ones(B, dtype=bool)
    while active.any():
        for row in np.flatnonzero(active):
            tokens[row], has_finished = pick(row, logits[row])
            active[row] = not has_finished
        if active.any():
            logits = forward(tokens.tolist(), (np.array(positions) + passes).tolist())
            passes += 1
    return passes
