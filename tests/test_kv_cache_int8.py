"""Keys and values in bytes: what is stored does not depend on how it came, and little is lost."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.kv_cache import KVCache, KVCacheTorch
from minillm.kv_cache_int8 import KVCacheInt8, KVCacheInt8Torch

CONFIG = SimpleNamespace(num_hidden_layers=3, num_key_value_heads=2, head_dim=10)
L, K, D, H, CAPACITY = 3, 2, 10, 6, 11
STORED = "keys", "values", "key_scales", "value_scales"
ON_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
a_few = settings(max_examples=30, deadline=None)
devices = pytest.mark.parametrize("device", ["numpy", "cpu", ON_CUDA])


class Cache:
    """A cache in either backend, that takes and gives NumPy arrays."""

    def __init__(self, device, classes=(KVCacheInt8, KVCacheInt8Torch), dtype="float32"):
        self.device, self.dtype = device, dtype
        self.cache = (classes[0](CONFIG, CAPACITY, dtype) if device == "numpy" else
                      classes[1](CONFIG, CAPACITY, getattr(torch, dtype), device))

    def call(self, method, layer, *arrays):
        if self.device != "numpy":
            arrays = [torch.from_numpy(array).to(self.device, getattr(torch, self.dtype))
                      for array in arrays]
        return getattr(self.cache, method)(layer, *arrays)

    def append(self, layer, k, v):
        found = self.call("append", layer, k, v)
        assert all(str(each.dtype).removeprefix("torch.") == self.dtype for each in found)
        return [as_numpy(each) for each in found]

    def attend(self, layer, q, k, v):
        return as_numpy(self.call("attend", layer, q, k, v))

    def stored(self, name, layer=0):
        """What was written of keys, values or scales: [K, S, D or 1]."""
        written = getattr(self.cache, name)[layer, :, : self.cache.lengths[layer]]
        return as_numpy(written).copy()


def as_numpy(array):
    return array if isinstance(array, np.ndarray) else array.float().cpu().numpy()


def heads(N, seed=0, count=K):
    """Keys or values of N tokens, some heads a hundred times as large as others."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(N, count, D)) * 10.0 ** rng.integers(-1, 2, (N, count, 1))).astype(
        np.float32)


@st.composite
def chunks(draw):
    """How CAPACITY tokens, or fewer, arrive."""
    sizes, left = [], CAPACITY
    while left and (not sizes or draw(st.booleans())):
        sizes.append(draw(st.integers(1, left)))
        left -= sizes[-1]
    return sizes


# ── What is stored ───────────────────────────────────────────────────────────────────────────


@devices
def test_by_hand(device):
    """A head of a token has a scale of its own: its largest number is 127 of them."""
    k = np.zeros((1, K, D), np.float32)
    k[0, 0, :3], k[0, 1, :3] = [127, -5.4, 1], [-254, 1, 3]
    cache = Cache(device)
    keys, values = cache.append(0, k, k / 2)
    assert cache.stored("keys")[:, 0, :3].tolist() == [[127, -5, 1], [-127, 0, 2]]
    assert cache.stored("key_scales").ravel().tolist() == [1, 2]
    assert cache.stored("value_scales").ravel().tolist() == [0.5, 1]
    assert keys[:, 0, :3].tolist() == [[127, -5, 1], [-254, 0, 4]]
    assert (values == keys / 2).all()


@devices
@a_few
@given(chunks(), st.integers(0, 2**32 - 1))
def test_what_is_stored_does_not_depend_on_the_chunks(device, sizes, seed):
    """Whole, in chunks, one at a time: the same bytes, and the same numbers for attention."""
    k, v = heads(sum(sizes), seed), heads(sum(sizes), seed + 1)
    whole, parts, start = Cache(device), Cache(device), 0
    expected = whole.append(1, k, v)
    for size in sizes:
        found = parts.append(1, k[start : start + size], v[start : start + size])
        start += size
    for name in STORED:
        np.testing.assert_array_equal(parts.stored(name, 1), whole.stored(name, 1), strict=True)
    np.testing.assert_array_equal(found, expected, strict=True)
    assert parts.cache.lengths == [0, sum(sizes), 0]


@pytest.mark.parametrize("device", ["cpu", ON_CUDA])
@a_few
@given(st.integers(1, CAPACITY), st.integers(0, 2**32 - 1))
def test_twins_store_the_same_bytes(device, N, seed):
    k, v = heads(N, seed), heads(N, seed + 1)
    cache, twin = Cache("numpy"), Cache(device)
    np.testing.assert_array_equal(twin.append(2, k, v), cache.append(2, k, v), strict=True)
    for name in STORED:
        np.testing.assert_array_equal(twin.stored(name, 2), cache.stored(name, 2))


@pytest.mark.parametrize("dtype, last_bits", [("float32", 0), ("float16", 2**-10),
                                              ("bfloat16", 2**-7)])
def test_every_number_is_off_by_half_a_scale_and_what_float16_costs(dtype, last_bits):
    """The scale, rounded to float16, is off by 2⁻¹¹ of itself, and so is what it multiplies."""
    k, v = heads(CAPACITY, 3), heads(CAPACITY, 4)
    cache = Cache("cpu", dtype=dtype)
    k, v = (torch.from_numpy(each).to(getattr(torch, dtype)).float().numpy() for each in (k, v))
    for x, found in zip((k, v), cache.append(0, k, v)):
        scale = np.abs(x).max(axis=2, keepdims=True) / 127
        error = np.abs(found - x.swapaxes(0, 1)).swapaxes(0, 1)
        assert (error <= scale * (0.501 + 127 * 2**-11) + np.abs(x) * 2 * last_bits).all()


@devices
@pytest.mark.filterwarnings("error")
def test_zeros_and_tiny_numbers(device):
    for value in (0.0, 1e-45, 1e-20, 1e-7):
        keys, _ = Cache(device).append(0, *[np.full((2, K, D), value, np.float32)] * 2)
        assert np.isfinite(keys).all() and np.abs(keys - value).max() <= value + 1e-12


# ── What a cache promises ────────────────────────────────────────────────────────────────────


@devices
def test_what_does_not_fit_changes_nothing(device):
    cache = Cache(device)
    k, v = heads(CAPACITY, 5), heads(CAPACITY, 6)
    cache.append(0, k[:9], v[:9])
    before = {name: as_numpy(getattr(cache.cache, name)).copy() for name in STORED}
    with pytest.raises(ValueError, match="12 tokens do not fit in a cache with a capacity of 11"):
        cache.append(0, k[:3], v[:3])
    with pytest.raises(ValueError, match="must have one shape"):
        cache.append(0, k[:2], v[:1])
    assert cache.cache.lengths == [9, 0, 0]
    for name in STORED:
        np.testing.assert_array_equal(as_numpy(getattr(cache.cache, name)), before[name])
    cache.append(0, k[9:], v[9:])
    assert cache.cache.lengths == [CAPACITY, 0, 0]


@devices
def test_truncate_and_write_again(device):
    """As speculation and conversations do; what is written again has its own scales."""
    cache, fresh = Cache(device), Cache(device)
    k, v, others = heads(8, 7), heads(8, 8), heads(4, 9)
    for layer in range(L):
        cache.append(layer, k, v)
    cache.cache.truncate(5)
    assert cache.cache.length == 5
    found = cache.append(0, others, 3 * others)
    expected = fresh.append(0, np.concatenate([k[:5], others]),
                            np.concatenate([v[:5], 3 * others]))
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(ValueError, match="cannot truncate to 9"):
        cache.cache.truncate(9)


@devices
def test_layers_do_not_touch_each_other(device):
    cache = Cache(device)
    for layer in range(L):
        cache.append(layer, heads(4, layer), heads(4, layer + 10))
    for layer in range(L):
        alone = Cache(device)
        alone.append(layer, heads(4, layer), heads(4, layer + 10))
        for name in STORED:
            np.testing.assert_array_equal(cache.stored(name, layer), alone.stored(name, layer))


@devices
def test_attention_is_that_of_a_plain_cache_with_the_same_numbers(device):
    """Given what the bytes stand for, a float32 cache answers the same; given the originals, it
    answers nearly the same."""
    cache = Cache(device)
    plain, original = (Cache(device, (KVCache, KVCacheTorch)) for _ in range(2))
    start = 0
    for size in (4, 1, 3):
        q, k, v = (heads(size, start + i, count) / 10 for i, count in enumerate((H, K, K)))
        output = cache.attend(0, q, k, v)
        stands_for = [cache.stored(name)[:, start:] * cache.stored(scales)[:, start:].astype("f4")
                      for name, scales in (("keys", "key_scales"), ("values", "value_scales"))]
        same = plain.attend(0, q, *[each.swapaxes(0, 1).copy() for each in stands_for])
        np.testing.assert_allclose(output, same, atol=1e-5)
        nearly = original.attend(0, q, k, v)
        assert output.shape == (size, H, D)
        assert np.abs(output - nearly).max() < 0.05 * np.abs(nearly).max()
        start += size


@pytest.mark.filterwarnings("ignore:invalid value")
@devices
def test_a_key_that_is_no_number_stays_visible(device):
    k = heads(2, 11)
    k[1, 0, 3] = np.nan
    keys, _ = Cache(device).append(0, k, k)
    assert np.isnan(keys[0, 1]).all()
    assert np.isfinite(keys[1]).all() and np.isfinite(keys[:, 0]).all()


@pytest.mark.parametrize("head_dim, expected", [(64, 0.52), (128, 0.51)])
def test_memory_is_half_of_bfloat16(head_dim, expected):
    config = SimpleNamespace(num_hidden_layers=2, num_key_value_heads=3, head_dim=head_dim)

    def size_bytes(cache, names):
        return sum(getattr(cache, name).nbytes for name in names)

    plain = KVCacheTorch(config, 100, torch.bfloat16, "cpu")
    for cache in (KVCacheInt8(config, 100), KVCacheInt8Torch(config, 100, torch.bfloat16, "cpu")):
        assert size_bytes(cache, STORED) == 2 * 2 * 3 * (head_dim + 2) * 100
        share = size_bytes(cache, STORED) / size_bytes(plain, STORED[:2])
        assert share == pytest.approx(expected, abs=0.005)
