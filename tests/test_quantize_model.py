"""Whole models in few bits: every format, architecture and backend, and everything LLM offers."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoints import ARCHITECTURES, write_checkpoint
from gguf import GGMLQuantizationType as Format
from test_gguf import write_gguf
from test_llm import finish, write_chat_model

from minillm import LLM, InputError, SamplingParams
from minillm.cli import main
from minillm.generate import prefill
from minillm.kv_cache import KVCache
from minillm.linear import Dense
from minillm.loading.checkpoint import Checkpoint
from minillm.loading.gguf import GGUFFile
from minillm.loading.registry import fetch
from minillm.loading.safetensors import HuggingFaceFolder
from minillm.loading.weights import load_weights
from minillm.model import forward_np
from minillm.model_runner import make_runner
from minillm.quantize_model import (
    QuantizationFormat,
    parse_format,
    quantize_checkpoint,
    quantize_matrix,
)
from minillm.quantized_linear import W8A8, Int4, Int8

ROOT = Path(__file__).parents[1]
FORMATS = ["int8", "w8a8", "int4", "int4-g64", "int4-g128-sym"]
# Every row of C, F and H·D is a whole number of groups of 32: what PyTorch's operators take.
EVEN = {"hidden_size": 96, "intermediate_size": 160, "head_dim": 16, "vocab_size": 144}
# A row of C is no multiple of 16, and one of F is odd.
ODD = {"hidden_size": 42, "intermediate_size": 77, "vocab_size": 133}
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = [(17 * i + 5) % 130 for i in range(11)]
slow_warning = pytest.mark.filterwarnings("ignore:no fast operator")
every_format = pytest.mark.parametrize("name", FORMATS)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def write_model(folder, architecture, **overrides):
    if architecture == "MistralForCausalLM":
        overrides = {"sliding_window": None, **overrides}
    return write_checkpoint(folder, architecture, **overrides)


@pytest.fixture(params=["reference", "operators", "default"])
def path(request, monkeypatch):
    """Which products a TorchRunner on a CPU takes: the plain ones, PyTorch's operators, or what it
    chooses itself on this machine."""
    if request.param != "default":
        monkeypatch.setattr("minillm.model_runner.for_kernel", lambda matrix: None, raising=False)
    if request.param == "reference":
        monkeypatch.setattr("minillm.model_runner.for_cpu_operator",
                        lambda matrix, has_rows: None)
    return request.param


@pytest.fixture
def reference_path(monkeypatch):
    monkeypatch.setattr("minillm.model_runner.for_kernel", lambda matrix: None, raising=False)
    monkeypatch.setattr("minillm.model_runner.for_cpu_operator",
                        lambda matrix, has_rows: None)


def logits(checkpoint, backend="numpy", dtype="auto", kv_dtype="auto", device="cpu"):
    runner = make_runner(checkpoint, backend, device, dtype, kv_dtype)
    cache = runner.new_cache(len(TOKENS))
    return runner.to_numpy(runner.forward(TOKENS, list(range(len(TOKENS))), cache))


def dequantized_logits(checkpoint):
    """Of the model in float32 that has the numbers that the quantized one stands for."""
    def dense(matrix, has_rows):
        return Dense(getattr(matrix, "dequantize_np", lambda: matrix.weight)(), matrix.bias)

    weights = load_weights(checkpoint, np.asarray, dense)
    cache = KVCache(checkpoint.config, len(TOKENS))
    return forward_np(weights, np.array(TOKENS), np.arange(len(TOKENS)), cache)


def distance(actual, expected):
    """Relative to the length of all logits, as a vector."""
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


# ── Names ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, expected", [
    ("int8", QuantizationFormat("int8")),
    ("native", QuantizationFormat("native")),
    ("w8a8", QuantizationFormat("w8a8")),
    ("w8a8-smooth", QuantizationFormat("w8a8", smooth=True)),
    ("int4", QuantizationFormat("int4", 32)),
    ("int4-g128", QuantizationFormat("int4", 128)),
    ("int4-sym", QuantizationFormat("int4", 32, symmetric=True)),
    ("int4-g64-sym-gptq", QuantizationFormat("int4", 64, symmetric=True, gptq=True)),
])
def test_names_of_formats(name, expected):
    assert parse_format(name) == expected


@pytest.mark.parametrize("name", ["", "INT8", "int8 ", "int8\n", "int3", "int4-g48", "int4-g",
                                  "int4-gptq-g64", "int8-sym", "native-sym", "w8a8-gptq", 4, None,
                                  ["int8"]])
def test_names_of_no_format_are_refused(name):
    with pytest.raises(InputError, match="is unknown: choose int8, w8a8, .*native") as error:
        parse_format(name)
    assert "\n" not in str(error.value)


# ── Matrices ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name, layer, others", [
    ("int8", Int8, Int8), ("w8a8", W8A8, Int8), ("int4", Int4, Int8), ("int4-g128-sym", Int4, Int8),
])
@pytest.mark.parametrize("tied", [True, False])
def test_which_matrix_becomes_what(tmp_path, name, layer, others, tied):
    write_model(tmp_path, "LlamaForCausalLM", attention_bias=True, mlp_bias=True,
                tie_word_embeddings=tied)
    dense = make_runner(HuggingFaceFolder(tmp_path), "numpy", "cpu", "auto").weights
    checkpoint = quantize_checkpoint(HuggingFaceFolder(tmp_path), name)
    assert checkpoint.quantize == name
    weights = make_runner(checkpoint, "numpy", "cpu", "auto").weights
    assert type(weights.embed_tokens) is type(weights.lm_head) is others
    assert (weights.lm_head is weights.embed_tokens) == tied
    for quantized, original in zip(weights.layers, dense.layers):
        for part in ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
            matrix, plain = getattr(quantized, part), getattr(original, part)
            assert type(matrix) is layer and matrix.shape == plain.weight.shape
            np.testing.assert_array_equal(matrix.bias, plain.bias)
            lost = distance(matrix.dequantize_np(), plain.weight)
            assert 0 < lost < (0.15 if layer is Int4 else 0.01)
        np.testing.assert_array_equal(quantized.input_layernorm, original.input_layernorm)


def test_a_group_larger_than_a_row_is_the_row():
    dense = Dense(np.random.default_rng(0).normal(size=(5, 48)).astype(np.float32))
    matrix = quantize_matrix(dense, parse_format("int4-g128"))
    assert matrix.scale.shape == (5, 1)
    assert distance(matrix.dequantize_np(), dense.weight) < 0.15


# ── Logits ───────────────────────────────────────────────────────────────────────────────────

SHAPES = [{}, EVEN, ODD, {"tie_word_embeddings": True, "vocab_size": 131}]


@slow_warning
@every_architecture
@every_format
def test_both_backends_compute_with_the_same_numbers(tmp_path, reference_path, architecture, name):
    """NumPy and PyTorch in float32, and a float32 model that has the dequantized numbers.

    W8A8 rounds activations: where two orders of a sum differ in the last bit, a byte may differ by
    one, and everything after it by a little.
    """
    for number, overrides in enumerate(SHAPES):
        if architecture == "LlamaForCausalLM":
            overrides = {"attention_bias": True, "mlp_bias": True, **overrides}
        write_model(tmp_path / str(number), architecture, **overrides)
        checkpoint = quantize_checkpoint(HuggingFaceFolder(tmp_path / str(number)), name)
        expected = logits(checkpoint)
        there = logits(checkpoint, "torch", "float32")
        assert there.dtype == expected.dtype == np.float32
        assert distance(there, expected) < (3e-2 if name == "w8a8" else 1e-5)
        assert distance(expected, dequantized_logits(checkpoint)) < (
            6e-2 if name == "w8a8" else 1e-5)


@slow_warning
@every_format
@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-3), ("float16", 1e-2),
                                              ("bfloat16", 6e-2)])
def test_every_path_and_dtype_is_close(tmp_path, path, name, dtype, tolerance):
    if name == "w8a8":
        tolerance = 8e-2
    for number, overrides in enumerate([EVEN, ODD]):
        write_model(tmp_path / str(number), "Qwen2ForCausalLM", **overrides)
        checkpoint = quantize_checkpoint(HuggingFaceFolder(tmp_path / str(number)), name)
        assert distance(logits(checkpoint, "torch", dtype), logits(checkpoint)) < tolerance


@pytest.mark.cuda
@slow_warning
@pytest.mark.parametrize("name", [*FORMATS, None])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_on_a_gpu(tmp_path, name, kv_dtype):
    write_model(tmp_path, "Qwen2ForCausalLM", **ODD)
    checkpoint = HuggingFaceFolder(tmp_path)
    checkpoint = checkpoint if name is None else quantize_checkpoint(checkpoint, name)
    rounds = name == "w8a8" or kv_dtype == "int8"
    expected = logits(checkpoint, kv_dtype=kv_dtype)
    for dtype, tolerance in (("float32", 3e-2 if rounds else 1e-4), ("bfloat16", 8e-2)):
        found = logits(checkpoint, "torch", dtype, kv_dtype, device="cuda")
        assert distance(found, expected) < tolerance


def test_sizes_without_a_fast_operator_are_warned_of_once(tmp_path):
    write_model(tmp_path, "LlamaForCausalLM", **ODD)
    checkpoint = quantize_checkpoint(HuggingFaceFolder(tmp_path), "int4")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        logits(checkpoint, "torch", "bfloat16")
    message, = (str(each.message) for each in caught)
    assert message.startswith("no fast operator multiplies quantized matrices of")
    for shape in ("(133, 42)", "(100, 42)", "(42, 60)", "(77, 42)", "(42, 77)"):
        assert shape in message
    assert "in bfloat16 on cpu" in message


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["int8", "int4", "int4-g64", "int4-g128-sym", "w8a8"])
def test_sizes_with_a_fast_operator_are_not_warned_of(tmp_path, name):
    write_model(tmp_path, "LlamaForCausalLM", **EVEN)
    logits(quantize_checkpoint(HuggingFaceFolder(tmp_path), name), "torch", "bfloat16")


# ── Native: the blocks of a file ─────────────────────────────────────────────────────────────


def write_blocks(folder, formats, architecture="LlamaForCausalLM", keys=(), **overrides):
    """A GGUF file; formats: of its matrices, by part, or one for those of all layers."""
    if isinstance(formats, Format):
        formats = dict.fromkeys(PROJECTIONS, formats)
    model = write_model(folder, architecture, **{**EVEN, "rope_theta": 50000.0, **overrides})
    return write_gguf(folder / "model.gguf", model, keys, formats)


@slow_warning
@every_architecture
@pytest.mark.parametrize("block_format", [Format.Q8_0, Format.Q4_0, Format.Q4_1, Format.F16],
                         ids=lambda each: each.name)
def test_native_is_the_file_itself(tmp_path, reference_path, architecture, block_format):
    """The very numbers of the file: also with q and k, whose rows it has in another order."""
    file = write_blocks(tmp_path, block_format, architecture)
    expected = logits(GGUFFile(file))
    checkpoint = quantize_checkpoint(GGUFFile(file), "native")
    np.testing.assert_array_equal(dequantized_logits(checkpoint), expected)
    assert distance(logits(checkpoint), expected) < 1e-5
    assert distance(logits(checkpoint, "torch", "float32"), expected) < 1e-5


@slow_warning
@pytest.mark.parametrize("embedding", [Format.F32, Format.BF16, Format.Q8_0, Format.Q4_0,
                                       Format.Q4_1], ids=lambda each: each.name)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("vocab_size", [144, 130])
def test_native_embedding_and_head_in_any_format(tmp_path, path, embedding, tied, vocab_size):
    formats = dict.fromkeys(PROJECTIONS, Format.Q4_0) | {"embed_tokens": embedding,
                                                         "lm_head": embedding}
    file = write_blocks(tmp_path, formats, tie_word_embeddings=tied, vocab_size=vocab_size)
    expected = logits(GGUFFile(file))
    checkpoint = quantize_checkpoint(GGUFFile(file), "native")
    assert distance(logits(checkpoint), expected) < 1e-5
    assert distance(logits(checkpoint, "torch", "bfloat16"), expected) < 6e-2


def test_native_takes_each_matrix_in_its_own_format(tmp_path):
    formats = {"q_proj": Format.Q8_0, "k_proj": Format.Q8_0, "v_proj": Format.Q8_0,
               "o_proj": Format.Q4_1, "gate_proj": Format.Q4_0, "up_proj": Format.F16,
               "embed_tokens": Format.Q8_0}
    file = write_blocks(tmp_path, formats, "Qwen2ForCausalLM")
    checkpoint = quantize_checkpoint(GGUFFile(file), "native")
    layer = make_runner(checkpoint, "numpy", "cpu", "auto").weights.layers[1]
    kinds = [type(getattr(layer, part)) for part in (
        "qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")]
    assert kinds == [Int8, Int4, Int4, Dense, Dense]
    assert layer.qkv_proj.bias.shape == (160,)
    assert distance(logits(checkpoint), logits(GGUFFile(file))) < 1e-5


@pytest.mark.parametrize("formats, reason", [
    (dict.fromkeys(PROJECTIONS, Format.Q5_1), "qkv_proj is in Q5_1, and .*native.* keeps Q8_0"),
    ({"down_proj": Format.Q5_0}, "down_proj is in Q5_0"),
    ({"q_proj": Format.Q4_0, "k_proj": Format.Q4_0, "v_proj": Format.Q8_0},
     "qkv_proj is in Q4_0, Q8_0"),
    ({"q_proj": Format.Q4_0}, "qkv_proj is in F32, Q4_0"),
    ({"embed_tokens": Format.Q5_0}, "embed_tokens is in Q5_0"),
])
def test_native_refuses_by_name_what_it_cannot_keep(tmp_path, formats, reason):
    file = write_blocks(tmp_path, formats)
    with pytest.raises(InputError, match=reason) as error:
        make_runner(quantize_checkpoint(GGUFFile(file), "native"), "numpy", "cpu", "auto")
    assert "\n" not in str(error.value) and "model.gguf" in str(error.value)
    logits(quantize_checkpoint(GGUFFile(file), "int4"))  # which dequantizes first


def test_native_refuses_a_folder(tmp_path):
    write_model(tmp_path, "LlamaForCausalLM")
    with pytest.raises(InputError, match="has no quantized blocks.*give a .gguf file") as error:
        quantize_checkpoint(HuggingFaceFolder(tmp_path), "native")
    assert str(tmp_path) in str(error.value)


def test_native_checks_shapes(tmp_path):
    file = write_blocks(tmp_path, Format.Q4_0, keys={"llama.feed_forward_length": 128})
    with pytest.raises(InputError, match=r"shape \[160, 96\], the file's keys imply \[128, 96\]"):
        make_runner(quantize_checkpoint(GGUFFile(file), "native"), "numpy", "cpu", "auto")


def test_native_of_the_default_model(model_path):
    """Real blocks: of every format in the file, from both ends of it."""
    file, checkpoint = GGUFFile(model_path), quantize_checkpoint(GGUFFile(model_path), "native")
    for name, shape in [("model.embed_tokens", (49152, 576)),
                        ("model.layers.0.self_attn.q_proj", (576, 576)),
                        ("model.layers.29.mlp.down_proj", (576, 1536))]:
        matrix = checkpoint.matrix(name, [(name, shape[0])], shape[1], False)
        assert matrix.shape == shape
        block_format, raw = file.blocks(f"{name}.weight")
        rows = slice(None, None, 7)
        expected = gguf.quants.dequantize(raw[rows], block_format)
        np.testing.assert_array_equal(matrix.dequantize_np(rows), expected, strict=True)


# ── Everything LLM offers ────────────────────────────────────────────────────────────────────

TEMPLATE = "{% for m in messages %}{{ m.content }};{% endfor %}"
BACKENDS = [("numpy", "auto"), ("torch", "float32"), ("torch", "bfloat16")]


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """A random model of fast sizes, whose 257 tokens are padded to 264."""
    folder = write_chat_model(tmp_path_factory.mktemp("chat"), TEMPLATE, max_position_embeddings=64)
    write_checkpoint(folder, "LlamaForCausalLM", eos_token_id=256,
                     **{**EVEN, "vocab_size": 264, "max_position_embeddings": 64})
    return folder


def best_tokens(llm, token_ids, num_prompt_tokens, near=0.05):
    """True if every token was the best of the logits before it, or about as good."""
    rows = llm.logits(token_ids)[num_prompt_tokens - 1 : -1, : llm.vocab_size]
    return all(row.max() - row[token] <= near * np.abs(row).max()
               for row, token in zip(rows, token_ids[num_prompt_tokens:]))


@slow_warning
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("backend, dtype", BACKENDS)
@pytest.mark.parametrize("name", [*FORMATS, None])
def test_everything_works_with_every_format(chat_folder, backend, dtype, name, kv_dtype):
    llm = LLM(chat_folder, backend, "cpu", dtype, name, kv_dtype)
    assert (llm.quantize, llm.runner.kv_dtype) == (
        name, "int8" if kv_dtype == "int8" else llm.runner.dtype)
    greedy = SamplingParams(temperature=0, max_tokens=6, logprobs=2, ignore_eos=True)

    output, other = llm.generate(["some prompt", "x"], greedy)
    assert len(output.token_ids) == len(other.token_ids) == len(output.logprobs) == 6
    assert best_tokens(llm, output.prompt_token_ids + output.token_ids, 11)
    for token, reported in zip(output.token_ids, output.logprobs):
        assert reported[token] == max(reported.values()) < 0

    stream = llm.stream("some prompt", greedy)
    assert "".join(stream) == stream.output.text
    assert stream.output.token_ids == output.token_ids

    messages = [{"role": "user", "content": "Hi"}]
    chat = llm.chat(messages, greedy)
    assert chat.prompt_token_ids == llm.tokenizer.encode("Hi;")

    conversation = llm.conversation()
    first = "".join(conversation.say("Hi", greedy))
    assert first == chat.text
    "".join(conversation.say("And the others?", greedy))
    third = finish(conversation.say("So?", greedy))
    assert third.metrics.num_cached_tokens >= 16 and len(conversation.messages) == 6

    sampled = SamplingParams(temperature=1.0, seed=3, max_tokens=5, n=2)
    texts = [[each.text for each in llm.generate("x", sampled)[0].outputs] for _ in range(2)]
    assert texts[0] == texts[1]


@slow_warning
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
@pytest.mark.parametrize("backend, dtype", BACKENDS)
@every_format
def test_a_prompt_in_chunks_gives_the_logits_of_the_whole(chat_folder, backend, dtype, name,
                                                          kv_dtype):
    """In float32 to rounding; where something is rounded to few bits on the way, nearly."""
    llm = LLM(chat_folder, backend, "cpu", dtype, name, kv_dtype)
    runner = llm.runner
    whole, chunked = (runner.to_numpy(prefill(runner, TOKENS, runner.new_cache(11), size))
                      for size in (11, 4))
    is_exact = dtype != "bfloat16" and kv_dtype == "auto" and name != "w8a8"
    assert distance(chunked, whole) < (1e-3 if is_exact else 6e-2)


@pytest.mark.parametrize("options, reason", [
    ({"quantize": "int5"}, "quantize='int5' is unknown"),
    ({"quantize": ""}, "quantize='' is unknown"),
    ({"quantize": "native"}, "has no quantized blocks"),
    ({"kv_dtype": "int4"}, "kv_dtype 'int4' is unknown: choose 'auto'.* or 'int8'"),
    ({"kv_dtype": None}, "kv_dtype None is unknown"),
])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_unknown_options_are_refused(chat_folder, backend, options, reason):
    with pytest.raises(InputError, match=reason) as error:
        LLM(chat_folder, backend, "cpu", **options)
    assert "\n" not in str(error.value)


def test_command_line(chat_folder, capsys):
    arguments = ["generate", "--model", str(chat_folder), "--backend", "numpy", "--max-tokens", "3",
                 "--json", "x"]
    assert main([*arguments, "--quantize", "int4-g64-sym", "--kv-dtype", "int8"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["quantize"], answer["kv_dtype"]) == ("int4-g64-sym", "int8")
    assert main(arguments) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["quantize"], answer["kv_dtype"]) == (None, "float32")
    for wrong, reason in ((["--quantize", "int3"], "'int3'"), (["--kv-dtype", "int4"], "'int4'")):
        assert main([*arguments, *wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and reason in err


# ── The default model ────────────────────────────────────────────────────────────────────────

LOAD = """
import sys, tracemalloc
from minillm import LLM, SamplingParams
tracemalloc.start()
llm = LLM(sys.argv[1], backend="numpy", quantize=sys.argv[2], kv_dtype="int8")
print(*tracemalloc.get_traced_memory())
print(llm.generate("The", SamplingParams(temperature=0, max_tokens=2))[0].text)
sys.exit("torch._C" in sys.modules)
"""


@pytest.mark.parametrize("name, stays_mb, peak_mb", [("native", 130, 150), ("int8", 160, 500)])
def test_memory_and_no_torch(model_path, name, stays_mb, peak_mb):
    """In float32 this model has 540 MB; the peak of int8 is made by quantizing the embedding."""
    done = subprocess.run([sys.executable, "-c", LOAD, str(model_path), name], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "torch was imported"
    memory_bytes = [int(number) for number in done.stdout.splitlines()[0].split()]
    assert memory_bytes[0] < stays_mb * 1e6 and memory_bytes[1] < peak_mb * 1e6


@pytest.fixture(scope="module")
def shakespeare(llm_numpy):
    """128 tokens, and the log-probabilities after each, in float32."""
    text = fetch("shakespeare").read_text(encoding="utf-8")
    token_ids = llm_numpy.tokenizer.encode(text[20000:21000])[:128]
    return token_ids, log_softmax(llm_numpy.logits(token_ids))


def log_softmax(rows):
    rows = rows.astype(np.float64) - rows.max(axis=1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(axis=1, keepdims=True))


@slow_warning
@pytest.mark.parametrize("name, kv_dtype, limit", [
    ("native", "auto", 2e-3), ("native", "int8", 4e-3), ("int8", "auto", 8e-3),
])
def test_mean_kl_divergence_from_float32(model_path, shakespeare, name, kv_dtype, limit):
    token_ids, expected = shakespeare
    llm = LLM(str(model_path), "torch", "cpu", "auto", name, kv_dtype)
    found = log_softmax(llm.logits(token_ids))
    divergence = (np.exp(expected) * (expected - found)).sum(axis=1).mean()
    assert -1e-9 < divergence < limit


def test_native_answers_in_numpy(model_path, llm_numpy):
    llm = LLM(str(model_path), "numpy", quantize="native")
    token_ids = llm.tokenizer.encode("The capital of France is")
    np.testing.assert_allclose(llm.logits(token_ids), llm_numpy.logits(token_ids), atol=2e-3)
    output = llm.chat([{"role": "user", "content": "What is the capital of France?"}],
                      SamplingParams(temperature=0, max_tokens=9))
    assert output.text == "The capital of France is Paris."


class Spoiled(Checkpoint):
    """A checkpoint in which one tensor holds a number that is none."""

    def __init__(self, checkpoint, name, bad):
        self.checkpoint, self.name, self.bad = checkpoint, name, bad
        self.path, self.config, self.tokenizer = checkpoint.path, checkpoint.config, None
        self.eos_token_ids, self.chat_template, self.rope_freq_factors = (), None, None

    def tensor(self, name, shape):
        tensor = self.checkpoint.tensor(name, shape)
        if name == self.name:
            tensor.flat[3] = self.bad
        return tensor


@pytest.mark.parametrize("quantize", ["int8", "w8a8", "int4", "int4-g64-sym"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight",
                                  "model.layers.1.self_attn.v_proj.weight"])
def test_what_is_no_number_is_not_quantized(tmp_path, name, bad, quantize):
    write_checkpoint(tmp_path, "LlamaForCausalLM")
    checkpoint = quantize_checkpoint(Spoiled(HuggingFaceFolder(tmp_path), name, bad), quantize)
    with pytest.raises(InputError, match="NaN or infinities"):
        load_weights(checkpoint, np.asarray, lambda matrix, has_rows: matrix)


def test_the_model_that_is_read_is_not_written_over(tmp_path, capsys):
    write_checkpoint(tmp_path, "LlamaForCausalLM")
    before = (tmp_path / "model.safetensors").read_bytes()
    assert main(["quantize", str(tmp_path), "--quantize", "int8", "--force",
                 "--out", str(tmp_path / "model.safetensors")]) == 2
    assert "is a file of the model that is read" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == before
