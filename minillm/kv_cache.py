"""Where do keys and values live, so that no token is computed twice?

In two arrays, allocated once for all layers: a new token writes its key and value behind those of
the tokens before it, and attends to all of them. Chapter 07_kv_cache tells the story. Left out
here: many sequences in one memory, which is `paged_cache.py`'s subject.

The model hands a layer's fresh q, k, v to `attend` and gets the attention output back; what a
cache does in between (append, gather blocks, quantize) is its own affair.
"""

from __future__ import annotations

import lazy_loader as lazy
import numpy as np

from .attention import attention_np, attention_sdpa, online_softmax_attention_np
from .exercise import exercise

torch = lazy.load("torch")

# Up to this many scores a head, the plain form; beyond, the online one (1 MiB in float32).
MAX_PLAIN_SCORES = 2**18


@exercise("07_kv_cache")
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
        self.capacity = capacity
        self.lengths = [0] * config.num_hidden_layers  # tokens written, layer by layer
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = np.empty(shape, dtype=dtype)
        self.values = np.empty(shape, dtype=dtype)

    @property
    def length(self):
        """Tokens whose keys and values every layer has: what the layer with the fewest holds."""
        return min(self.lengths)

    def append(self, layer, k, v):
        """Write k, v [N, K, D] behind what layer `layer` holds; -> all its keys, values [K, S, D].

        S counts the tokens from before and the N new ones, which come last. What is there already
        is not copied: views of the two arrays are what is returned. Other layers stay as they are.
        Raises ValueError, and changes nothing, if k and v differ in shape, and beyond the capacity:
        a full cache must not drop a token silently, as writing one row into an empty slice does.
        """
        start = self.lengths[layer]
        end = start + k.shape[0]
        if k.shape != v.shape:
            raise ValueError(f"k {tuple(k.shape)} and v {tuple(v.shape)} must have one shape")
        if end > self.capacity:
            raise ValueError(f"{end} tokens do not fit in a cache with a capacity of "
                             f"{self.capacity}: allocate a longer one or truncate it")
        self.keys[layer, :, start:end] = k.swapaxes(0, 1)
        self.values[layer, :, start:end] = v.swapaxes(0, 1)
        self.lengths[layer] = end
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer, q, k, v):
        """Store fresh keys and values, then attend to all that this layer holds.

        q: [N, H, D], k, v: [N, K, D]  ->  [N, H, D];   the N tokens follow those in the cache, and
        each sees itself and all before it. attention_np does that, with heads in front: q is
        [H, N, D] there. Beyond MAX_PLAIN_SCORES (N·S) the online form, same result, saves memory.
        """
        keys, values = self.append(layer, k, v)
        plain = q.shape[0] * keys.shape[1] <= MAX_PLAIN_SCORES
        attention = attention_np if plain else online_softmax_attention_np
        return attention(q.swapaxes(0, 1), keys, values).swapaxes(0, 1)

    def truncate(self, length):
        """Forget every token from position `length` on: the next one is written there.

        Also what makes the cache whole again after a forward pass was interrupted half-way,
        when some layers hold more tokens than others: truncate(cache.length).
        Raises ValueError, and changes nothing, unless 0 <= length <= cache.length.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot truncate to {length}: the cache holds {self.length} tokens")
        self.lengths = [length] * len(self.lengths)


class KVCacheTorch(KVCache):
    """Same contract as KVCache; tensors on `device`, attention through the fused kernel."""

    def __init__(self, config, capacity, dtype, device):
        self.capacity = capacity
        self.lengths = [0] * config.num_hidden_layers
        shape = (config.num_hidden_layers, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def attend(self, layer, q, k, v):
        """Same contract as KVCache.attend."""
        keys, values = self.append(layer, k, v)
        return attention_sdpa(q.swapaxes(0, 1), keys, values).swapaxes(0, 1)
