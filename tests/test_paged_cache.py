"""Blocks: a step over rows of many sequences is what a cache of its own gives each of them."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm import paged_cache as module
from minillm.block_manager import BlockTable
from minillm.kernels.paged_attention import paged_attention_kernel
from minillm.kv_cache import KVCache, KVCacheTorch
from minillm.kv_cache_int8 import KVCacheInt8, KVCacheInt8Torch, PagedCacheInt8, PagedCacheInt8Torch
from minillm.paged_cache import (
    PagedCache,
    PagedCacheTorch,
    PagedStepTorch,
    StepLayout,
    lazy_zeros,
    paged_gather_np,
    paged_gather_torch,
    paged_scatter_np,
    paged_scatter_torch,
)

L, H, K, D = 3, 6, 2, 16  # our kernel wants a multiple of 16 for D
CONFIG = SimpleNamespace(num_hidden_layers=L, num_key_value_heads=K, head_dim=D)
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 6e-2}  # of the largest entry
a_few = settings(max_examples=12, deadline=None)
seeds = st.integers(0, 2**32 - 1)
ON_CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
needs_kernel = pytest.mark.skipif(paged_attention_kernel() is None,
                                  reason="no C compiler with OpenMP that knows these vectors")


class Backend(NamedTuple):
    """One kind of cache: of blocks, and of one sequence; fed and read with NumPy arrays."""

    device: str
    dtype: str
    is_int8: bool = False
    has_kernel: bool = False
    in_one_group: bool = False

    def paged(self, num_blocks, block_size):
        """A cache in which what nobody wrote is large: who reads it without a mask shows."""
        if self.device == "numpy":
            kind = PagedCacheInt8 if self.is_int8 else PagedCache
            cache = kind(CONFIG, num_blocks, block_size, self.dtype)
        else:
            kind = PagedCacheInt8Torch if self.is_int8 else PagedCacheTorch
            cache = kind(CONFIG, num_blocks, block_size, getattr(torch, self.dtype),
                         torch.device(self.device))
            cache.has_kernel = cache.has_kernel and self.has_kernel
        for array in cache.arrays():
            array[:] = 99
        return cache

    def contiguous(self, capacity):
        if self.device == "numpy":
            return (KVCacheInt8 if self.is_int8 else KVCache)(CONFIG, capacity, self.dtype)
        kind = KVCacheInt8Torch if self.is_int8 else KVCacheTorch
        return kind(CONFIG, capacity, getattr(torch, self.dtype), torch.device(self.device))

    def step(self, cache, spans):
        if self.in_one_group:
            layout = StepLayout(spans, cache.block_size, 1000, in_one_group=True)
            return PagedStepTorch(cache, layout)
        return cache.step(spans)

    def attend(self, cache, layer, qkv):
        if self.device == "numpy":
            return cache.attend(layer, *(x.astype(self.dtype) for x in qkv))
        qkv = [torch.from_numpy(x).to(self.device, getattr(torch, self.dtype)) for x in qkv]
        return cache.attend(layer, *qkv).double().cpu().numpy()


BACKENDS = [
    pytest.param(Backend("numpy", "float64"), id="numpy-float64"),
    pytest.param(Backend("numpy", "float32"), id="numpy-float32"),
    pytest.param(Backend("cpu", "float64"), id="torch-float64"),
    pytest.param(Backend("cpu", "float32"), id="torch-float32"),
    pytest.param(Backend("cpu", "float32", has_kernel=True), id="kernel", marks=needs_kernel),
    pytest.param(Backend("cpu", "bfloat16"), id="torch-bfloat16"),
    pytest.param(Backend("cpu", "bfloat16", has_kernel=True), id="kernel-bfloat16",
                 marks=needs_kernel),
    pytest.param(Backend("cpu", "float64", in_one_group=True), id="torch-one-group"),
    pytest.param(Backend("numpy", "float64", is_int8=True), id="numpy-int8"),
    pytest.param(Backend("cpu", "float32", is_int8=True), id="torch-int8"),
    pytest.param(Backend("cpu", "bfloat16", is_int8=True), id="torch-bfloat16-int8"),
    *(pytest.param(Backend("cuda", dtype, is_int8), id=f"cuda-{dtype}-{is_int8}",
                   marks=pytest.mark.cuda)
      for dtype, is_int8 in (("float32", False), ("bfloat16", False), ("float32", True))),
]
backends = pytest.mark.parametrize("backend", BACKENDS)


def fresh(rng, num_tokens):
    """q [N, H, D], k and v [N, K, D]"""
    return [rng.normal(size=(num_tokens, heads, D)) for heads in (H, K, K)]


def assert_close(actual, expected, dtype):
    np.testing.assert_allclose(actual, expected, rtol=0,
                               atol=TOLERANCE[dtype] * max(1, np.abs(expected).max()))


class World:
    """Sequences in one paged cache, each with a contiguous cache of its own beside it."""

    def __init__(self, backend, rng, lengths, block_size, num_spare=3):
        self.backend, self.rng, self.lengths = backend, rng, lengths
        counts = [-(-length // block_size) for length in lengths]
        block_ids = rng.permutation(sum(counts) + num_spare).tolist()
        self.tables = []
        for count in counts:
            self.tables.append(BlockTable(block_size))
            self.tables[-1].block_ids, block_ids = block_ids[:count], block_ids[count:]
        self.spare_block_ids = block_ids
        self.paged = backend.paged(sum(counts) + num_spare, block_size)
        self.alone = [backend.contiguous(length) for length in lengths]

    @property
    def starts(self):
        return [cache.length for cache in self.alone]

    def random_counts(self):
        """{sequence: tokens of it in the next step}: decodes, pieces of prompts, in any order."""
        counts = {}
        for b in self.rng.permutation(len(self.lengths)).tolist():
            left = self.lengths[b] - self.starts[b]
            wanted = 1 if self.rng.random() < 0.5 else int(self.rng.integers(1, 12))
            if left and self.rng.random() < 0.8:
                counts[b] = min(left, wanted)
        return counts

    def step(self, counts):
        """One step through all layers, compared row by row."""
        spans = [(self.tables[b], self.starts[b], num) for b, num in counts.items()]
        step = self.backend.step(self.paged, spans)
        for layer in range(L):
            qkv = fresh(self.rng, sum(counts.values()))
            actual, first = self.backend.attend(step, layer, qkv), 0
            assert actual.shape == qkv[0].shape
            for b, num in counts.items():
                expected = self.backend.attend(self.alone[b], layer,
                                               [x[first : first + num] for x in qkv])
                assert_close(actual[first : first + num], expected, self.backend.dtype)
                first += num


# ── A step is what each sequence's own cache gives ───────────────────────────────────────────


@backends
@a_few
@given(seeds, st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(1, 16),
       st.sampled_from([0, 9, 256]), st.sampled_from([0, 30, 2**18]))
def test_steps_equal_caches_of_their_own(backend, seed, lengths, block_size, short_context,
                                         max_plain_scores):
    world = World(backend, np.random.default_rng(seed), lengths, block_size)
    with pytest.MonkeyPatch.context() as patch:  # every branch, at lengths that cost little
        patch.setattr(module, "SHORT_CONTEXT", short_context)
        patch.setattr(module, "MAX_PLAIN_SCORES", max_plain_scores)
        while world.starts != lengths:
            if counts := world.random_counts():
                world.step(counts)


@backends
@pytest.mark.parametrize("block_size", [1, 16])
def test_contexts_beyond_the_short_ones(backend, block_size):
    """A piece that ends beyond 256 takes another way than its neighbours, in the same step."""
    world = World(backend, np.random.default_rng(block_size), [700, 300, 30, 257, 40], block_size)
    world.step({0: 600, 1: 256, 3: 250})
    world.step({2: 20, 0: 90, 4: 1, 1: 1})
    world.step({1: 30, 0: 1, 3: 7, 2: 1, 4: 39})
    world.step({0: 1, 1: 1})


@backends
def test_a_row_reads_what_another_row_of_the_step_has_just_computed(backend):
    """Block 3 is both sequences' beginning, and one of them computes it now."""
    first, second = BlockTable(4), BlockTable(4)
    first.block_ids, second.block_ids = [3], [3, 1]
    cache, alone = backend.paged(5, 4), backend.contiguous(6)
    qkv = fresh(np.random.default_rng(5), 6)
    for spans, order in (([(first, 0, 4), (second, 4, 2)], [0, 1, 2, 3, 4, 5]),
                         ([(second, 4, 2), (first, 0, 4)], [4, 5, 0, 1, 2, 3])):
        alone.truncate(0)
        step = backend.step(cache, spans)
        actual = backend.attend(step, 0, [x[order] for x in qkv])
        expected = backend.attend(alone, 0, qkv)[order]
        alone.lengths = [6] * L
        assert_close(actual, expected, backend.dtype)


@backends
def test_a_row_that_is_there_twice_changes_nothing(backend):
    """As in a step that is padded to the size of a CUDA graph."""
    rng = np.random.default_rng(6)
    world = World(backend, rng, [9, 4], 4)
    world.step({0: 8, 1: 3})
    spans = [(world.tables[0], 8, 1), (world.tables[1], 3, 1)]
    qkv = fresh(rng, 2)
    plain = backend.attend(backend.step(world.paged, spans), 1, qkv)
    padded = backend.attend(backend.step(world.paged, spans + spans[1:] * 3), 1,
                            [x[[0, 1, 1, 1, 1]] for x in qkv])
    assert_close(padded, plain[[0, 1, 1, 1, 1]], backend.dtype)


def test_a_head_size_that_no_kernel_takes():
    """D is 10: there is no kernel, and the blocks are gathered."""
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=10)
    cache = PagedCacheTorch(config, 4, 2, torch.float32, torch.device("cpu"))
    assert not cache.has_kernel
    table = BlockTable(2)
    table.block_ids = [2, 0]
    k = torch.ones(3, 1, 10)
    out = cache.step([(table, 0, 3)]).attend(0, k, k, torch.arange(3.0)[:, None, None] * k)
    torch.testing.assert_close(out[:, 0, 0], torch.tensor([0, 0.5, 1]))  # means of 0, 1, 2


# ── Scatter and gather ───────────────────────────────────────────────────────────────────────


@st.composite
def page_shapes(draw):
    """(num_blocks, block_size, K, D), pairwise different."""
    shape = draw(st.tuples(*[st.integers(1, 9)] * 4))
    return shape if len(set(shape)) == 4 else draw(page_shapes())


@a_few
@given(page_shapes(), seeds)
def test_scatter_is_a_loop_over_slots(shape, seed):
    rng = np.random.default_rng(seed)
    (num_blocks, block_size, *_), pages = shape, rng.normal(size=shape)
    slots = rng.permutation(num_blocks * block_size)[: rng.integers(1, num_blocks * block_size + 1)]
    x = rng.normal(size=(len(slots), *shape[2:]))
    expected = pages.copy()
    for slot, row in zip(slots, x):
        expected[slot // block_size, slot % block_size] = row
    twin = torch.from_numpy(pages.copy())
    paged_scatter_np(pages, slots, x)
    paged_scatter_torch(twin, torch.from_numpy(slots), torch.from_numpy(x))
    np.testing.assert_array_equal(pages, expected)
    np.testing.assert_array_equal(twin, expected)


@a_few
@given(page_shapes(), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 5), seeds)
def test_gather_is_a_loop_over_tokens(shape, batch, width, seed):
    rng = np.random.default_rng(seed)
    (num_blocks, block_size, K, D), pages = shape, rng.normal(size=shape)
    tables = rng.integers(0, num_blocks, (*batch, width))
    expected = np.empty((*batch, width * block_size, K, D))
    for index in np.ndindex(*batch):
        for position in range(width * block_size):
            block_id = tables[index][position // block_size]
            expected[index][position] = pages[block_id, position % block_size]
    found = paged_gather_np(pages, tables)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(
        paged_gather_torch(torch.from_numpy(pages), torch.from_numpy(tables)), expected)
    assert not np.shares_memory(found, pages)


# ── Which rows belong to whom ────────────────────────────────────────────────────────────────


def table_of(*block_ids, block_size=4):
    table = BlockTable(block_size)
    table.block_ids = list(block_ids)
    return table


LAYOUT = [(table_of(7, 2, 5), 8, 1), (table_of(3, 9), 2, 3), (table_of(6, 0), 3, 1),
          (table_of(1, 4, 8), 9, 1)]  # a decode, a piece, a decode within block 6, a decode


def test_a_layout_by_hand():
    layout = StepLayout(LAYOUT, 4, 1000)
    assert layout.slot_mapping.tolist() == [20, 14, 15, 36, 27, 33]
    (rows, block_ids, context_len), = layout.chunks
    assert (rows, block_ids.tolist(), context_len) == (slice(1, 4), [3, 9], 5)
    assert layout.long_chunks == []
    wide, narrow = layout.decodes
    assert [each.tolist() for each in wide] == [[0, 5], [[7, 2, 5, 5], [1, 4, 8, 8]], [9, 10]]
    assert [each.tolist() for each in narrow] == [[4], [[6]], [4]]
    assert [each.tolist() for each in layout.short] == [
        [0, 1, 2, 3, 4, 5], [[7, 2, 5], [3, 9, 9], [6, 6, 6], [1, 4, 8]], [0, 1, 1, 1, 2, 3],
        [9, 3, 4, 5, 4, 10]]


def test_a_group_gathers_no_more_blocks_than_the_cache_has():
    spans = [(table_of(1, 2, 3), 9, 1)] * 5  # five that share all their blocks: width 4
    sizes = [len(rows) for rows, _, _ in StepLayout(spans, 4, 10).decodes]
    assert sizes == [2, 2, 1]
    assert len(StepLayout(spans, 4, 3).decodes) == 5  # one at a time, at least


@backends
def test_what_lies_behind_a_sequence_is_never_read(backend):
    """A request that was aborted left NaN in a block, and nobody cleared it."""
    world = World(backend, np.random.default_rng(8), [9, 30, 2], 4)
    for array in world.paged.arrays():
        if array.dtype not in (np.int8, torch.int8):
            array[:] = np.nan
    world.step({0: 8, 1: 20, 2: 1})
    world.step({2: 1, 1: 1, 0: 1})


def test_in_one_group_all_decodes_have_the_largest_width():
    group, = StepLayout(LAYOUT, 4, 1000, in_one_group=True).decodes
    assert [each.tolist() for each in group] == [
        [0, 4, 5], [[7, 2, 5, 5], [6, 6, 6, 6], [1, 4, 8, 8]], [9, 4, 10]]


def test_a_piece_with_a_long_context_is_no_short_row(monkeypatch):
    monkeypatch.setattr(module, "SHORT_CONTEXT", 4)
    layout = StepLayout(LAYOUT, 4, 1000)
    assert layout.long_chunks == layout.chunks
    assert layout.short[0].tolist() == [0, 4, 5]  # a decode is short, however long its context
    alone = StepLayout(LAYOUT[1:2], 4, 1000)
    assert (alone.short, alone.decodes) == (None, [])


def test_a_position_without_a_block_is_refused():
    with pytest.raises(ValueError, match="2 blocks of 4 have no place for position 8"):
        StepLayout([(table_of(3, 9), 7, 2)], 4, 1000)


# ── The memory itself ────────────────────────────────────────────────────────────────────────


def new_cache(device, is_int8=False, num_blocks=7, block_size=5, dtype="float32"):
    """As it is made, zeros and all."""
    if device == "numpy":
        return (PagedCacheInt8 if is_int8 else PagedCache)(CONFIG, num_blocks, block_size, dtype)
    kind = PagedCacheInt8Torch if is_int8 else PagedCacheTorch
    return kind(CONFIG, num_blocks, block_size, getattr(torch, dtype), torch.device(device))


every_cache = pytest.mark.parametrize("device, is_int8", [
    ("numpy", False), ("numpy", True), ("cpu", False), ("cpu", True)])


@pytest.mark.parametrize("device, dtype, bytes_a_number", [
    ("numpy", "float32", 4), ("numpy", "float64", 8), ("cpu", "float32", 4), ("cpu", "bfloat16", 2),
    pytest.param("cuda", "bfloat16", 2, marks=pytest.mark.cuda)])
def test_memory_is_what_the_blocks_hold(device, dtype, bytes_a_number):
    cache = new_cache(device, dtype=dtype)
    assert sum(array.nbytes for array in cache.arrays()) == 2 * L * K * D * 7 * 5 * bytes_a_number
    assert all(array.shape == (L, 7, 5, K, D) and (array == 0).all() for array in cache.arrays())


@pytest.mark.parametrize("device", ["numpy", "cpu", ON_CUDA])
def test_int8_takes_the_bytes_of_the_contiguous_one(device):
    cache = new_cache(device, is_int8=True)
    assert sum(array.nbytes for array in cache.arrays()) == 2 * L * K * (D + 2) * 7 * 5
    assert all((array == 0).all() for array in cache.arrays())


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
@every_cache
def test_memory_is_not_touched_before_it_is_used(device, is_int8):
    """A cache for 30 000 blocks is half a GiB in float32; a step over a few tokens uses pages."""
    before = resident_bytes()
    cache = new_cache(device, is_int8, num_blocks=30_000, block_size=24)
    assert sum(array.nbytes for array in cache.arrays()) > 2**27
    table = table_of(20_000, 11, block_size=24)
    qkv = [x.astype(np.float32) for x in fresh(np.random.default_rng(0), 30)]
    qkv = qkv if device == "numpy" else [torch.from_numpy(x) for x in qkv]
    cache.step([(table, 0, 30)]).attend(L - 1, *qkv)
    assert resident_bytes() - before < 2**25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("shape", [(3, 7, 5), (1, 1, 1), (2, 1000, 33)])
def test_lazy_zeros_are_zeros_that_begin_where_a_vector_does(dtype, shape):
    zeros = lazy_zeros(shape, dtype, torch.device("cpu"))
    assert (zeros.shape, zeros.dtype) == (shape, dtype)
    assert zeros.is_contiguous() and zeros.data_ptr() % 64 == 0
    assert (zeros == 0).all()
    zeros += 1  # and may be written to
    assert (zeros == 1).all()


@every_cache
def test_copies_and_zeros_reach_all_layers_and_all_arrays(device, is_int8):
    cache, rng = new_cache(device, is_int8), np.random.default_rng(1)
    for array in cache.arrays():
        numbers = rng.integers(1, 99, tuple(array.shape)).astype(np.float32)
        array[:] = numbers if device == "numpy" else torch.from_numpy(numbers)
    before = [np.asarray(array).copy() for array in cache.arrays()]
    cache.copy_blocks([])
    cache.copy_blocks([(4, 1), (0, 6)])
    for array, old in zip(cache.arrays(), before):
        np.testing.assert_array_equal(array, old[:, [0, 4, 2, 3, 4, 5, 0]])
    cache.clear_blocks({2, 5})
    for array, old in zip(cache.arrays(), before):
        expected = old[:, [0, 4, 2, 3, 4, 5, 0]]
        expected[:, [2, 5]] = 0
        np.testing.assert_array_equal(array, expected)
    cache.clear_blocks(set())


@backends
def test_what_a_broken_step_left_is_cleared_away(backend):
    """NaN behind a sequence's end."""
    world = World(backend, np.random.default_rng(8), [9, 30, 2], 4)
    poison = 127 if backend.is_int8 else np.nan
    for array in world.paged.arrays():
        array[:] = poison if array.dtype in (np.int8, torch.int8) else np.nan
    world.paged.clear_blocks(range(world.paged.keys.shape[1]))
    world.step({0: 8, 1: 20, 2: 1})
    world.step({2: 1, 1: 1, 0: 1})
