"""Exercise of chapter 05_model: write forward_np.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 05
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/05_model/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write forward_torch below, in
PyTorch, and the same checks run on them.

Shapes: N flattened new tokens of a whole batch · C hidden size · F feed-forward size · H query
heads · K key/value heads · D head dimension · V vocabulary.
"""

from __future__ import annotations

import numpy as np

from minillm.linear import embedding_np, linear_np
from minillm.mlp import swiglu_np
from minillm.norm import rms_norm_np
from minillm.rope import rope_angles_np, rope_np


def forward_np(weights, tokens, positions, cache, rows=None):
    """One pass through the transformer: token ids in, scores of every possible next token out.

        x = embedding(tokens)
        in each layer:   q, k, v = qkv_proj(norm(x))
                         x = x + o_proj(attend(rotated q, rotated k, v))
                         x = x + swiglu(norm(x))
        logits = lm_head(norm(x))                       (LLaMA: Touvron et al. 2023, §2.2)

    tokens, positions: [N] int.   rows: a list of R indices of tokens, the ones whose logits the
    caller wants (None: all N).   ->  logits [R, V], in the dtype of the weights. The head is a
    fifth of all weights of a small model, so it multiplies the R rows and no others.

    weights: `config`, with `heads`, which is (H, K, D), and `rms_norm_eps`;  `embed_tokens` [V, C];
    `layers`, a list;  `norm` [C];  `lm_head` [V, C];  `inv_freq` [D/2], in float64: cast the cos
    and sin of the angles to x's dtype, or all that they touch becomes float64 as well.
    Each layer: `input_layernorm` [C];  `qkv_proj` [(H + 2·K)·D, C], the rows of q's heads, then
    k's, then v's;  `o_proj` [C, H·D];  `post_attention_layernorm` [C];  `gate_proj` and `up_proj`
    [F, C];  `down_proj` [C, F];  `qk_norm` [H + K, D], a norm weight for every head of q and k, to
    be applied before they are rotated, or None. Norms are arrays. All the others are objects, for
    linear_np (which adds the bias where there is one), embedding_np and swiglu_np.

    cache: whatever has `attend(layer, q, k, v)`, with the layer's index, q [N, H, D], k and v
    [N, K, D]  ->  [N, H, D]. Call it once for each layer, in their order: it keeps k and v, and it
    knows which token sees which.

    Cost: about 2·N FLOPs a weight of the layers, plus attention.
    """
    raise NotImplementedError("forward_np is yours to write")
