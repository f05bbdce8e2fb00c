"""Both forms of every function: the same checks run on PyTorch."""

from __future__ import annotations

import math

import numpy as np
import torch

from minillm.penalties import process_logits_np, process_logits_torch
from minillm.sampling import draw_np, draw_torch, probabilities_np, probabilities_torch


def top_k_np(logits, k):
    return top_k_torch(torch.from_numpy(logits), k).numpy()


def top_k_torch(logits, k):
    edge = torch.sort(logits, descending=True).values[:k][-1]
    return logits.masked_fill(logits < edge, -math.inf)


def top_p_np(logits, top_p):
    return top_p_torch(torch.from_numpy(logits), top_p).numpy()


def top_p_torch(logits, top_p):
    probs, order = torch.softmax(logits, dim=-1).sort(descending=True, stable=True)
    removed = probs.cumsum(dim=-1) - probs >= top_p
    removed[0] = False
    return logits.masked_fill(torch.zeros_like(removed).scatter(-1, order, removed), -math.inf)


def min_p_np(logits, min_p):
    return np.where(logits - logits.max() >= np.log(min_p), logits, -np.inf)


def min_p_torch(logits, min_p):
    return logits.masked_fill(logits - logits.max() < math.log(min_p), -math.inf)


def sample_np(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    logits = process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids)
    if not np.isfinite(logits.max()):
        raise FloatingPointError("the model overflowed")
    if params.is_greedy:
        return int(logits.argmax())
    return draw_np(probabilities_np(logits, params), u)


def sample_torch(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    logits = process_logits_torch(logits, params, prompt_token_ids, output_token_ids,
                                  stop_token_ids)
    if not torch.isfinite(logits.max()):
        raise FloatingPointError("the model overflowed")
    if params.is_greedy:
        return int(logits.argmax())
    return draw_torch(probabilities_torch(logits, params), u)
