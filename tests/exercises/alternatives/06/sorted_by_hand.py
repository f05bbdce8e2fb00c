"""Sorting where the package partitions, softmax where it cancels, and a running sum by hand."""

from __future__ import annotations

import math

import numpy as np

from minillm.penalties import process_logits_np
from minillm.sampling import ROUNDING, probabilities_np, softmax_np


def keep(logits, kept):
    out = np.full(len(logits), -np.inf)
    out[kept] = logits[kept]
    return out


def top_k_np(logits, k):
    smallest_kept = sorted(logits.tolist(), reverse=True)[:k][-1]
    return keep(logits, [i for i, x in enumerate(logits) if x >= smallest_kept])


def top_p_np(logits, top_p):
    probs = softmax_np(logits)
    order = np.argsort(-probs, kind="stable")
    sums = np.cumsum(probs[order])
    num_kept = 1 + int(np.searchsorted(sums, top_p - ROUNDING))
    return keep(logits, order[:num_kept])


def min_p_np(logits, min_p):
    probs = softmax_np(logits)
    return keep(logits, np.flatnonzero(probs >= min_p * probs.max()))


def sample_np(logits, params, u, prompt_token_ids=(), output_token_ids=(), stop_token_ids=()):
    logits = process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids)
    if any(math.isnan(x) for x in logits) or not math.isfinite(max(logits)):
        raise FloatingPointError("the model overflowed")
    if params.is_greedy:
        return max(range(len(logits)), key=lambda i: logits[i])
    probs = probabilities_np(logits, params).tolist()
    left = u * math.fsum(probs)
    for token, prob in enumerate(probs):
        if left < prob:
            return token
        left -= prob
    return max(token for token, prob in enumerate(probs) if prob > 0)
