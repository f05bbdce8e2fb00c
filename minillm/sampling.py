"""Which token comes next? From the model's logits [V] to one token id, NumPy above torch.

Chapter 06_sampling tells the story. The order of the steps is vLLM's (v1/sample/sampler.py):

    min_tokens · logit_bias · penalties      may change which token is best   penalties.py
    greedy? then the best token, and done
    temperature · min_p · top_k · top_p      never remove the best token      probabilities_*
    draw                                     inverse of the cumulative sum    draw_*

Every step takes logits and returns new ones, with -inf for what is removed; the caller's array is
never changed. Randomness is an argument, the uniform number u. The arithmetic is float64: 49 152
numbers cost little beside a forward pass, and both twins pick the same token for the same u.

Left out on purpose: batches (one row a call), and stop strings, which are a matter of text.
"""

from __future__ import annotations

import math

import lazy_loader as lazy
import numpy as np

from .exercise import exercise
from .penalties import process_logits_np, process_logits_torch
from .sampling_params import SamplingParams

torch = lazy.load("torch")

# Two sums of the same probabilities differ in their last digits. A nucleus whose mass reaches
# top_p but for those digits is complete: of (0.5, 0.3, 0.2), top_p=0.8 keeps two tokens, always.
ROUNDING = 1e-9
DRAW_BLOCK = 256  # tokens


def request_rng(seed: int | None, index: int) -> np.random.Generator:
    """The random stream of completion `index` of a request: `.random()` gives the next u.

    Each completion owns its stream, so its text does not depend on what else runs. seed None
    takes fresh entropy from the system.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))


@exercise("06_sampling", order=4)
def sample_np(logits, params: SamplingParams, u, prompt_token_ids=(), output_token_ids=(),
              stop_token_ids=()) -> int:
    """The next token of one request, in vLLM's order:

        process_logits_np    min_tokens, logit_bias, penalties: may change which token is best
        greedy?              the best token (of equals the lowest id), and done: u is not read
        probabilities_np     temperature, min_p, top_k, top_p: the best token always stays
        draw_np              the first token, by id, at which the running sum exceeds u

    logits: [V], any float type   u: uniform in [0, 1), all the randomness there is
    prompt_token_ids, output_token_ids: what was given and what has been answered so far; the
    penalties read them   stop_token_ids: the tokens that end a text, which min_tokens forbids.
    Raises FloatingPointError if any logit is NaN or the best is infinite: a token picked from such
    logits would look like an answer. (No InputError, because the caller is not to blame.)
    """
    logits = process_logits_np(logits, params, prompt_token_ids, output_token_ids, stop_token_ids)
    best = int(logits.argmax())  # NaN counts as the largest, so one number vouches for all
    if not np.isfinite(logits[best]):
        raise FloatingPointError(f"the best logit is {float(logits[best])}: the model's arithmetic "
                                 "overflowed, or every token is ruled out")
    if params.is_greedy:
        return best
    return draw_np(probabilities_np(logits, params), u)


def sample_torch(logits, params: SamplingParams, u, prompt_token_ids=(), output_token_ids=(),
                 stop_token_ids=()) -> int:
    """Same contract as sample_np."""
    logits = process_logits_torch(logits, params, prompt_token_ids, output_token_ids,
                                  stop_token_ids)
    best = int(logits.argmax())
    if not torch.isfinite(logits[best]):
        raise FloatingPointError(f"the best logit is {float(logits[best])}: the model's arithmetic "
                                 "overflowed, or every token is ruled out")
    if params.is_greedy:
        return best
    return draw_torch(probabilities_torch(logits, params), u)


def best_tokens_np(logits) -> list[int]:
    """The best token of each row of logits [R, V]: what sample_np finds for requests that are
    greedy and nothing else, for all of them at once.   Raises FloatingPointError as it does."""
    best = logits.argmax(axis=-1)
    largest = np.take_along_axis(logits, best[:, None], axis=-1)
    if not np.isfinite(largest).all():
        raise FloatingPointError("the best logit of a row is not finite: the model's arithmetic "
                                 "overflowed")
    return best.tolist()


def best_tokens_torch(logits) -> list[int]:
    """Same contract as best_tokens_np."""
    best = logits.argmax(dim=-1)
    largest = torch.take_along_dim(logits, best[:, None], dim=-1)
    if not torch.isfinite(largest).all():
        raise FloatingPointError("the best logit of a row is not finite: the model's arithmetic "
                                 "overflowed")
    return best.tolist()


def probabilities_np(logits, params):
    """The distribution that a token is drawn from: [V] float64, sum 1, 0 for what is removed.

    The temperature comes first, so it decides how many tokens min_p and top_p let through.
    Not for greedy params, whose temperature divides by 0.
    """
    logits = logits.astype(np.float64) / params.temperature
    if params.min_p > 0:
        logits = min_p_np(logits, params.min_p)
    if params.top_k > 0:
        logits = top_k_np(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p_np(logits, params.top_p)
    return softmax_np(logits)


def probabilities_torch(logits, params):
    """Same contract as probabilities_np."""
    logits = logits.to(torch.float64) / params.temperature
    if params.min_p > 0:
        logits = min_p_torch(logits, params.min_p)
    if params.top_k > 0:
        logits = top_k_torch(logits, params.top_k)
    if params.top_p < 1:
        logits = top_p_torch(logits, params.top_p)
    return softmax_torch(logits)


@exercise("06_sampling", order=3)
def min_p_np(logits, min_p):
    """Keeps tokens whose probability is at least min_p times the best one's. (Nguyen et al. 2024)

    p ≥ min_p·p_best  is  logit ≥ best + ln(min_p): the softmax cancels. min_p in (0, 1].
    logits: [V], where -inf is a token that is removed already   ->   [V], new: a logit that is kept
    is as it was, the others are -inf.

    >>> min_p_np(np.log([0.6, 0.3, 0.1]), 0.4) > -np.inf
    array([ True,  True, False])
    """
    edge = logits.max() + math.log(min_p)
    return np.where(logits < edge, -np.inf, logits)


def min_p_torch(logits, min_p):
    """Same contract as min_p_np."""
    edge = logits.max() + math.log(min_p)
    return torch.where(logits < edge, -torch.inf, logits)


@exercise("06_sampling", order=1)
def top_k_np(logits, k):
    """Keeps the k largest logits, and all that equal the k-th. (Fan et al. 2018)

    logits: [V]   k ≥ 1, and may exceed V   ->   [V], new: a logit that is kept is as it was, the
    others are -inf. A partition finds the k-th value without sorting: O(V), not O(V·log V).

    >>> top_k_np(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    array([-inf,   3.,   2.,   2.])
    """
    k = min(k, len(logits))
    edge = np.partition(logits, -k)[-k]
    return np.where(logits < edge, -np.inf, logits)


def top_k_torch(logits, k):
    """Same contract as top_k_np."""
    k = min(k, len(logits))
    edge = torch.topk(logits, k).values[-1]
    return torch.where(logits < edge, -torch.inf, logits)


@exercise("06_sampling", order=2)
def top_p_np(logits, top_p):
    """Keeps the nucleus: the fewest tokens whose probabilities reach top_p in sum, and at least
    one. Of equal tokens the lower ids stay, as in argmax. (Holtzman et al. 2020, §3.1)

    Seen from the other end: the least likely tokens go, as long as all that have gone together
    weigh no more than 1 - top_p. A sum that misses its mark by ROUNDING, relative, has met it.
    logits: [V], where -inf is a token that is removed already   top_p in (0, 1]   ->   [V], new: a
    logit that is kept is as it was, the others are -inf.

    >>> top_p_np(np.log([0.1, 0.5, 0.15, 0.25]), 0.7) > -np.inf
    array([False,  True, False,  True])
    """
    probs = softmax_np(logits)
    removable = (1 - top_p) * (1 + ROUNDING)
    # Tokens below removable/2V weigh less than removable/2 together: all of them go, unsorted.
    # A model gives most of its vocabulary that little, and sorting is the cost of this step.
    likely = probs >= removable / (2 * len(probs))
    ascending = np.sort(probs[likely])
    tail = probs[~likely].sum() + np.cumsum(ascending)
    num_removed = min(int(np.searchsorted(tail, removable, side="right")), len(ascending) - 1)
    edge = ascending[num_removed]
    kept = probs > edge
    num_equal = len(ascending) - num_removed - int(kept.sum())
    equal = np.flatnonzero(probs == edge)[:num_equal]
    kept[equal] = True
    return np.where(kept, logits, -np.inf)


def top_p_torch(logits, top_p):
    """Same contract as top_p_np."""
    probs = softmax_torch(logits)
    removable = (1 - top_p) * (1 + ROUNDING)
    likely = probs >= removable / (2 * len(probs))
    ascending = torch.sort(probs[likely]).values
    tail = probs[~likely].sum() + torch.cumsum(ascending, dim=0)
    num_removed = min(int(torch.searchsorted(tail, removable, side="right")), len(ascending) - 1)
    edge = ascending[num_removed]
    kept = probs > edge
    num_equal = len(ascending) - num_removed - int(kept.sum())
    equal = torch.nonzero(probs == edge).flatten()[:num_equal]
    kept[equal] = True
    return torch.where(kept, logits, -torch.inf)


def softmax_np(logits):
    """exp(logit) / Σ exp(logit) in float64; the best logit is moved to 0 so no exp overflows."""
    logits = logits.astype(np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def softmax_torch(logits):
    """Same contract as softmax_np."""
    logits = logits.to(torch.float64)
    weights = torch.exp(logits - logits.max())
    return weights / weights.sum()


def draw_np(probs, u) -> int:
    """The first token, in the order of ids, at which the running sum of probs exceeds u.

    u is measured against the sum that rounding really gave, or a u just below 1 could lie past
    the end. First comes the question into which block of tokens it falls, then where in that block:
    a running sum over the whole vocabulary would be most of a sampler's time. Tokens and blocks of
    probability 0 do not take part: a GPU adds in parallel, where even they can seem to raise the
    running sum.

    >>> [draw_np(np.array([0.5, 0.0, 0.25, 0.25]), u) for u in (0.0, 0.49, 0.5, 0.75, 0.99)]
    [0, 0, 2, 3, 3]
    """
    blocks = np.pad(probs, (0, -len(probs) % DRAW_BLOCK)).reshape(-1, DRAW_BLOCK)
    sums = blocks.sum(axis=1)
    candidates = np.flatnonzero(sums)
    cumulative = np.cumsum(sums[candidates])
    target = u * cumulative[-1]
    index = min(int(np.searchsorted(cumulative, target, side="right")), len(candidates) - 1)
    block = int(candidates[index])
    target = target - (cumulative[index] - sums[block])
    candidates = np.flatnonzero(blocks[block])
    cumulative = np.cumsum(blocks[block][candidates])
    index = min(int(np.searchsorted(cumulative, target, side="right")), len(candidates) - 1)
    return block * DRAW_BLOCK + int(candidates[index])


def draw_torch(probs, u) -> int:
    """Same contract as draw_np."""
    blocks = torch.nn.functional.pad(probs, (0, -len(probs) % DRAW_BLOCK)).reshape(-1, DRAW_BLOCK)
    sums = blocks.sum(dim=1)
    candidates = torch.nonzero(sums).flatten()
    cumulative = torch.cumsum(sums[candidates], dim=0)
    target = u * cumulative[-1]
    index = min(int(torch.searchsorted(cumulative, target, side="right")), len(candidates) - 1)
    block = int(candidates[index])
    target = target - (cumulative[index] - sums[block])
    candidates = torch.nonzero(blocks[block]).flatten()
    cumulative = torch.cumsum(blocks[block][candidates], dim=0)
    index = min(int(torch.searchsorted(cumulative, target, side="right")), len(candidates) - 1)
    return block * DRAW_BLOCK + int(candidates[index])


def top_logprobs_np(logits, token, num) -> dict[int, float]:
    """{token id: log-probability}: first `token`, the one that was sampled, then the num best.

    logits are the model's own: what it thought, before temperature, penalties and the rest. If
    `token` is among the best it has one entry, so there are num or num + 1. Tokens that the model
    itself rules out (-inf) are not reported.
    """
    logits = logits.astype(np.float64)
    shifted = logits - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    candidates = np.flatnonzero(top_k_np(logprobs, max(num, 1)) > -np.inf)
    order = np.argsort(-logprobs[candidates], kind="stable")  # of equals, the lower id first
    best = candidates[order][:num].tolist()
    return {token_id: float(logprobs[token_id]) for token_id in [token, *best]}


def top_logprobs_torch(logits, token, num) -> dict[int, float]:
    """Same contract as top_logprobs_np."""
    logits = logits.to(torch.float64)
    shifted = logits - logits.max()
    logprobs = shifted - torch.log(torch.exp(shifted).sum())
    candidates = torch.nonzero(top_k_torch(logprobs, max(num, 1)) > -torch.inf).flatten()
    order = torch.argsort(-logprobs[candidates], stable=True)
    best = candidates[order][:num].tolist()
    return {token_id: float(logprobs[token_id]) for token_id in [token, *best]}
