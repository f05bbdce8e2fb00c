"""SmoothQuant: the float model stays what it was, and its activations get easier to round."""

import numpy as np
import pytest
import torch
from checkpoints import ARCHITECTURES, write_checkpoint

from minillm import calibration
from minillm.calibration import SeparateSequences, calibration_tokens, watch
from minillm.kv_cache import KVCache
from minillm.linear import Dense
from minillm.loading import open_checkpoint
from minillm.loading.weights import load_weights
from minillm.model import forward_np
from minillm.quantization import dequantize_group_np, quantize_int8_np
from minillm.quantize_model import quantize_checkpoint
from minillm.quantized_linear import W8A8, Int8
from minillm.smoothquant import smooth_layer, smoothing_factors_np, smoothing_factors_torch
from minillm.tokenizer import Tokenizer

FIELDS = ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rounded(matrix):
    """What is left of an array after int8 by row."""
    q, scale = quantize_int8_np(matrix)
    return dequantize_group_np(q, scale, None, matrix.shape[1])


def logits(weights, tokens):
    cache = KVCache(weights.config, len(tokens))
    return forward_np(weights, np.asarray(tokens), np.arange(len(tokens)), cache)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_float_model_computes_the_same(tmp_path, architecture, alpha):
    biases = {"attention_bias": True} if architecture == "Qwen3ForCausalLM" else {}
    biases |= {"attention_bias": True, "mlp_bias": True} if architecture[0] == "L" else {}
    write_checkpoint(tmp_path, architecture, **biases)
    weights = load_weights(open_checkpoint(tmp_path), np.asarray)
    tokens = [3, 129, 64, 17, 5, 88]
    before = logits(weights, tokens)
    rng = np.random.default_rng(3)
    seen = [{name: rng.lognormal(sigma=1.5, size=getattr(layer, name).weight.shape[1])
             for name in FIELDS} for layer in weights.layers]
    changed = [smooth_layer(layer, each, weights.config.heads, alpha)
               for layer, each in zip(weights.layers, seen)]
    for name in FIELDS:
        assert np.abs(getattr(changed[0], name).weight
                      - getattr(weights.layers[0], name).weight).max() > 0.1, name
    np.testing.assert_array_equal(before, logits(weights, tokens))  # the argument is as it was
    weights.layers = changed
    np.testing.assert_allclose(logits(weights, tokens), before, atol=1e-4)


def test_factors_by_hand():
    activations, columns = np.array([100.0, 1.0, 4.0]), np.array([1.0, 0.25, 4.0])
    np.testing.assert_allclose(smoothing_factors_np(activations, columns), [10, 2, 1])
    np.testing.assert_allclose(smoothing_factors_np(activations, columns, 1.0), [100, 1, 4])
    np.testing.assert_allclose(smoothing_factors_np(activations, columns, 0.0), [1, 4, 0.25])
    for channels in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        s = smoothing_factors_np(np.array(channels), np.array([2.0, 0.0, 0.0]))
        assert s[1] == s[2] == 1 and np.isfinite(s).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_twins_agree(alpha):
    rng = np.random.default_rng(1)
    activations, columns = rng.lognormal(size=(2, 37))
    activations[4] = columns[9] = 0
    theirs = smoothing_factors_torch(*map(torch.from_numpy, (activations, columns)), alpha)
    assert theirs.dtype is torch.float32
    np.testing.assert_allclose(smoothing_factors_np(activations, columns, alpha), theirs.numpy(),
                               rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.5])
def test_alpha_has_bounds(alpha):
    with pytest.raises(ValueError, match=f"alpha is {alpha}"):
        smoothing_factors_np(np.ones(2), np.ones(2), alpha)


def test_an_outlier_costs_less():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(50, 40)), rng.normal(size=(30, 40)) / 10
    x[:, 11] *= 200
    s = smoothing_factors_np(np.abs(x).max(axis=0), np.abs(weight).max(axis=0))
    exact = x @ weight.T
    plain = rounded(x) @ rounded(weight).T
    smooth = rounded(x / s) @ rounded(weight * s).T
    assert np.abs(smooth - exact).mean() < 0.35 * np.abs(plain - exact).mean()


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A checkpoint with an outlier before down_proj, and a text of its own."""
    write_checkpoint(tmp_path, "Qwen3ForCausalLM", vocab_size=300)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} owls and {i * i} cats\n" for i in range(400)))
    monkeypatch.setattr(calibration, "fetch", lambda name, verify: text)
    monkeypatch.setattr(calibration, "SEQUENCE_LEN", 24)
    checkpoint = open_checkpoint(tmp_path)
    monkeypatch.setattr(checkpoint, "tokenizer", lambda: Tokenizer.train(text.read_text(), 280))
    return checkpoint


def test_a_whole_model(tiny, capsys):
    quantized = quantize_checkpoint(tiny, "w8a8-smooth")
    progress = capsys.readouterr()
    assert progress.out == "" and "15/15" in progress.err
    smooth = load_weights(quantized, np.asarray, lambda matrix, has_rows: matrix)
    assert type(smooth.embed_tokens) is Int8
    for layer in smooth.layers:
        assert all(type(getattr(layer, name)) is W8A8 for name in FIELDS)
        for name in FIELDS:
            matrix = getattr(layer, name)
            setattr(layer, name, Dense(matrix.dequantize_np(), matrix.bias))
    dense = load_weights(tiny, np.asarray)
    smooth.embed_tokens, smooth.lm_head = dense.embed_tokens, dense.lm_head
    tokens = [5, 250, 31, 77]
    exact = logits(dense, tokens)  # a factor that was forgotten on one side would cost about 1
    assert exact.std() > 0.9 and np.abs(logits(smooth, tokens) - exact).mean() < 0.04
    assert not np.array_equal(smooth.layers[0].input_layernorm, dense.layers[0].input_layernorm)


def test_every_matrix_sees_what_its_sequence_alone_would_show(tiny):
    """All sequences in one pass: the same activations as one after the other."""
    seen = {}
    watch(tiny, lambda name, dense, x: seen.setdefault(name, x) is x and dense)
    tokens = calibration_tokens(tiny.tokenizer(), 256)
    assert tokens.shape == (calibration.NUM_SEQUENCES, 24) and len(seen) == 15
    weights = load_weights(tiny, np.asarray)
    last = weights.layers[-1].down_proj
    inputs = []

    class Listening:
        bias = last.bias

        def matmul_np(self, x):
            inputs.append(x)
            return last.matmul_np(x)

    weights.layers[-1].down_proj = Listening()
    for sequence in tokens:
        logits(weights, sequence)
    np.testing.assert_allclose(np.concatenate(inputs), seen["model.layers.2.mlp.down_proj"],
                               atol=1e-4)


def test_separate_sequences_do_not_see_each_other():
    rng = np.random.default_rng(6)
    q, k, v = rng.normal(size=(10, 6, 4)), rng.normal(size=(10, 2, 4)), rng.normal(size=(10, 2, 4))
    out = SeparateSequences(5).attend(0, q, k, v)
    np.testing.assert_allclose(out[5:], SeparateSequences(5).attend(0, q[5:], k[5:], v[5:]))
    np.testing.assert_allclose(out[5].reshape(2, 3, 4)[:, 0], v[5])  # the first sees itself only
