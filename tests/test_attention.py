"""Attention: every form against the first, worked examples, PyTorch's own, and its memory."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minillm.attention import (
    attention_np,
    attention_sdpa,
    attention_torch,
    masked_attention_np,
    masked_attention_sdpa,
    masked_attention_torch,
    online_softmax_attention_np,
    online_softmax_attention_torch,
)

NUMPY_FORMS = [attention_np, online_softmax_attention_np]
TORCH_FORMS = [attention_torch, online_softmax_attention_torch, attention_sdpa]
# How far torch may be from NumPy, relative to the largest entry (1 at least). One rounding to
# bfloat16 is up to 4e-3; the roundings of three matrices in a row, or of scores, add up.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}

every_form = pytest.mark.parametrize("form", NUMPY_FORMS + TORCH_FORMS)
every_torch_form = pytest.mark.parametrize("form", TORCH_FORMS)
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])


@st.composite
def shapes(draw):
    """(H, K, T, S, D), pairwise different, so that no transposition can pass."""
    K, group, T, more, D = (draw(st.integers(1, most)) for most in (4, 4, 20, 20, 16))
    H, S = K * group, T + more
    return (H, K, T, S, D) if len({H, K, T, S, D}) == 5 else draw(shapes())


def edge_cases(test):
    """The shapes that `shapes` leaves out because two sizes are equal."""
    for shape in [(3, 3, 4, 7, 5), (6, 1, 4, 7, 5), (6, 2, 7, 7, 5), (6, 2, 1, 7, 5),
                  (6, 2, 1, 1, 5), (1, 1, 1, 1, 1)]:
        test = example(shape)(test)
    return settings(max_examples=25, deadline=None)(given(shapes())(test))


def random_qkv(H, K, T, S, D, dtype=np.float64):
    rng = np.random.default_rng([H, K, T, S, D])
    return [rng.normal(size=shape).astype(dtype) for shape in ((H, T, D), (K, S, D), (K, S, D))]


def run(form, *arrays, **options):
    """The form on its backend; -> np.ndarray."""
    if form in NUMPY_FORMS:
        return form(*arrays, **options)
    return form(*map(torch.from_numpy, arrays), **options).numpy()


def assert_close(actual, expected, tolerance):
    np.testing.assert_allclose(actual, expected, rtol=0,
                               atol=tolerance * max(1, np.abs(expected).max()))


# ── All forms are one function ───────────────────────────────────────────────────────────────


@every_torch_form
@every_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@edge_cases
def test_torch_forms_agree_with_numpy(form, device, dtype, shape):
    q, k, v = (torch.from_numpy(array).to(device, getattr(torch, dtype))
               for array in random_qkv(*shape))
    wide = "float32" if dtype == "float32" else "float64"  # NumPy has no bfloat16
    expected = attention_np(*(x.double().cpu().numpy().astype(wide) for x in (q, k, v)))
    actual = form(q, k, v)
    assert actual.dtype == q.dtype and expected.dtype == wide
    assert_close(actual.double().cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [online_softmax_attention_np, online_softmax_attention_torch])
@edge_cases
def test_online_softmax_is_the_same_for_any_block_size(form, shape):
    arrays, S = random_qkv(*shape), shape[3]
    expected = attention_np(*arrays)
    for block_size in {1, 3, (S + 1) // 2, S, S + 1}:
        assert_close(run(form, *arrays, block_size=block_size), expected, 1e-10)


@edge_cases
def test_numpy_agrees_with_pytorch(shape):
    """Keys repeated for each query head, and the mask written out: nothing of ours is used."""
    H, K, T, S, _ = shape
    arrays = random_qkv(*shape)
    q, k, v = map(torch.from_numpy, arrays)
    mask = torch.tensor([[s <= S - T + t for s in range(S)] for t in range(T)])
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k.repeat_interleave(H // K, dim=0), v.repeat_interleave(H // K, dim=0), attn_mask=mask)
    assert_close(attention_np(*arrays), expected.numpy(), 1e-10)


# ── By hand ──────────────────────────────────────────────────────────────────────────────────


@every_form
def test_weights_by_hand(form):
    """Scores 0 and ln 3 are weights 1/4 and 3/4: of the values 8 and 4 they make 5."""
    q, k, v = np.array([[[1.0]]]), np.array([[[0.0], [math.log(3)]]]), np.array([[[8.0], [4.0]]])
    np.testing.assert_allclose(run(form, q, k, v), [[[5]]], rtol=1e-14)


@every_form
def test_scores_are_divided_by_the_root_of_the_head_dimension(form):
    """(1, 1, 1, 1)·(a, a, a, a) / √4 = 2a: with 2a = ln 3, the weights are those above."""
    q, k, v = np.ones((1, 1, 4)), np.zeros((1, 2, 4)), np.zeros((1, 2, 4))
    k[0, 1], v[0, :, 0] = math.log(3) / 2, [8, 4]
    np.testing.assert_allclose(run(form, q, k, v), [[[5, 0, 0, 0]]], rtol=1e-14)


@every_form
def test_a_query_sees_the_keys_up_to_its_own(form):
    """Equal keys: each of the last three queries finds the mean of what it sees."""
    q, k, v = np.ones((1, 3, 1)), np.zeros((1, 5, 1)), np.array([[[2.0], [4], [6], [8], [10]]])
    np.testing.assert_allclose(run(form, q, k, v), [[[4], [5], [6]]], rtol=1e-14)


@every_form
def test_neighbouring_query_heads_share_a_key_value_head(form):
    q, k, v = random_qkv(6, 2, 3, 7, 5)
    v[0], v[1] = 1, 2
    assert_close(run(form, q, k, v)[:, 0, 0], [1, 1, 1, 2, 2, 2], 1e-12)


# ── Large scores, little memory, wrong shapes ────────────────────────────────────────────────


@every_form
@pytest.mark.filterwarnings("error")
def test_scores_far_beyond_exp(form):
    """A score of 1e9 is no overflow: the best key takes all, the masked one (1e10) nothing."""
    q = np.full((2, 2, 1), 1e5, np.float32)
    k = np.array([[[-1e4], [1e4], [1e5]]], np.float32)
    v = np.array([[[1], [2], [3]]], np.float32)
    np.testing.assert_array_equal(run(form, q, k, v), [[[2], [3]]] * 2)


@every_torch_form
@every_device
def test_scores_beyond_float16_before_they_are_divided(form, device):
    """64 products of 40·40 add up to 102400; divided by √64 that is 12800, and float16 holds it."""
    q, k = torch.full((2, 1, 64), 40.0), torch.full((1, 3, 64), 40.0)
    v = torch.tensor([1.0, 2.0, 6.0])[None, :, None].expand(1, 3, 64)
    result = form(*(x.to(device, torch.float16) for x in (q, k, v)))
    assert_close(result.double().cpu(), np.full((2, 1, 64), 3.0), 5e-3)


def peak_bytes(function, *args):
    tracemalloc.start()
    function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_of_online_softmax_does_not_grow_with_the_context():
    short, long = random_qkv(4, 2, 100, 1024, 6), random_qkv(4, 2, 100, 8192, 6)
    plain = peak_bytes(attention_np, *long)
    online = peak_bytes(online_softmax_attention_np, *long)
    assert plain > 6 * peak_bytes(attention_np, *short)
    assert online < 1.1 * peak_bytes(online_softmax_attention_np, *short)
    assert online < plain / 10


@every_form
def test_wrong_shapes_raise(form):
    q, k, v = random_qkv(6, 2, 4, 7, 5)
    with pytest.raises(ValueError, match="5 query heads cannot share 2"):
        run(form, q[:5], k, v)
    with pytest.raises(ValueError, match="4 queries are the last of only 3"):
        run(form, q, k[:, :3], v[:, :3])
    wrong = (ValueError, RuntimeError)
    with pytest.raises(wrong):
        run(form, q, k[..., :4], v)  # D of the keys
    with pytest.raises(wrong):
        run(form, q, k, v[:, :6])  # S of the values


# ── A batch, with a mask for each sequence ───────────────────────────────────────────────────

MASKED_TORCH_FORMS = [masked_attention_torch, masked_attention_sdpa]


@st.composite
def masked_shapes(draw):
    """(B, H, K, T, S, D), pairwise different but for T, which is 1 in every decode."""
    B, K, group, S, D = (draw(st.integers(1, most)) for most in (4, 4, 4, 20, 16))
    H, T = K * group, draw(st.integers(1, 9) | st.just(1))
    return (B, H, K, T, S, D) if len({B, H, K, S, D}) == 5 else draw(masked_shapes())


def masked_case(B, H, K, T, S, D):
    """q, k, v, visible: anybody sees anything, in any pattern, but at least one key."""
    rng = np.random.default_rng([B, H, K, T, S, D])
    visible = rng.random((B, T, S)) < 0.5
    visible[np.arange(B)[:, None], np.arange(T), rng.integers(0, S, (B, T))] = True
    return [*(rng.normal(size=shape) for shape in ((B, H, T, D), (B, K, S, D), (B, K, S, D))),
            visible]


@settings(max_examples=25, deadline=None)
@given(masked_shapes())
def test_masked_attention_is_a_loop_over_what_is_visible(shape):
    B, H, K, T, _, D = shape
    q, k, v, visible = masked_case(*shape)
    expected = np.empty_like(q)
    for b, h, t in np.ndindex(B, H, T):
        seen = visible[b, t]
        keys, values = k[b, h // (H // K), seen], v[b, h // (H // K), seen]
        weights = np.exp(keys @ q[b, h, t] / math.sqrt(D))
        expected[b, h, t] = weights @ values / weights.sum()
    actual = masked_attention_np(q, k, v, visible)
    assert_close(actual, expected, 1e-10)
    k[0, :, ~visible[0].any(axis=0)] = 1e6  # keys that nobody sees, and their values
    v[0, :, ~visible[0].any(axis=0)] = -1e6
    np.testing.assert_array_equal(masked_attention_np(q, k, v, visible), actual)


@pytest.mark.parametrize("form", MASKED_TORCH_FORMS)
@every_device
@pytest.mark.parametrize("dtype", TOLERANCE)
@settings(max_examples=12, deadline=None)
@given(masked_shapes())
def test_masked_torch_forms_agree_with_numpy(form, device, dtype, shape):
    *qkv, visible = masked_case(*shape)
    qkv = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in qkv]
    wide = "float32" if dtype == "float32" else "float64"
    expected = masked_attention_np(*(x.double().cpu().numpy().astype(wide) for x in qkv), visible)
    actual = form(*qkv, torch.from_numpy(visible).to(device))
    assert actual.dtype == qkv[0].dtype and expected.dtype == wide
    assert_close(actual.double().cpu(), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("form", [masked_attention_np, *MASKED_TORCH_FORMS])
@settings(max_examples=12, deadline=None)
@given(shapes())
def test_with_a_causal_mask_it_is_the_plain_form(form, shape):
    (T, S), qkv = shape[2:4], random_qkv(*shape)
    visible = np.arange(S) <= np.arange(S - T, S)[:, None]
    arrays = [x[None] for x in (*qkv, visible)]
    if form is not masked_attention_np:
        arrays = map(torch.from_numpy, arrays)
    assert_close(form(*arrays)[0], attention_np(*qkv), 1e-10)


@pytest.mark.parametrize("form", [masked_attention_np, *MASKED_TORCH_FORMS])
@pytest.mark.parametrize("T", [1, 2])
def test_masked_weights_by_hand(form, T):
    """Scores 0, ln 3 and 9: unseen, the last one weighs nothing, and 1/4 of 8 and 3/4 of 4 is 5.
    In the other sequence one key is seen, and its value, 6, is the answer."""
    q = np.ones((2, 1, T, 1))
    k = np.array([[[[0.0], [math.log(3)], [9]]]] * 2)
    v = np.array([[[[8.0], [4], [100]]], [[[100.0], [6], [100]]]])
    visible = np.array([[[True, True, False]] * T, [[False, True, False]] * T])
    arrays = (q, k, v, visible)
    if form is not masked_attention_np:
        arrays = map(torch.from_numpy, arrays)
    np.testing.assert_allclose(form(*arrays), [[[[5]] * T], [[[6]] * T]], rtol=1e-14)
