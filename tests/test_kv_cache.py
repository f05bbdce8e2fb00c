"""The cache: attention in pieces is attention over the whole, whatever was truncated between."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import kv_cache
from minillm.attention import attention_np
from minillm.config import ModelConfig
from minillm.kv_cache import KVCache, KVCacheTorch

L, H, K, D = 3, 6, 2, 4
CONFIG = ModelConfig(vocab_size=9, hidden_size=8, intermediate_size=7, num_hidden_layers=L,
                     num_attention_heads=H, num_key_value_heads=K, head_dim=D)
a_few = settings(max_examples=40, deadline=None)


class Backend(NamedTuple):
    """One of the two classes, fed and read with float64 NumPy arrays."""

    device: str | None

    def new_cache(self, capacity):
        if self.device is None:
            cache = KVCache(CONFIG, capacity, np.float64)
        else:
            cache = KVCacheTorch(CONFIG, capacity, torch.float64, self.device)
        cache.keys[:] = cache.values[:] = float("nan")  # what nobody wrote poisons who reads it
        return cache

    def call(self, method, layer, *arrays):
        """cache.attend or cache.append, from arrays to arrays."""
        if self.device is None:
            return method(layer, *arrays)
        result = method(layer, *(torch.from_numpy(array).to(self.device) for array in arrays))
        return result.cpu() if isinstance(result, torch.Tensor) else [x.cpu() for x in result]


@pytest.fixture(scope="module", params=[
    pytest.param(None, id="numpy"), pytest.param("cpu", id="torch"),
    pytest.param("cuda", marks=pytest.mark.cuda)])
def backend(request):
    return Backend(request.param)


def fresh(num_tokens, seed=0):
    """q [N, H, D], k and v [N, K, D] of one layer."""
    rng = np.random.default_rng([num_tokens, seed])
    return tuple(rng.normal(size=(num_tokens, heads, D)) for heads in (H, K, K))


def whole(q, k, v):
    """Attention over everything at once, in the cache's layout: [N, H, D]."""
    return attention_np(*(x.swapaxes(0, 1) for x in (q, k, v))).swapaxes(0, 1)


def attend(backend, cache, qkv, start, end, layers=range(L)):
    """Tokens start to end through the layers; -> the output of the last of them."""
    for layer in layers:
        out = backend.call(cache.attend, layer, *(x[start:end] for x in qkv))
    return out


# ── In pieces ────────────────────────────────────────────────────────────────────────────────


@a_few
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=8),
       max_plain_scores=st.sampled_from([0, 30, 2**18]))
def test_pieces_equal_the_whole(backend, pieces, max_plain_scores):
    qkv, cache = fresh(sum(pieces)), backend.new_cache(sum(pieces))
    with pytest.MonkeyPatch.context() as patch:  # both forms of attention, and their border
        patch.setattr(kv_cache, "MAX_PLAIN_SCORES", max_plain_scores)
        outputs = []
        for piece in pieces:
            outputs.append(attend(backend, cache, qkv, cache.length, cache.length + piece))
    np.testing.assert_allclose(np.concatenate(outputs), whole(*qkv), rtol=0, atol=1e-10)
    assert cache.length == cache.capacity == sum(pieces)


@a_few
@given(st.data())
def test_append_and_truncate_keep_the_books(backend, data):
    """Against plain arrays, after every one of up to twelve random operations."""
    capacity = 20
    cache, (_, k, v) = backend.new_cache(capacity), fresh(0)
    for seed in range(data.draw(st.integers(1, 12))):
        if data.draw(st.booleans()):
            length = data.draw(st.integers(0, len(k)))
            cache.truncate(length)
            k, v = k[:length], v[:length]
        else:
            num_tokens = data.draw(st.integers(1, max(1, min(6, capacity - len(k)))))
            _, new_k, new_v = fresh(num_tokens, seed)
            if len(k) == capacity:
                with pytest.raises(ValueError, match="21 tokens .* capacity of 20"):
                    backend.call(cache.append, 0, new_k, new_v)
                continue
            k, v = np.concatenate([k, new_k]), np.concatenate([v, new_v])
            for layer in range(L):
                keys, values = backend.call(cache.append, layer, new_k + layer, new_v - layer)
                np.testing.assert_array_equal(keys, k.swapaxes(0, 1) + layer)
                np.testing.assert_array_equal(values, v.swapaxes(0, 1) - layer)
        assert cache.lengths == [len(k)] * L and cache.length == len(k)


def test_layers_are_apart(backend):
    cache, (_, k, v) = backend.new_cache(5), fresh(2)
    backend.call(cache.append, 1, k, v)
    assert cache.lengths == [0, 2, 0] and cache.length == 0
    assert backend.call(cache.append, 0, k, v)[0].shape == (K, 2, D)


# ── Truncate ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("length", [0, 1, 4, 6])
def test_truncated_tokens_were_never_there(backend, length):
    """Six tokens, cut to `length`, then four others: as if those had followed at once."""
    first, other = fresh(6, seed=1), fresh(4, seed=2)
    cache = backend.new_cache(10)
    attend(backend, cache, first, 0, 6)
    cache.truncate(length)
    assert cache.length == length
    out = attend(backend, cache, other, 0, 4)
    together = [np.concatenate([a[:length], b]) for a, b in zip(first, other)]
    np.testing.assert_allclose(out, whole(*together)[length:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [-1, 4, 5])
def test_truncate_refuses_what_is_not_there(backend, length):
    cache = backend.new_cache(5)
    attend(backend, cache, fresh(3), 0, 3)
    with pytest.raises(ValueError, match=f"cannot truncate to {length}: the cache holds 3 tokens"):
        cache.truncate(length)
    assert cache.length == 3


def test_an_interrupted_pass_is_repaired(backend):
    """Ctrl-C after the second of three layers: two hold a token that the third has not seen."""
    qkv, cache = fresh(5), backend.new_cache(5)
    attend(backend, cache, qkv, 0, 4)
    attend(backend, cache, qkv, 4, 5, layers=range(2))
    assert cache.lengths == [5, 5, 4] and cache.length == 4
    cache.truncate(cache.length)
    assert cache.lengths == [4, 4, 4]
    out = attend(backend, cache, qkv, 4, 5)
    np.testing.assert_allclose(out, whole(*qkv)[4:], rtol=0, atol=1e-10)


# ── Capacity and shapes ──────────────────────────────────────────────────────────────────────


def test_a_full_cache_refuses_and_stays_as_it_is(backend):
    qkv, cache = fresh(6), backend.new_cache(5)
    attend(backend, cache, qkv, 0, 4)
    with pytest.raises(ValueError, match="6 tokens do not fit in a cache with a capacity of 5"):
        attend(backend, cache, qkv, 4, 6)
    assert cache.lengths == [4, 4, 4]
    out = attend(backend, cache, qkv, 4, 5)  # exactly full
    np.testing.assert_allclose(out, whole(*(x[:5] for x in qkv))[4:], rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="6 tokens .* capacity of 5"):
        attend(backend, cache, qkv, 5, 6)


def test_wrong_shapes_raise(backend):
    q, k, v = fresh(3)
    wrong = (ValueError, RuntimeError)
    with pytest.raises(wrong):
        backend.call(backend.new_cache(5).attend, 0, q, k[..., :3], v)  # D
    with pytest.raises(wrong):
        backend.call(backend.new_cache(5).attend, 0, q, k, v[:2])  # tokens
    with pytest.raises(wrong):
        backend.call(backend.new_cache(5).attend, 0, q, np.concatenate([k, k], axis=1), v)  # K
    with pytest.raises(IndexError):
        backend.call(backend.new_cache(5).attend, L, q, k, v)


def test_keys_and_values_have_the_dtype_asked_for():
    assert KVCache(CONFIG, 5).keys.dtype == np.float32
    assert KVCache(CONFIG, 5, np.float64).values.dtype == np.float64
    cache = KVCacheTorch(CONFIG, 5, torch.bfloat16, "cpu")
    assert cache.keys.dtype == cache.values.dtype == torch.bfloat16
    assert cache.keys.shape == cache.values.shape == (L, K, 5, D)
