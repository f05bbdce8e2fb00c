"""Exercise of chapter 04_attention: write attention_np and online_softmax_attention_np.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 04
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/04_attention/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write attention_torch and
online_softmax_attention_torch below, in PyTorch, and the same checks run on them.

Shapes: T new tokens of one sequence · S visible tokens, cached and new · H query heads · K
key/value heads · D head dimension.
"""

from __future__ import annotations

import math

import numpy as np

from minillm.attention import check_shapes


def attention_np(q, k, v):
    """Scaled dot-product attention with grouped heads and a causal mask.

        softmax(q·kᵀ / √D)·v            (Vaswani et al. 2017, §3.2.1; GQA: Ainslie et al. 2023)

    q: [H, T, D]   k, v: [K, S, D]   ->   [H, T, D], in q's dtype
    Query head h reads key/value head h // (H/K). The T queries are the last of the S positions:
    query t stands at position S − T + t, and sees the keys up to that position, its own included.
    Cost: 4·H·T·S·D FLOPs, and H·T·S scores in memory.
    Raises ValueError if H is no multiple of K; check_shapes(q, k, v) does that.
    """
    raise NotImplementedError("attention_np is yours to write")


def online_softmax_attention_np(q, k, v, block_size=256):
    """attention_np without the score matrix: one block of keys at a time.

    Softmax needs the largest score before the first exponential. It can do without: keep the
    largest seen so far, and when a larger one comes, shrink what was added up under the old one
    by exp(old − new).      (Milakov and Gimelshein 2018, alg. 3; FlashAttention, Dao et al. 2022)

    Same shapes, dtype and result as attention_np; H·T·block_size scores in memory, not H·T·S.
    block_size need not divide S, and may be larger.
    """
    raise NotImplementedError("online_softmax_attention_np is yours to write")
