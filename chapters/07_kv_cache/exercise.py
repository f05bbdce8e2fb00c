"""Exercise of chapter 07_kv_cache: write KVCache.

Write code in the place of each `raise NotImplementedError`; the docstring says what it has to do,
and the README beside this file tells the story. Then, from the folder that holds chapters/:

    python -m minillm grade 07
    python -m minillm generate "Once upon a time" --temperature 0 \
        --impl chapters/07_kv_cache/exercise.py

The first says which checks pass, and what is wrong. The second writes text with the whole engine,
in which your functions have taken the place of its own. Done? Write KVCacheTorch below, in
PyTorch, and the same checks run on them.

Shapes: S visible tokens, cached and new · N flattened new tokens of a whole batch · H query heads
· K key/value heads · D head dimension · L layers.
"""

from __future__ import annotations

import numpy as np

from minillm.attention import attention_np, online_softmax_attention_np
from minillm.kv_cache import MAX_PLAIN_SCORES


class KVCache:
    """The keys and values of one sequence, contiguous and preallocated (NumPy).

    config: num_hidden_layers (L), num_key_value_heads (K) and head_dim (D) are read.
    capacity: the most tokens it will hold; an attribute of the same name tells it to the engine.
    dtype: of keys and values, whatever NumPy takes for one: np.float32, "float32".
    The PyTorch form has a fourth argument, device, and torch's dtypes.

    A forward pass calls attend for layer 0, 1, … L − 1 with the same new tokens. In the middle of
    a pass the first layers hold more tokens than the last, so every layer counts its own.

    keys, values: [L, K, capacity, D].   Memory: 2·L·K·D·capacity numbers, however few are used:
    what the system does not hand out before it is touched, it hands out in pages, and NumPy asks
    for huge ones.
    """

    def __init__(self, config, capacity, dtype=np.float32):
        raise NotImplementedError("KVCache.__init__ is yours to write")

    @property
    def length(self):
        """Tokens whose keys and values every layer has: what the layer with the fewest holds."""
        raise NotImplementedError("KVCache.length is yours to write")

    def append(self, layer, k, v):
        """Write k, v [N, K, D] behind what layer `layer` holds; -> all its keys, values [K, S, D].

        S counts the tokens from before and the N new ones, which come last. What is there already
        is not copied: views of the two arrays are what is returned. Other layers stay as they are.
        Raises ValueError, and changes nothing, if k and v differ in shape, and beyond the capacity:
        a full cache must not drop a token silently, as writing one row into an empty slice does.
        """
        raise NotImplementedError("KVCache.append is yours to write")

    def attend(self, layer, q, k, v):
        """Store fresh keys and values, then attend to all that this layer holds.

        q: [N, H, D], k, v: [N, K, D]  ->  [N, H, D];   the N tokens follow those in the cache, and
        each sees itself and all before it. attention_np does that, with heads in front: q is
        [H, N, D] there. Beyond MAX_PLAIN_SCORES (N·S) the online form, same result, saves memory.
        """
        raise NotImplementedError("KVCache.attend is yours to write")

    def truncate(self, length):
        """Forget every token from position `length` on: the next one is written there.

        Also what makes the cache whole again after a forward pass was interrupted half-way,
        when some layers hold more tokens than others: truncate(cache.length).
        Raises ValueError, and changes nothing, unless 0 <= length <= cache.length.
        """
        raise NotImplementedError("KVCache.truncate is yours to write")
