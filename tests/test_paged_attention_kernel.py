"""The kernel over a paged cache against attention_np in float64, row by row, in both dtypes."""

import math

import numpy as np
import pytest
import torch

from minillm.attention import attention_np
from minillm.kernels import paged_attention as module
from minillm.kernels.paged_attention import (
    PagedAttention,
    has_paged_attention,
    paged_attention_kernel,
)

needs_kernel = pytest.mark.skipif(paged_attention_kernel() is None,
                                  reason="no C compiler with OpenMP that knows these vectors")

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def int32(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def paged(sequences, block_size, spare=3, seed=0):
    """Sequences [S, K, D] in blocks that lie anywhere -> cache, block_tables.

    Blocks that belong to nobody, and the rest of a last block, hold NaN: reading one shows."""
    counts = [-(-len(sequence) // block_size) for sequence in sequences]
    ids = np.random.default_rng(seed).permutation(sum(counts) + spare)
    cache = sequences[0].new_full((len(ids), block_size, *sequences[0].shape[1:]), math.nan)
    tables = np.full((len(sequences), max(counts) + 1), ids[-1])
    for b, (sequence, count) in enumerate(zip(sequences, counts)):
        tables[b, :count], ids = ids[:count], ids[count:]
        for i, vector in enumerate(sequence):
            cache[tables[b, i // block_size], i % block_size] = vector
    return cache, int32(tables.tolist())


def random_case(lengths, H, K, D, block_size, scale=1.0, seed=0):
    """q [N, H, D] for one row a sequence, its rows apart; sequences, cache and tables."""
    torch.manual_seed(seed)
    q = (torch.randn(len(lengths), H + 2 * K, D) * scale)[:, :H]
    k, v = ([torch.randn(S, K, D) for S in lengths] for _ in range(2))
    (keys, tables), (values, _) = paged(k, block_size, seed=seed), paged(v, block_size, seed=seed)
    return q, k, v, keys, values, tables


def to_bfloat16(*tensors):
    """Rounded, and lying apart as they did: conversion alone would close the gaps between rows."""
    return [torch.empty_strided(each.shape, each.stride(), dtype=torch.bfloat16).copy_(each)
            for each in tensors]


def reference(q, k, v):
    """q [H, D], k and v [S, K, D] -> [H, D] in float64."""
    q, k, v = (tensor.double().numpy() for tensor in (q, k, v))
    return attention_np(q[:, None], k.swapaxes(0, 1), v.swapaxes(0, 1))[:, 0]


@needs_kernel
@pytest.mark.parametrize("block_size", [1, 4, 16, 24])
@pytest.mark.parametrize("G, K, D", [(3, 3, 64), (1, 2, 16), (2, 5, 80), (4, 1, 128), (7, 2, 96)])
def test_every_row_is_the_attention_over_its_own_positions(G, K, D, block_size):
    lengths = [1, 2, 15, 16, 17, 31, 48, 255, 256, 257, 1000]
    q, k, v, keys, values, tables = random_case(lengths, G * K, K, D, block_size)
    assert not q.is_contiguous()
    out = PagedAttention(tables, int32(range(11)), int32(lengths))(q, keys, values)
    assert out.shape == (11, G * K, D) and out.is_contiguous()
    for n in range(len(lengths)):
        np.testing.assert_allclose(out[n], reference(q[n], k[n], v[n]), rtol=0, atol=3e-6)


@needs_kernel
@pytest.mark.parametrize("block_size", [1, 16, 24])
@pytest.mark.parametrize("G, K, D", [(3, 3, 64), (1, 2, 16), (2, 5, 80), (4, 1, 128), (7, 2, 96)])
def test_from_bfloat16_only_the_result_is_rounded(G, K, D, block_size):
    """The bits are those of the float32 kernel over the same numbers, rounded once by PyTorch; the
    reference in float64 is half a unit in the last place away at most, 2⁻⁸ of a number."""
    lengths = [1, 2, 15, 16, 17, 255, 256, 257, 600]
    case = random_case(lengths, G * K, K, D, block_size)
    q, keys, values = to_bfloat16(case[0], *case[3:5])
    k, v = (to_bfloat16(*each) for each in case[1:3])
    assert not q.is_contiguous()
    step = PagedAttention(case[5], int32(range(9)), int32(lengths))
    out = step(q, keys, values)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert torch.equal(out, step(q.float(), keys.float(), values.float()).bfloat16())
    for n in range(9):
        np.testing.assert_allclose(out[n].double(), reference(q[n], k[n], v[n]),
                                   rtol=2**-8, atol=3e-6)


@needs_kernel
def test_rounding_to_bfloat16():
    """Of value u and v the mean, with equal weights: the nearer of two, or the even one, as PyTorch
    rounds; and what is too large for bfloat16 is infinite."""
    def mean(u, v):
        q, values = torch.zeros(1, 1, 16), torch.tensor([u, v]).reshape(1, 2, 1, 1)
        values = values.expand(1, 2, 1, 16)
        out = PagedAttention(int32([[0]]), int32([0]), int32([2]))(
            q.bfloat16(), torch.zeros(1, 2, 1, 16, dtype=torch.bfloat16),
            values.bfloat16().contiguous())
        assert out.isnan().all() or (out == out[0, 0, 0]).all()
        return out[0, 0, 0].item()

    unit = 2**-7  # between neighbours from 1 to 2
    assert mean(1.0, 1 + unit) == 1.0  # halfway: down, to the even one
    assert mean(1 + unit, 1 + 2 * unit) == 1 + 2 * unit  # and up
    assert mean(-1 - unit, -1 - 2 * unit) == -1 - 2 * unit
    assert mean(1.0, 1 + 3 * unit) == 1 + 2 * unit  # 1 + 1.5 units
    assert mean(1 - unit / 2, 1 + 2 * unit) == 1 + unit  # 1 + 0.75 units
    assert mean(math.inf, 1.0) == math.inf and mean(-math.inf, 1.0) == -math.inf
    assert math.isnan(mean(math.nan, 1.0)) and math.isnan(mean(math.inf, -math.inf))


@needs_kernel
def test_random_sizes():
    rng = np.random.default_rng(7)
    for seed in range(20):
        G, K, block_size = (int(rng.integers(1, high)) for high in (6, 5, 20))
        lengths, D = rng.integers(1, 300, rng.integers(1, 7)).tolist(), int(rng.integers(1, 9)) * 16
        q, k, v, keys, values, tables = random_case(lengths, G * K, K, D, block_size, seed=seed)
        rows = rng.permutation(len(lengths))
        step = PagedAttention(tables, int32(rows.tolist()), int32([lengths[b] for b in rows]))
        for n, (got, b) in enumerate(zip(step(q, keys, values), rows)):
            np.testing.assert_allclose(got, reference(q[n], k[b], v[b]), rtol=0, atol=3e-6)


@needs_kernel
@dtypes
def test_pieces_of_prompts_and_decodes_in_one_step_get_the_bits_they_get_alone(dtype):
    """Rows of one sequence, with growing contexts; alone, other blocks of another size."""
    q, k, v, keys, values, tables = random_case([90, 300, 41], 6, 3, 64, 16)
    q, keys, values = (each.to(dtype) for each in (torch.randn(45, 6, 64), keys, values))
    k, v = ([each.to(dtype) for each in tensors] for tensors in (k, v))
    tolerance = {torch.float32: 3e-6, torch.bfloat16: 2**-8}[dtype]
    table_of_row = [0] * 20 + [1] + [2] * 24
    context_lens = [*range(71, 91), 300, *range(18, 42)]
    out = PagedAttention(tables, int32(table_of_row), int32(context_lens))(q, keys, values)
    for n, (b, S) in enumerate(zip(table_of_row, context_lens)):
        (own_keys, table), (own_values, _) = (paged([x[b][:S]], 5, seed=n) for x in (k, v))
        alone = PagedAttention(table, int32([0]), int32([S]))(q[n : n + 1], own_keys, own_values)
        assert torch.equal(alone[0], out[n])
        np.testing.assert_allclose(out[n].double(), reference(q[n], k[b][:S], v[b][:S]),
                                   rtol=0, atol=tolerance)


@needs_kernel
def test_the_number_of_threads_changes_no_bit():
    q, _, _, keys, values, tables = random_case([90, 300, 41], 6, 3, 64, 16)
    step, threads = PagedAttention(tables, int32(range(3)), int32([90, 300, 41])), []
    before = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        threads.append(step(q, keys, values))
    torch.set_num_threads(before)
    assert torch.equal(*threads)


@needs_kernel
def test_a_mean_by_hand():
    """Scores ln 3 and 0, that is weights 3/4 and 1/4, of the values 8 and 4: 7. The other query
    head's scores are equal: 6."""
    q, keys = torch.zeros(1, 2, 16), torch.zeros(1, 2, 1, 16)
    q[0, 0, 5], keys[0, 0, 0, 5] = 2, 2 * math.log(3)  # √D is 4
    values = torch.tensor([8.0, 4.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 16).contiguous()
    out = PagedAttention(int32([[0]]), int32([0]), int32([2]))(q, keys, values)
    torch.testing.assert_close(out[0, 0], torch.full((16,), 7.0))
    assert torch.equal(out[0, 1], torch.full((16,), 6.0))


@needs_kernel
def test_the_exponential_is_good_to_the_last_bits():
    """Scores x and 0, values 1 and 0: the result is e^x / (1 + e^x)."""
    x = -torch.linspace(0, 87, 5000)
    q, keys, values = torch.zeros(5000, 1, 16), torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16)
    q[:, 0, 0], keys[0, 1, 0, 0], values[0, 1] = 4 * x, 1, 1
    step = PagedAttention(int32([[0]]), torch.zeros(5000, dtype=torch.int32),
                          torch.full((5000,), 2, dtype=torch.int32))
    want = torch.sigmoid(x.double())
    error = (step(q, keys, values)[:, 0, 7] - want).abs() / want
    assert error.max() < 3e-7


@needs_kernel
def test_a_context_of_a_hundred_thousand():
    q, k, v, keys, values, tables = random_case([100_000], 2, 1, 16, 4096)
    out = PagedAttention(tables, int32([0]), int32([100_000]))(q, keys, values)
    np.testing.assert_allclose(out[0], reference(q[0], k[0], v[0]), rtol=0, atol=3e-6)


@needs_kernel
@pytest.mark.parametrize("scale", [1e-20, 1e4, 1e30])
def test_scores_of_any_size(scale):
    """Of 10⁴ and more, one position takes all; smaller than any rounding, all weigh the same."""
    q, k, v, keys, values, tables = random_case([33, 290], 6, 2, 64, 16, scale=scale)
    out = PagedAttention(tables, int32([0, 1]), int32([33, 290]))(q, keys, values)
    for n in range(2):
        np.testing.assert_allclose(out[n], reference(q[n], k[n], v[n]), rtol=0, atol=1e-5)


@needs_kernel
@dtypes
def test_what_is_no_number_stays_visible_in_its_head_and_row_only(dtype):
    q, _, _, keys, values, tables = random_case([40, 300], 6, 3, 32, 16)
    q, keys, values = (each.to(dtype) for each in (q, keys, values))
    step = PagedAttention(tables, int32([0, 1]), int32([40, 300]))
    before = step(q, keys, values)
    assert before.isfinite().all()
    for bad in (math.nan, math.inf, -math.inf):
        q_bad = q.clone()
        q_bad[1, 4, 3] = bad
        after = step(q_bad, keys, values)
        assert after[1, 4].isnan().all()
        after[1, 4] = before[1, 4]
        assert torch.equal(after, before)
    keys[tables[1, 2], 5, 1, 0] = math.nan  # position 37 of sequence 1, read by the heads 2 and 3
    rows_and_heads = step(q, keys, values).isnan().any(dim=2).nonzero()
    assert rows_and_heads.tolist() == [[1, 2], [1, 3]]


def test_who_must_do_without(monkeypatch):
    q = torch.zeros(2, 3, 48)
    for taken in (q, q.bfloat16()):
        assert has_paged_attention(taken) == (paged_attention_kernel() is not None)
    for other in (q.double(), q.half(), q[..., :24], q.clone().requires_grad_(), q.to("meta")):
        assert not has_paged_attention(other)
    monkeypatch.setattr(module, "paged_attention_kernel", lambda: None)
    assert not has_paged_attention(q)
    with pytest.raises(ValueError, match="has_paged_attention"):
        PagedAttention(int32([[0]]), int32([0]), int32([1]))


@needs_kernel
@pytest.mark.parametrize("block_tables, table_of_row, context_lens, message", [
    ([[0, 1]], [0, 0], [5], "not empty"),
    ([[0, 1]], [], [], "not empty"),
    ([[]], [0], [5], "not empty"),
    ([[0, -1]], [0], [5], "block ids from -1"),
    ([[0, 1]], [1], [5], "to 1 .0 to 0."),
    ([[0, 1]], [-1], [5], "tables -1"),
    ([[0, 1]], [0], [0], "context_lens from 0"),
])
def test_a_step_that_cannot_be(block_tables, table_of_row, context_lens, message):
    with pytest.raises(ValueError, match=message):
        PagedAttention(int32(block_tables), int32(table_of_row), int32(context_lens))


@needs_kernel
def test_indices_of_another_kind():
    good = int32([[0, 1]]), int32([0]), int32([5])
    PagedAttention(*good)
    for i in range(3):
        with pytest.raises(ValueError, match="contiguous int32"):
            PagedAttention(*good[:i], good[i].long(), *good[i + 1 :])
    with pytest.raises(ValueError, match="contiguous int32"):
        PagedAttention(int32([[0, 1], [1, 0]]).T, *good[1:])


@needs_kernel
def test_tensors_that_do_not_belong_together():
    q, _, _, keys, values, tables = random_case([7, 30], 6, 3, 32, 4)
    step = PagedAttention(tables, int32([0, 1]), int32([7, 30]))
    step(q, keys, values)
    for wrong in [(q[:1], keys, values), (q[:, :5], keys, values), (q[..., :16], keys, values),
                  (q, keys[:-1], values), (q, keys[..., :16], values[..., :16]),
                  (q[..., :24], keys[..., :24], values[..., :24]), (q, keys[0], values[0])]:
        with pytest.raises(ValueError):
            step(*wrong)
    for wrong in [(q.double(), keys, values), (q, keys.bfloat16(), values),
                  (q.bfloat16(), keys, values), (q.half(), keys.half(), values.half()),
                  (q, keys, values.double()), (q.mT.contiguous().mT, keys, values),
                  (q, keys.mT.contiguous().mT, values), (q.repeat(1, 2, 1)[:, ::2], keys, values)]:
        with pytest.raises(ValueError, match="bfloat16 on the CPU"):
            step(*wrong)
    with pytest.raises(ValueError, match=r"block \d+ and 30 positions"):
        step(q, keys[: int(tables.max())], values[: int(tables.max())])
    with pytest.raises(ValueError, match=r"30 positions .* 9 × 3 positions"):
        step(q, keys[:, :3].contiguous(), values[:, :3].contiguous())
