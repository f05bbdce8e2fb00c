"""Exercise of chapter 06_sampling: write top_k_np, top_p_np, min_p_np and sample_np.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 06
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/06_sampling/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write top_k_torch, top_p_torch,
min_p_torch and sample_torch below, in PyTorch, and the same checks run on them.

Shapes: V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np

from minillm.penalties import process_logits_np
from minillm.sampling import ROUNDING, draw_np, probabilities_np, softmax_np
from minillm.sampling_params import SamplingParams


def top_k_np(logits, k):
    """Keeps the k largest logits, and all that equal the k-th. (Fan et al. 2018)

    logits: [V]   k ≥ 1, and may exceed V   ->   [V], new: a logit that is kept is as it was, the
    others are -inf. A partition finds the k-th value without sorting: O(V), not O(V·log V).

    >>> top_k_np(np.array([1.0, 3.0, 2.0, 2.0]), 2)
    array([-inf,   3.,   2.,   2.])
    """
    raise NotImplementedError("top_k_np is yours to write")


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
    raise NotImplementedError("top_p_np is yours to write")


def min_p_np(logits, min_p):
    """Keeps tokens whose probability is at least min_p times the best one's. (Nguyen et al. 2024)

    p ≥ min_p·p_best  is  logit ≥ best + ln(min_p): the softmax cancels. min_p in (0, 1].
    logits: [V], where -inf is a token that is removed already   ->   [V], new: a logit that is kept
    is as it was, the others are -inf.

    >>> min_p_np(np.log([0.6, 0.3, 0.1]), 0.4) > -np.inf
    array([ True,  True, False])
    """
    raise NotImplementedError("min_p_np is yours to write")


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
    raise NotImplementedError("sample_np is yours to write")
