"""Linear, norm, rotary embedding, feed-forward: the twins, worked examples, and transformers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama import modeling_llama as oracle

from minillm.config import ModelConfig, RopeScaling
from minillm.linear import (
    Dense,
    PackedDense,
    embedding_np,
    embedding_torch,
    linear_np,
    linear_torch,
)
from minillm.mlp import silu_np, silu_torch, swiglu_np, swiglu_torch
from minillm.model_runner import has_onednn_bfloat16
from minillm.norm import rms_norm_np, rms_norm_torch
from minillm.rope import rope_angles_np, rope_angles_torch, rope_frequencies, rope_np, rope_torch

# How far torch may be from NumPy, relative to the largest entry (1 at least). One rounding to
# bfloat16 is up to 4e-3; the roundings of three matrices in a row, or of scores, add up.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
every_device = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
a_few = settings(max_examples=25, deadline=None)
no_warnings = pytest.mark.filterwarnings("error")


def sizes(count):
    """Pairwise different, so that no transposition can pass; 1 and odd numbers among them."""
    return st.lists(st.integers(1, 24), min_size=count, max_size=count, unique=True)


def normal(*shape):
    return np.random.default_rng(shape).normal(size=shape)


def assert_close(actual, expected, tolerance):
    scale = max(1, np.abs(expected).max())
    actual = actual.double().cpu() if isinstance(actual, torch.Tensor) else actual
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * scale)


def assert_twins(f_np, f_torch, arrays, dtype, device):
    """Both keep the dtype, and agree. NumPy has no bfloat16: it takes the same numbers wide."""
    tensors = [torch.from_numpy(array).to(device, getattr(torch, dtype)) for array in arrays]
    wide = "float32" if dtype == "float32" else "float64"
    arrays = [tensor.double().cpu().numpy().astype(wide) for tensor in tensors]
    actual, expected = f_torch(*tensors), f_np(*arrays)
    assert actual.dtype == tensors[0].dtype and expected.dtype == wide
    assert_close(actual, expected, TOLERANCE[dtype])


# ── Linear ───────────────────────────────────────────────────────────────────────────────────


@every_device
@every_dtype
@a_few
@given(sizes(3))
def test_linear_twins(dtype, device, sizes):
    N, in_size, out_size = sizes
    x, w, b = normal(N, in_size), normal(out_size, in_size) / math.sqrt(in_size), normal(out_size)
    assert_twins(lambda x, w: linear_np(x, Dense(w)), lambda x, w: linear_torch(x, Dense(w)),
                 [x, w], dtype, device)
    assert_twins(lambda x, w, b: linear_np(x, Dense(w, b)),
                 lambda x, w, b: linear_torch(x, Dense(w, b)), [x, w, b], dtype, device)


@pytest.mark.skipif(not has_onednn_bfloat16(), reason="no bfloat16 kernels for this CPU")
@a_few
@given(sizes(3))
def test_a_packed_matrix_multiplies_as_the_dense_one(sizes):
    N, in_size, out_size = sizes
    x, w, b = (torch.from_numpy(array).bfloat16() for array in (
        normal(N, in_size), normal(out_size, in_size) / math.sqrt(in_size), normal(out_size)))
    for dense in (Dense(w), Dense(w, b)):
        packed = linear_torch(x, PackedDense(dense))
        assert packed.dtype == torch.bfloat16
        assert_close(packed, linear_torch(x, dense).double().numpy(), 1e-2)


def test_linear_by_hand():
    x = np.array([[1.0, 2.0]])
    weight = np.array([[1.0, 0.0], [0.0, 1.0], [3.0, -1.0]])  # three outputs
    np.testing.assert_array_equal(linear_np(x, Dense(weight)), [[1, 2, 1]])
    bias = np.array([10.0, 20.0, 30.0])
    np.testing.assert_array_equal(linear_np(x, Dense(weight, bias)), [[11, 22, 31]])


def test_linear_refuses_another_width():
    x, weight, bias = normal(5, 4), normal(7, 3), normal(6)
    with pytest.raises(ValueError, match="4.*3|3.*4"):
        linear_np(x, Dense(weight))
    with pytest.raises(RuntimeError, match="5x4 and 3x7"):
        linear_torch(torch.from_numpy(x), Dense(torch.from_numpy(weight)))
    with pytest.raises(ValueError, match="6"):
        linear_np(x[:, :3], Dense(weight, bias))


@every_device
def test_embedding_twins_look_up_rows(device):
    table, tokens = normal(11, 4), np.array([3, 0, 10, 3])
    rows = embedding_np(tokens, Dense(table))
    np.testing.assert_array_equal(rows, [table[3], table[0], table[10], table[3]])
    tensors = torch.from_numpy(table).to(device), torch.from_numpy(tokens).to(device)
    np.testing.assert_array_equal(embedding_torch(tensors[1], Dense(tensors[0])).cpu(), rows)


# ── Norm ─────────────────────────────────────────────────────────────────────────────────────


@every_device
@every_dtype
@a_few
@given(sizes(3))
def test_rms_norm_twins(dtype, device, sizes):
    """Over rows [N, C], and over heads [N, H, D] with a weight for each head."""
    N, H, D = sizes
    for arrays in ([normal(N, D), normal(D)], [normal(N, H, D), normal(H, D)]):
        assert_twins(lambda x, weight: rms_norm_np(x, weight, 1e-5),
                     lambda x, weight: rms_norm_torch(x, weight, 1e-5), arrays, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_that_of_transformers(dtype):
    x, weight = torch.from_numpy(normal(5, 576)), torch.from_numpy(normal(576))
    norm = oracle.LlamaRMSNorm(576, eps=1e-3).to(dtype)
    norm.weight.data = weight.to(dtype)
    expected = norm(x.to(dtype)).detach().double().numpy()
    last_bits = 4 * torch.finfo(dtype).eps  # the oracle multiplies by 1/√, we divide
    assert_close(rms_norm_torch(x.to(dtype), weight.to(dtype), 1e-3), expected, last_bits)


def test_rms_norm_by_hand():
    """Root mean square of (1, 7) is √25 = 5."""
    x, weight = np.array([[1.0, 7.0], [-2.0, -14.0]]), np.array([10.0, 100.0])
    np.testing.assert_allclose(rms_norm_np(x, weight, 0.0), [[2, 140], [-2, -140]], rtol=1e-15)
    np.testing.assert_allclose(rms_norm_np(x[:1], weight, 75.0), [[1, 70]], rtol=1e-15)


@no_warnings
def test_rms_norm_of_zeros_is_zero():
    zeros, ones = np.zeros((2, 6), np.float32), np.ones(6, np.float32)
    np.testing.assert_array_equal(rms_norm_np(zeros, ones, 1e-5), zeros)
    result = rms_norm_torch(torch.from_numpy(zeros), torch.from_numpy(ones), 1e-5)
    np.testing.assert_array_equal(result, zeros)


@every_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rms_norm_in_two_bytes_rounds_only_its_result(dtype, device):
    """Within half a step of the exact result; 900² is beyond float16."""
    x = torch.from_numpy(900 * normal(4, 576).clip(-3, 3)).to(device, dtype)
    exact = rms_norm_np(x.double().cpu().numpy(), 1.0, 1e-5)
    result = rms_norm_torch(x, torch.ones_like(x[0]), 1e-5)
    half_step = torch.finfo(dtype).eps / 2
    np.testing.assert_allclose(result.double().cpu(), exact, rtol=1.01 * half_step, atol=1e-7)
    if dtype == torch.float16:
        result = rms_norm_np(x.cpu().numpy(), np.ones(576, np.float16), 1e-5)
        np.testing.assert_allclose(result, exact, rtol=1.01 * half_step, atol=1e-7)


def test_rms_norm_refuses_another_width():
    with pytest.raises(ValueError, match="5"):
        rms_norm_np(normal(3, 6), normal(5), 1e-5)
    with pytest.raises(RuntimeError, match="5"):
        rms_norm_torch(torch.from_numpy(normal(3, 6)), torch.from_numpy(normal(5)), 1e-5)


# ── Rotary embedding ─────────────────────────────────────────────────────────────────────────

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}


def rope_config(D=6, theta=10000.0, scaling=None):
    return ModelConfig(vocab_size=9, hidden_size=8, intermediate_size=7, num_hidden_layers=1,
                       num_attention_heads=4, num_key_value_heads=2, head_dim=D, rope_theta=theta,
                       rope_scaling=RopeScaling(**scaling) if scaling else None)


@every_device
@every_dtype
@a_few
@given(sizes(3))
def test_rope_twins(dtype, device, sizes):
    N, H, half = sizes
    angles = normal(N, half)
    assert_twins(rope_np, rope_torch, [normal(N, H, 2 * half), np.cos(angles), np.sin(angles)],
                 dtype, device)


@every_device
def test_rope_angles_twins_stay_in_float64(device):
    """Position 8191 in float32 would be off by 8191 · 6e-8 radians, which is 5e-4."""
    positions, inv_freq = np.array([0, 1, 700, 8191]), rope_frequencies(rope_config(D=10))
    turned = rope_angles_torch(torch.from_numpy(positions).to(device),
                               torch.from_numpy(inv_freq).to(device))
    for ours, theirs in zip(turned, rope_angles_np(positions, inv_freq)):
        np.testing.assert_allclose(ours.cpu(), theirs, rtol=0, atol=1e-10, strict=True)
    assert turned[0][3, 0].item() == pytest.approx(math.cos(8191.0), abs=1e-10)


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 4.0}, LLAMA3],
                         ids=["default", "linear", "llama3"])
def test_rope_is_that_of_transformers(theta, scaling):
    config = transformers.LlamaConfig(
        hidden_size=8, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        rope_parameters={"rope_type": "default", **(scaling or {}), "rope_theta": theta})
    rotary = oracle.LlamaRotaryEmbedding(config)
    inv_freq = rope_frequencies(rope_config(64, theta, scaling))
    np.testing.assert_allclose(inv_freq, rotary.inv_freq.double(), rtol=1e-6)

    N, H, K = 50, 4, 2
    q, k, positions = normal(N, H, 64), normal(N, K, 64), np.arange(N)
    cos, sin = rotary(torch.zeros(1), torch.arange(N)[None])  # [1, N, D] each, float32
    expected = oracle.apply_rotary_pos_emb(torch.from_numpy(q), torch.from_numpy(k),
                                           cos[0], sin[0])
    for x, turned in zip((q, k), expected):
        assert_close(rope_np(x, *rope_angles_np(positions, inv_freq)), turned.numpy(), 1e-5)


def test_rope_frequencies_by_hand():
    config = rope_config(D=4, theta=100.0)
    np.testing.assert_allclose(rope_frequencies(config), [1, 0.1], rtol=1e-15)
    stretched = rope_config(D=4, theta=100.0, scaling={"rope_type": "linear", "factor": 4.0})
    np.testing.assert_allclose(rope_frequencies(stretched), [0.25, 0.025], rtol=1e-15)
    np.testing.assert_allclose(rope_frequencies(config, np.array([1.0, 2.0])), [1, 0.05])


def test_llama3_leaves_fast_planes_and_slows_the_slow_ones():
    """Turns in a context of 64: 64/2π = 10 for the fast plane (≥ 4: kept), 0.1 for the slow one."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 64}
    inv_freq = rope_frequencies(rope_config(D=4, theta=10000.0, scaling=scaling))
    np.testing.assert_allclose(inv_freq, [1, 0.01 / 8], rtol=1e-15)


def test_rope_by_hand():
    """At position 3 and 30 degrees a step, (1, 0) points to (0, 1), and (0, 2) to (-2, 0)."""
    cos, sin = rope_angles_np(np.array([0, 3]), np.array([math.pi / 6]))
    x = np.array([[[1.0, 0.0], [0.0, 2.0]]] * 2)  # [N=2, H=2, D=2]
    np.testing.assert_allclose(rope_np(x, cos, sin), [[[1, 0], [0, 2]], [[0, 1], [-2, 0]]],
                               atol=1e-15)


def test_dot_products_depend_on_distance_alone():
    q, k = normal(1, 1, 10), normal(2, 1, 10)[:1]
    inv_freq = rope_frequencies(rope_config(D=10))

    def score(q_position, k_position):
        turned = [rope_np(x, *rope_angles_np(np.array([position]), inv_freq))
                  for x, position in ((q, q_position), (k, k_position))]
        return (turned[0] * turned[1]).sum()

    assert score(907, 900) == pytest.approx(score(7, 0), abs=1e-10)
    assert abs(score(7, 0) - score(8, 0)) > 1e-3


def test_rope_refuses_other_shapes():
    x, angles = normal(5, 3, 8), normal(5, 3)  # D/2 is 4, not 3
    with pytest.raises(ValueError, match="4.*3"):
        rope_np(x, angles, angles)
    with pytest.raises(RuntimeError, match="4.*3"):
        rope_torch(*map(torch.from_numpy, (x, angles, angles)))
    with pytest.raises(ValueError, match="5.*6"):
        rope_np(x, normal(6, 4), normal(6, 4))  # six positions for five tokens


# ── Feed-forward ─────────────────────────────────────────────────────────────────────────────


@every_device
@every_dtype
def test_silu_twins(dtype, device):
    assert_twins(silu_np, silu_torch, [np.linspace(-30, 30, 601)], dtype, device)


@no_warnings
def test_silu_of_huge_numbers():
    x = np.array([-1e4, -0.0, 1e4], np.float32)
    np.testing.assert_array_equal(silu_np(x), [0, 0, 1e4])
    np.testing.assert_array_equal(silu_torch(torch.from_numpy(x)), [0, 0, 1e4])


@every_device
@every_dtype
@pytest.mark.parametrize("biased", [False, True])
@a_few
@given(sizes(3))
def test_swiglu_twins(dtype, device, biased, sizes):
    N, C, F = sizes
    arrays = [normal(N, C), normal(F, C) / math.sqrt(C), normal(2, F, C)[0] / math.sqrt(C),
              normal(C, F) / math.sqrt(F)]
    if biased:
        arrays += [normal(F), normal(2, F)[0], normal(C)]

    def dense(weights):
        return [Dense(*pair) for pair in zip(weights[:3], weights[3:] or [None] * 3)]

    assert_twins(lambda x, *weights: swiglu_np(x, *dense(weights)),
                 lambda x, *weights: swiglu_torch(x, *dense(weights)), arrays, dtype, device)


def test_swiglu_is_the_mlp_of_transformers():
    config = transformers.LlamaConfig(hidden_size=12, num_attention_heads=2, intermediate_size=20,
                                      mlp_bias=True)
    mlp = oracle.LlamaMLP(config).double()
    x = normal(7, 12)
    projections = [Dense(part.weight.detach().numpy(), part.bias.detach().numpy())
                   for part in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    assert_close(swiglu_np(x, *projections), mlp(torch.from_numpy(x)).detach().numpy(), 1e-12)


def test_swiglu_by_hand():
    """gate = 0 closes; a gate of 40 is open, silu(40) = 40 to sixteen digits."""
    x = np.array([[1.0]])
    gate, up, down = np.array([[0.0], [40.0]]), np.array([[5.0], [3.0]]), np.array([[1.0, 2.0]])
    np.testing.assert_array_equal(swiglu_np(x, Dense(gate), Dense(up), Dense(down)), [[240]])


def test_swiglu_refuses_another_width():
    gate, up, down = Dense(normal(7, 4)), Dense(normal(6, 4)), Dense(normal(4, 7))
    with pytest.raises(ValueError, match="7.*6"):
        swiglu_np(normal(3, 4), gate, up, down)
