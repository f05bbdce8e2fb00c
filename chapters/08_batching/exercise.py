"""Exercise of chapter 08_batching: write pad_batch, masked_attention_np and decode_batch.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 08
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/08_batching/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write masked_attention_torch below,
in PyTorch, and the same checks run on them.

Shapes: B sequences · T new tokens of one sequence · S visible tokens, cached and new · H query
heads · K key/value heads · D head dimension · V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np


def pad_batch(prompts, pad_token_id=0):
    """Prompts of several lengths as one rectangle, filled up on the left.

    prompts: B lists of token ids, none empty
    -> tokens [B, T], positions [B, T], num_padding [B]: arrays of int. T is the longest prompt's
    length. A prompt's own tokens stand at the end of its row and have the positions 0, 1, 2 …, as
    they would alone; padding is pad_token_id at position 0, and num_padding counts it, row by row.

    >>> pad_batch([[7, 8, 9], [5]])[1]
    array([[0, 1, 2],
           [0, 0, 0]])
    """
    raise NotImplementedError("pad_batch is yours to write")


def masked_attention_np(q, k, v, visible):
    """attention_np for a batch whose sequences differ in length: a mask says who sees what.

    q: [B, H, T, D]   k, v: [B, K, S, D]   visible: [B, T, S] bool   ->   [B, H, T, D], in q's dtype
    Query t of sequence b sees key s where visible[b, t, s]; every query must see at least one.
    Query head h reads key/value head h // (H/K), and scores are divided by √D, as in attention_np.
    A key that nobody sees, padding or a place not written yet, costs as much as any other.
    Cost: 4·B·H·T·S·D FLOPs, whatever is visible.
    """
    raise NotImplementedError("masked_attention_np is yours to write")


def decode_batch(forward, logits, positions, pick):
    """Sample a token for every row, feed all of them back, until the last row has finished.

    forward(tokens, positions): one pass; takes a token and a position for every row, two lists of
        B ints   ->  logits [B, V]
    logits: [B, V], of the last prompt tokens   positions: B ints, where the rows' next tokens stand
    pick(row, logits[row])  ->  (token, has_finished); to be called once for every token of a row,
        rows in order, and never again after it has finished.
    -> the number of calls of forward: 0 if every row has finished with its first token.

    The batch keeps its shape: a row that has finished is computed like the others (its last token
    again, at its next position), and nobody reads what comes of it.
    """
    raise NotImplementedError("decode_batch is yours to write")
