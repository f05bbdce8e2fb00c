"""The whole forward pass: against transformers, twin against twin, in pieces, and its memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from checkpoints import SIZES, write_checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillm import LLM, kv_cache
from minillm.errors import InputError
from minillm.generate import prefill
from minillm.kv_cache import KVCacheTorch
from minillm.linear import Dense, PackedDense
from minillm.loading.safetensors import HuggingFaceFolder
from minillm.loading.weights import load_weights
from minillm.model import forward_torch
from minillm.model_runner import NumpyRunner, TorchRunner, has_onednn_bfloat16

every_backend = pytest.mark.parametrize(
    "backend", ["numpy", "torch", pytest.param("cuda", marks=pytest.mark.cuda)])


def new_runner(folder, backend, dtype="float32"):
    checkpoint = HuggingFaceFolder(folder)
    if backend == "numpy":
        return NumpyRunner(checkpoint, dtype=dtype)
    return TorchRunner(checkpoint, "cuda" if backend == "cuda" else "cpu", dtype)


def random_tokens(count):
    return np.random.default_rng(count).integers(SIZES["vocab_size"], size=count).tolist()


def forward(runner, tokens, cache=None, rows=None):
    """Tokens behind those of the cache; -> logits as float32, or as float64 from such a runner."""
    cache = cache or runner.new_cache(len(tokens))
    positions = list(range(cache.length, cache.length + len(tokens)))
    logits = runner.forward(tokens, positions, cache, rows)
    return logits if runner.backend == "numpy" else runner.to_numpy(logits)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a random model that has biases and a norm for every head."""
    folder = tmp_path_factory.mktemp("tiny")
    write_checkpoint(folder, "Qwen3ForCausalLM", attention_bias=True)
    return folder


# ── Small random models: every architecture against transformers ─────────────────────────────

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
TIED = {"tie_word_embeddings": True}
# head_dim is 10 everywhere, while hidden_size / num_attention_heads is 8.
VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama-biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, **TIED}),
    "llama-llama3": ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    "llama-linear": ("LlamaForCausalLM", {"rope_parameters": LINEAR, "rms_norm_eps": 0.1}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral-tied": ("MistralForCausalLM", {"num_key_value_heads": 1, **TIED}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2-tied": ("Qwen2ForCausalLM", {"rope_parameters": LLAMA3, **TIED}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "qwen3-tied": ("Qwen3ForCausalLM", {"attention_bias": True, "num_key_value_heads": 6, **TIED}),
}


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request, tmp_path_factory):
    """(folder, tokens, transformers' logits for them)"""
    architecture, overrides = VARIANTS[request.param]
    folder, tokens = tmp_path_factory.mktemp("variant"), random_tokens(200)
    model = write_checkpoint(folder, architecture, **overrides)
    with torch.inference_mode():
        return folder, tokens, model(torch.tensor([tokens])).logits[0].numpy()


@every_backend
def test_logits_of_every_architecture(variant, backend):
    folder, tokens, expected = variant
    logits = forward(new_runner(folder, backend), tokens)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4, strict=True)


# ── The real model against transformers ──────────────────────────────────────────────────────

TEXT = """\
It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of
foolishness, it was the epoch of belief; in short, the period was so far like the present period.

def gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return abs(a)  # gcd(84, 36) == 12

#include <stdio.h>
int main(void) { for (int i = 0; i < 10; ++i) printf("%d\\n", i * 0x1F); return 0; }

Русские буквы, ελληνικά γράμματα, 日本語の文章、한국어 문장, العربية, עברית, हिन्दी.
Zażółć gęślą jaźń; naïve café, 12 345,67 €, x² + y² ≤ r², 🙂🚀\t| a | b |\r\n{"key": [1, 2.5e-3]}
"""
TOLERANCE = 2e-3


@pytest.fixture(scope="module")
def real(model_path, llm_numpy):
    """(tokens of TEXT, transformers' logits for them)"""
    tokens = llm_numpy.tokenizer.encode(TEXT)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_path.parent, gguf_file=model_path.name, dtype=torch.float32)
    with torch.inference_mode():
        return tokens, model(torch.tensor([tokens])).logits[0].numpy()


@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_logits_of_the_real_model(request, real, backend):
    tokens, expected = real
    assert len(tokens) >= 300
    logits = request.getfixturevalue(f"llm_{backend}").logits(tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE, strict=True)
    second, best = np.sort(expected, axis=-1)[:, -2:].T
    clear = best - second > TOLERANCE
    assert clear.mean() > 0.9
    assert (logits.argmax(axis=-1) == expected.argmax(axis=-1))[clear].all()


def mean_kl(logits, expected):
    """KL(expected ‖ logits) in nats, over the positions."""
    logits, expected = (torch.from_numpy(x).log_softmax(dim=-1) for x in (logits, expected))
    return torch.nn.functional.kl_div(logits, expected, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype, limit", [("bfloat16", 3e-3), ("float16", 1e-4)])
def test_two_byte_numbers_cost_the_real_model_little(model_path, real, dtype, limit, device):
    tokens, expected = real
    llm = LLM(str(model_path), backend="torch", device=device, dtype=dtype)
    assert 1e-7 < mean_kl(llm.logits(tokens), expected) < limit


@pytest.mark.cuda
def test_logits_of_the_real_model_on_a_gpu(model_path, real):
    tokens, expected = real
    llm = LLM(str(model_path), backend="torch", device="cuda", dtype="float32")
    np.testing.assert_allclose(llm.logits(tokens), expected, rtol=0, atol=TOLERANCE, strict=True)


# ── Twins, rows, pieces ──────────────────────────────────────────────────────────────────────


def test_twins_agree_in_float64(tiny):
    tokens = random_tokens(50)
    expected = forward(new_runner(tiny, "numpy", "float64"), tokens)
    weights = load_weights(HuggingFaceFolder(tiny), lambda array: torch.from_numpy(array).double())
    weights.inv_freq = torch.from_numpy(weights.inv_freq)
    cache = KVCacheTorch(weights.config, 50, torch.float64, "cpu")
    logits = forward_torch(weights, torch.tensor(tokens), torch.arange(50), cache).numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-10, strict=True)


def test_matrices_are_replaced_from_outside(tiny):
    """Those of the layers, one after the other; the forward pass then runs with the new ones."""
    runner, tokens = new_runner(tiny, "numpy"), random_tokens(9)
    expected, matrices = forward(runner, tokens), []

    class Shifted(Dense):
        def matmul_np(self, x):
            return super().matmul_np(x) + 1

    def shifted(dense):
        matrices.append(dense)
        return Shifted(dense.weight, dense.bias)

    runner.weights.replace_layer_matrices(shifted)
    assert len(matrices) == 5 * SIZES["num_hidden_layers"]
    assert type(runner.weights.embed_tokens) is type(runner.weights.lm_head) is Dense
    assert np.abs(forward(runner, tokens) - expected).max() > 0.1


@pytest.mark.skipif(not has_onednn_bfloat16(), reason="no bfloat16 kernels for this CPU")
def test_bfloat16_on_a_cpu_runs_packed_matrices(tiny):
    runner, tokens = new_runner(tiny, "torch", "bfloat16"), random_tokens(50)
    assert all(isinstance(layer.down_proj, PackedDense) for layer in runner.weights.layers)
    assert type(runner.weights.embed_tokens) is type(runner.weights.lm_head) is Dense
    expected = forward(new_runner(tiny, "torch"), tokens)
    assert mean_kl(forward(runner, tokens), expected) < 1e-3


@every_backend
def test_rows(tiny, backend):
    """Only the logits that the caller names, in the caller's order, and all of them if none is."""
    runner, tokens, vocab_size = new_runner(tiny, backend), random_tokens(9), SIZES["vocab_size"]
    logits = forward(runner, tokens)
    assert logits.shape == (9, vocab_size)
    for rows in ([-1], [0], [7, 2, 2], list(range(9))):
        np.testing.assert_allclose(forward(runner, tokens, rows=rows), logits[rows],
                                   rtol=0, atol=1e-5, strict=True)
    cache = runner.new_cache(9)
    assert forward(runner, tokens, cache, rows=[]).shape == (0, vocab_size)
    assert cache.length == 9


@pytest.mark.parametrize("backend, dtype, tolerance", [
    ("numpy", "float64", 1e-9), ("numpy", "float32", 1e-4), ("torch", "float32", 1e-4),
    pytest.param("cuda", "float32", 1e-4, marks=pytest.mark.cuda)])
def test_a_prompt_in_pieces_has_the_same_logits(tiny, backend, dtype, tolerance):
    """Any split, through the plain and the online form of attention and over their border."""
    runner = new_runner(tiny, backend, dtype)

    @settings(max_examples=30, deadline=None)
    @given(pieces=st.lists(st.integers(1, 25), min_size=1, max_size=8),
           max_plain_scores=st.sampled_from([0, 100, 2**18]))
    @example(pieces=[1] * 12, max_plain_scores=6)
    def check(pieces, max_plain_scores):
        tokens = random_tokens(sum(pieces))
        whole, cache = forward(runner, tokens), runner.new_cache(len(tokens))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kv_cache, "MAX_PLAIN_SCORES", max_plain_scores)
            logits = [forward(runner, tokens[cache.length :][:piece], cache) for piece in pieces]
        np.testing.assert_allclose(np.concatenate(logits), whole, rtol=0, atol=tolerance,
                                   strict=True)

    check()


@every_backend
@pytest.mark.parametrize("chunk_size", [1, 7, 29, 30, 512])
def test_prefill(tiny, backend, chunk_size):
    """Behind eleven tokens that the cache holds already; -> the logits of the last token."""
    runner, tokens = new_runner(tiny, backend), random_tokens(41)
    cache = runner.new_cache(41)
    forward(runner, tokens[:11], cache)
    logits = runner.to_numpy(prefill(runner, tokens[11:], cache, chunk_size))
    np.testing.assert_allclose(logits, forward(runner, tokens)[-1], rtol=0, atol=1e-4, strict=True)
    assert cache.length == 41


# ── Memory ───────────────────────────────────────────────────────────────────────────────────


def peak_bytes(function, *args):
    """The most that NumPy had allocated at once, beyond what was there; and the result."""
    tracemalloc.start()
    result = function(*args)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, result


def test_a_long_prompt_never_makes_a_score_matrix(tiny):
    """The scores of the last chunk alone would be 512 by 3000 for each of 6 heads."""
    runner, tokens = new_runner(tiny, "numpy"), random_tokens(3000)
    cache = runner.new_cache(len(tokens))
    peak, _ = peak_bytes(prefill, runner, tokens, cache)
    assert cache.length == 3000
    assert peak < 6 * 512 * 3000 * 4


def test_loading_holds_the_weights_once(tmp_path):
    model = write_checkpoint(tmp_path, "LlamaForCausalLM", hidden_size=240, vocab_size=5000,
                             intermediate_size=900, dtype="bfloat16")
    tensor_bytes = [4 * parameter.numel() for parameter in model.parameters()]
    peak, runner = peak_bytes(new_runner, tmp_path, "numpy")
    assert runner.weights.embed_tokens.weight.nbytes == max(tensor_bytes)
    assert sum(tensor_bytes) <= peak < sum(tensor_bytes) + max(tensor_bytes)


def test_a_tied_head_is_the_embedding(tmp_path):
    write_checkpoint(tmp_path, "LlamaForCausalLM", tie_word_embeddings=True)
    for backend in ("numpy", "torch"):
        weights = new_runner(tmp_path, backend).weights
        assert weights.lm_head is weights.embed_tokens


# ── Checkpoints that lack something, and imports ─────────────────────────────────────────────


@pytest.mark.parametrize("name", [
    "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
    *(f"model.layers.2.{part}" for part in (
        "input_layernorm.weight", "post_attention_layernorm.weight", "self_attn.q_proj.weight",
        "self_attn.v_proj.bias", "self_attn.o_proj.weight", "self_attn.k_norm.weight",
        "mlp.gate_proj.weight", "mlp.down_proj.weight"))])
def test_a_missing_or_transposed_tensor_is_named(tiny, tmp_path, name):
    tensors = load_file(tiny / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    stored = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"no tensor '{name}'"):
        load_weights(HuggingFaceFolder(tmp_path), np.asarray)
    save_file({**tensors, name: stored[None].mT.contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=f"'{name}' has shape"):
        load_weights(HuggingFaceFolder(tmp_path), np.asarray)


def test_numpy_generates_without_torch(tmp_path):
    """In a process of its own. Not "torch": a module yet to be loaded lazily has its name there."""
    write_checkpoint(tmp_path, "LlamaForCausalLM", vocab_size=280)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["to be or not to be, that is the question"] * 9, vocab_size=280)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    code = """if True:
        import json, sys
        from minillm import LLM, SamplingParams
        params = SamplingParams(max_tokens=3, ignore_eos=True, seed=1)
        answer = LLM(sys.argv[1], backend="numpy").generate("to be", params)[0]
        heavy = {"torch._C", "transformers", "huggingface_hub", "tokenizers"}
        print(json.dumps([len(answer.token_ids), sorted(heavy & set(sys.modules))]))"""
    shown = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, text=True,
                           capture_output=True, cwd=Path(__file__).parents[1])
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout) == [3, []]
