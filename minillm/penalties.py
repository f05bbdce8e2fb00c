"""What can change a model's mind? Biases and penalties: the steps that may change the best token.

They come first, in vLLM's order: min_tokens, logit_bias, repetition, frequency and presence; also
a greedy choice is made from what they leave. `sampling.py` goes on from there. Chapter 06_sampling
tells the story.

Every step takes logits [V] and returns new ones in float64; the caller's array is never changed.
"""

from __future__ import annotations

import math

import lazy_loader as lazy
import numpy as np

torch = lazy.load("torch")


def process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids):
    """The steps that can change which token is best. If none is asked for, the logits come back as
    they are: a greedy token then costs one argmax."""
    logit_bias = dict(params.logit_bias or {})
    if len(output_token_ids) < params.min_tokens:
        logit_bias.update(dict.fromkeys(stop_token_ids, -math.inf))
    if logit_bias:
        logits = bias_np(logits, logit_bias)
    if params.repetition_penalty != 1:
        seen_token_ids = [*prompt_token_ids, *output_token_ids]
        logits = penalize_repetition_np(logits, params.repetition_penalty, seen_token_ids)
    if params.frequency_penalty or params.presence_penalty:
        logits = penalize_frequency_np(logits, params.frequency_penalty, params.presence_penalty,
                                       output_token_ids)
    return logits


def process_logits_torch(logits, params, prompt_token_ids, output_token_ids, stop_token_ids):
    """Same contract as process_logits_np."""
    logit_bias = dict(params.logit_bias or {})
    if len(output_token_ids) < params.min_tokens:
        logit_bias.update(dict.fromkeys(stop_token_ids, -math.inf))
    if logit_bias:
        logits = bias_torch(logits, logit_bias)
    if params.repetition_penalty != 1:
        seen_token_ids = [*prompt_token_ids, *output_token_ids]
        logits = penalize_repetition_torch(logits, params.repetition_penalty, seen_token_ids)
    if params.frequency_penalty or params.presence_penalty:
        logits = penalize_frequency_torch(logits, params.frequency_penalty, params.presence_penalty,
                                          output_token_ids)
    return logits


def bias_np(logits, logit_bias):
    """Adds to chosen logits: logit_bias is token id -> addend. ln 2 doubles a token's odds, -inf
    forbids it."""
    logits = logits.astype(np.float64)
    logits[list(logit_bias)] += np.array(list(logit_bias.values()), dtype=np.float64)
    return logits


def bias_torch(logits, logit_bias):
    """Same contract as bias_np."""
    logits = logits.to(torch.float64, copy=True)
    logits[list(logit_bias)] += torch.tensor(list(logit_bias.values()), dtype=torch.float64,
                                             device=logits.device)
    return logits


def penalize_repetition_np(logits, repetition_penalty, token_ids):
    """Makes every token that occurs in token_ids (prompt and output) less likely, once.

    Keskar et al. 2019 (CTRL, §4.1) divide the logit by the penalty; a negative logit has to be
    multiplied instead, or the penalty would be a reward.

    >>> penalize_repetition_np(np.array([4.0, -4.0, 4.0]), 2.0, [0, 1, 1])
    array([ 2., -8.,  4.])
    """
    logits = logits.astype(np.float64)
    seen = np.unique(np.array(token_ids, dtype=np.int64))
    score = logits[seen]
    logits[seen] = np.where(score > 0, score / repetition_penalty, score * repetition_penalty)
    return logits


def penalize_repetition_torch(logits, repetition_penalty, token_ids):
    """Same contract as penalize_repetition_np."""
    logits = logits.to(torch.float64, copy=True)
    seen = torch.unique(torch.tensor(token_ids, dtype=torch.int64, device=logits.device))
    score = logits[seen]
    logits[seen] = torch.where(score > 0, score / repetition_penalty, score * repetition_penalty)
    return logits


def penalize_frequency_np(logits, frequency_penalty, presence_penalty, token_ids):
    """Subtracts frequency_penalty for each time a token occurs in token_ids (the output alone),
    and presence_penalty once if it occurs at all. (OpenAI's definition.)

    >>> penalize_frequency_np(np.array([1.0, 1.0, 1.0]), 0.5, 0.25, [1, 2, 2])
    array([ 1.  ,  0.25, -0.25])
    """
    logits = logits.astype(np.float64)
    seen, counts = np.unique(np.array(token_ids, dtype=np.int64), return_counts=True)
    logits[seen] -= frequency_penalty * counts + presence_penalty
    return logits


def penalize_frequency_torch(logits, frequency_penalty, presence_penalty, token_ids):
    """Same contract as penalize_frequency_np."""
    logits = logits.to(torch.float64, copy=True)
    seen, counts = torch.unique(torch.tensor(token_ids, dtype=torch.int64, device=logits.device),
                                return_counts=True)
    # .double(): an integer tensor times a Python float would be float32
    logits[seen] -= frequency_penalty * counts.double() + presence_penalty
    return logits
