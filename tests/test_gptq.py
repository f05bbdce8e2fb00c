"""GPTQ: what it gains over rounding to nearest, and where it has nothing to gain."""

import numpy as np
import pytest
import torch
from checkpoints import write_checkpoint

from minillm import calibration
from minillm.gptq import choose_scales_np, choose_scales_torch, gptq_np, gptq_torch
from minillm.linear import Dense
from minillm.loading import open_checkpoint
from minillm.loading.weights import load_weights
from minillm.model_runner import make_runner
from minillm.quantization import dequantize_group_np, quantize_group_np
from minillm.quantize_model import quantize_checkpoint
from minillm.quantized_linear import Int4, Int8
from minillm.tokenizer import Tokenizer

# The last group is short (70 = 2·32 + 6, 45 = 32 + 13), and 133 columns are two blocks and a bit.
SIZES = [(11, 70, 32), (7, 133, 64), (24, 45, 32), (3, 5, 32)]


def correlated(rng, N, C):
    """Activations of a few causes and a little noise, some channels larger than others."""
    causes = rng.normal(size=(N, C // 4 + 1)) @ rng.normal(size=(C // 4 + 1, C))
    return (causes + 0.3 * rng.normal(size=(N, C))) * rng.lognormal(size=C)


def output_error(x, weight, quantized, group_size):
    return np.sum((x @ (weight - dequantize_group_np(*quantized, group_size)).T) ** 2)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("R, C, group_size", SIZES)
def test_products_change_less_than_by_rounding_to_nearest(R, C, group_size, symmetric):
    rng = np.random.default_rng(C)
    x, weight = correlated(rng, 200, C), rng.normal(size=(R, C))
    ours = gptq_np(weight, x.T @ x, group_size, symmetric)
    assert [each.shape for each in ours] == [(R, C), *[(R, -(-C // group_size))] * 2]
    assert [each.dtype for each in ours] == [np.uint8, np.float32, np.float32]
    assert ours[0].max() <= 15
    nearest = quantize_group_np(weight, group_size, symmetric)
    assert (output_error(x, weight, ours, group_size)
            < 0.7 * output_error(x, weight, nearest, group_size))


def test_compensation_gains_beyond_the_choice_of_scales():
    rng = np.random.default_rng(5)
    x, weight = correlated(rng, 300, 96), rng.normal(size=(13, 96))
    q, scale, minimum = gptq_np(weight, x.T @ x, 32)
    wide = [np.repeat(each, 32, axis=1) for each in (scale, minimum)]
    nearest = np.round((weight - wide[1]) / wide[0]).clip(0, 15)
    assert (output_error(x, weight, (q, scale, minimum), 32)
            < 0.5 * output_error(x, weight, (nearest, scale, minimum), 32))


@pytest.mark.parametrize("symmetric", [False, True])
def test_independent_activations_leave_nothing_but_rounding(symmetric):
    rng = np.random.default_rng(0)
    weight, hessian = rng.normal(size=(9, 70)), np.diag(rng.uniform(0.5, 2, size=70))
    q, scale, minimum = gptq_np(weight, hessian, 32, symmetric)
    wide = [np.repeat(each, 32, axis=1)[:, :70] for each in (scale, minimum)]
    values = weight.astype(np.float32)
    np.testing.assert_array_equal(q, np.round((values - wide[1]) / wide[0]).clip(0, 15))


def test_scales_are_those_of_the_whole_range_where_a_narrower_one_costs_more():
    weight = np.arange(16.0)[None]  # lies on the 16 steps already
    scale, minimum = choose_scales_np(weight, np.eye(16), 16)
    assert (scale.item(), minimum.item()) == (1.0, 0.0)


def test_two_columns_by_hand():
    """Of what column 0 loses, column 1 gets H₁₀ / H₁₁ = 1 / (1 + damping)."""
    weight = np.array([[0.4, 0.2, 15.0, 0.0]])  # the last two set the range: steps of 1
    hessian = np.zeros((4, 4))
    hessian[:2, :2] = [[2.0, 1.0], [1.0, 1.0]]
    hessian[2, 2] = 1  # and the 0 never meets anything: the mean of the diagonal is 1
    q, scale, minimum = gptq_np(weight, hessian, 4)
    assert (scale.item(), minimum.item()) == (1.0, 0.0)
    # Column 0: 0.4 -> 0. Column 1: 0.2 + 0.4 / 1.01 = 0.596 -> 1.
    assert q.tolist() == [[0, 1, 15, 0]]
    assert quantize_group_np(weight, 4)[0].tolist() == [[0, 0, 15, 0]]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("R, C, group_size", SIZES)
def test_twins_agree(R, C, group_size, symmetric):
    rng = np.random.default_rng(C + 1)
    x, weight = correlated(rng, 90, C), rng.normal(size=(R, C)).astype(np.float32)
    hessian = x.T @ x
    mine = gptq_np(weight, hessian, group_size, symmetric)
    theirs = gptq_torch(torch.from_numpy(weight), torch.from_numpy(hessian), group_size, symmetric)
    np.testing.assert_allclose(mine[1], theirs[1].numpy(), rtol=1e-6)
    np.testing.assert_allclose(mine[2], theirs[2].numpy(), rtol=1e-6)
    # A number that lies between two steps may fall to either side, and pull others along.
    assert np.mean(mine[0] != theirs[0].numpy()) < 0.02
    errors = [output_error(x, weight, [np.asarray(each) for each in one], group_size)
              for one in (mine, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_twins_choose_the_same_scales():
    rng = np.random.default_rng(8)
    weight, x = rng.normal(size=(6, 45)).astype(np.float32), rng.normal(size=(50, 45))
    mine = choose_scales_np(weight, x.T @ x, 32)
    theirs = choose_scales_torch(torch.from_numpy(weight), torch.from_numpy(x.T @ x), 32)
    for one, other in zip(mine, theirs):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6)


@pytest.mark.parametrize("N", [0, 1, 3])
def test_fewer_tokens_than_channels_make_a_singular_hessian(N):
    rng = np.random.default_rng(N)
    x, weight = rng.normal(size=(N, 40)), rng.normal(size=(5, 40))
    x[:, 7] = 0  # and a channel that never was active
    q, scale, minimum = gptq_np(weight, x.T @ x, 32)
    assert np.isfinite(scale).all() and np.isfinite(minimum).all()
    dead = (weight[:, 7] - minimum[:, 0]) / scale[:, 0]
    np.testing.assert_array_equal(q[:, 7], np.round(dead).clip(0, 15))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"hessian has shape \(3, 3\).*4 columns"):
        gptq_np(np.ones((2, 4)), np.eye(3), 32)
    with pytest.raises(ValueError, match="group_size is 0"):
        gptq_np(np.ones((2, 4)), np.eye(4), 0)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A checkpoint that reads a text of its own; rope, biases and grouped heads included."""
    write_checkpoint(tmp_path, "Qwen2ForCausalLM", vocab_size=300)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} owls and {i * i} cats\n" for i in range(400)))
    asked = []
    monkeypatch.setattr(calibration, "fetch", lambda name, verify: asked.append(name) or text)
    monkeypatch.setattr(calibration, "SEQUENCE_LEN", 24)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "tokenizer", lambda: Tokenizer.train(text.read_text(), 280))
    yield checkpoint
    assert set(asked) == {"shakespeare"}, "the text for evaluation must not be seen"


@pytest.mark.parametrize("quantize", ["int4-g32-gptq", "int4-g64-sym-gptq"])
def test_a_whole_model(tiny, quantize, capsys):
    quantized = quantize_checkpoint(tiny, quantize)
    assert quantized.quantize == quantize
    progress = capsys.readouterr()
    assert progress.out == "" and "15/15" in progress.err
    weights = load_weights(quantized, np.asarray, lambda matrix, has_rows: matrix)
    assert isinstance(weights.embed_tokens, Int8)
    plain = load_weights(tiny, np.asarray)
    for layer, before in zip(weights.layers, plain.layers):
        for name, matrix in vars(layer).items():
            if isinstance(getattr(before, name), Dense):
                assert type(matrix) is Int4 and matrix.shape == getattr(before, name).weight.shape
        np.testing.assert_array_equal(layer.qkv_proj.bias, before.qkv_proj.bias)
        np.testing.assert_array_equal(layer.input_layernorm, before.input_layernorm)


def test_both_backends_run_the_same_model(tiny):
    quantized = quantize_checkpoint(tiny, "int4-g32-gptq")
    tokens = [5, 17, 240, 3]
    mine, theirs = [
        runner.to_numpy(runner.forward(tokens, [0, 1, 2, 3], runner.new_cache(4)))
        for runner in (make_runner(quantized, "numpy", "cpu", "float32"),
                       make_runner(quantized, "torch", "cpu", "float32"))]
    np.testing.assert_allclose(mine, theirs, atol=2e-5)
