"""Our numbers in llama.cpp's format: llama.cpp, transformers and our own reader find the model."""

from __future__ import annotations

import json
import logging
import warnings

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from checkpoints import write_checkpoint
from gguf import GGMLQuantizationType as Format
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gguf import llama_cpp_row_order as convert_row_order
from test_gguf import write_gguf as convert
from test_safetensors import LLAMA3

from minillm import LLM, InputError, SamplingParams
from minillm.cli import main
from minillm.loading.gguf import GGUFFile
from minillm.loading.gguf_blocks import dequantize, quantize_q4_0, quantize_q8_0, read_q4_0
from minillm.loading.gguf_writer import _value_type, write_gguf
from minillm.loading.quantized_file import Inventory
from minillm.loading.safetensors import HuggingFaceFolder
from minillm.quantization import quantize_group_np
from minillm.rope import rope_frequencies

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
SIZES = {"vocab_size": 300, "hidden_size": 96, "intermediate_size": 160, "head_dim": 16,
         "num_attention_heads": 4, "rms_norm_eps": 2**-20, "eos_token_id": 1}
QUANTIZERS = {Format.Q8_0: quantize_q8_0, Format.Q4_0: quantize_q4_0}
TEXT = "the cat sat on the mat, the hat that the rat ate; 12 34 Köln <end> <call>"


def write_model(folder, architecture="LlamaForCausalLM", special=("<end>",), added=("<call>",),
                **overrides):
    """A tiny random model with a tokenizer that has merges, and rows for a few tokens too many."""
    write_checkpoint(folder, architecture, **{**SIZES, **overrides})
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT] * 5, vocab_size=290, special_tokens=["<s>", "</s>"],
                                  show_progress=False)
    tokenizer.add_special_tokens(list(special))
    tokenizer.add_tokens(list(added))
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"))


# ---- the arithmetic --------------------------------------------------------------------------


def test_q8_0_by_hand():
    weight = np.zeros((1, 32), np.float32)
    weight[0, :4] = [127, -63.5, 1.4, -1.6]
    raw = quantize_q8_0(weight)
    assert raw[0, :2].view("<f2") == 1.0
    assert raw[0, 2:7].view("i1").tolist() == [127, -64, 1, -2, 0]  # -63.5 goes to the even one


def test_q4_0_by_hand():
    weight = np.zeros((1, 32), np.float32)
    weight[0, [0, 1, 16]] = [-16, 3, 14]  # d = -16 / -8 = 2, q = x / 2 + 8
    raw = quantize_q4_0(weight)
    assert raw[0, :2].view("<f2") == 2.0
    assert raw[0, 2:5].tolist() == [0xF0, 0x8A, 0x88]  # 14 / 2 + 8 = 15 above 0; 9.5 to even 10


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 7), groups=st.integers(1, 5), spread=st.sampled_from([1e-3, 1, 30]),
       seed=st.integers(0, 2**32 - 1), block_format=st.sampled_from(list(QUANTIZERS)))
def test_blocks_are_ggufs_but_for_a_rounding(rows, groups, spread, seed, block_format):
    """The same scales bit for bit; a q differs by 1 at most, and no error is made larger by it."""
    rng = np.random.default_rng(seed)
    weight = (rng.normal(size=(rows, 32 * groups)) * spread).astype(np.float32)
    weight[0, :32] = 0
    ours, theirs = QUANTIZERS[block_format](weight), gguf.quants.quantize(weight, block_format)
    assert ours.shape == theirs.shape and ours.dtype == np.uint8
    size = 32 * groups
    blocks = [raw.reshape(rows * groups, -1) for raw in (ours, theirs.view(np.uint8))]
    scales = [raw[:, :2].copy().view("<f2") for raw in blocks]
    used = scales[1] != 0  # a block of zeros has any scale
    np.testing.assert_array_equal(scales[0][used], scales[1][used])
    values = [dequantize(block_format, np.ascontiguousarray(raw)) for raw in (ours, theirs)]
    step = np.abs(scales[1].astype(np.float32)).reshape(rows, groups).repeat(32, axis=1)
    assert values[0].shape == (rows, size)
    assert np.all(np.abs(values[0] - values[1]) <= 1.001 * step)
    errors = [np.square(each.astype(np.float64) - weight).sum() for each in values]
    assert errors[0] <= errors[1] * (1 + 1e-6)


@pytest.mark.parametrize("block_format", QUANTIZERS)
@pytest.mark.parametrize("weight", [
    np.zeros((2, 64)), np.full((3, 32), -7.0), np.full((1, 32), 1e-9), np.full((1, 32), 3e38),
    np.tile([1.0, -1.0], (2, 32))], ids=["zeros", "equal", "tiny", "huge", "tie"])
def test_extreme_blocks_are_finite_and_near(block_format, weight):
    weight = weight.astype(np.float32)
    values = dequantize(block_format, QUANTIZERS[block_format](weight))
    assert values.shape == weight.shape and np.all(np.isfinite(values))
    if 1e-6 < np.abs(weight).max() < 1e5 or not weight.any():
        np.testing.assert_allclose(values, weight, rtol=0.13, atol=0)  # 1 with d = 1/8 is 7/8


def test_q4_0_is_our_symmetric_group_of_32():
    weight = np.random.default_rng(0).normal(size=(5, 96)).astype(np.float32)
    for ours, theirs in zip(read_q4_0(quantize_q4_0(weight)), quantize_group_np(weight, 32, True)):
        np.testing.assert_array_equal(ours, theirs)


# ---- the file, read by others ----------------------------------------------------------------

FAMILIES = [
    ("LlamaForCausalLM", {}),
    ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("MistralForCausalLM", {"sliding_window": None}),
    ("Qwen2ForCausalLM", {"head_dim": 24}),
    ("Qwen3ForCausalLM", {"tie_word_embeddings": True}),
]


@pytest.mark.parametrize("architecture, overrides", FAMILIES)
@pytest.mark.parametrize("quantize", ["q8_0", "q4_0"])
def test_our_reader_finds_the_model(tmp_path, architecture, overrides, quantize):
    source = HuggingFaceFolder(write_model(tmp_path, architecture, **overrides))
    written = write_gguf(source, quantize, tmp_path / "model.gguf")
    ours = GGUFFile(written.path)
    assert ours.config == source.config
    assert ours.chat_template == source.chat_template and ours.eos_token_ids == (1,)
    text, theirs = TEXT + " <s>", source.tokenizer()
    assert ours.tokenizer().encode(text, True) == theirs.encode(text, True)
    assert ours.tokenizer().special_tokens == theirs.special_tokens
    inventory = Inventory(source.config)
    for name, shape in inventory.tensors:
        np.testing.assert_array_equal(ours.tensor(name, shape), source.tensor(name, shape))
    for name, parts, in_size, bias in inventory.matrices:
        for part, size in parts:
            name, shape = f"{part}.weight", (size, in_size)
            block_format, _ = ours.blocks(name)
            is_layer = ".layers." in name
            assert block_format == (Format[quantize.upper()] if is_layer else Format.Q8_0)
            weight = source.tensor(name, shape)
            expected = dequantize(block_format, QUANTIZERS[block_format](weight))
            np.testing.assert_array_equal(ours.tensor(name, shape), expected)
            if bias:
                np.testing.assert_array_equal(ours.tensor(f"{part}.bias", (size,)),
                                              source.tensor(f"{part}.bias", (size,)))


@pytest.mark.parametrize("architecture, overrides", [
    ("LlamaForCausalLM", {}), ("Qwen2ForCausalLM", {"head_dim": 24}),
    ("Qwen3ForCausalLM", {"head_dim": 128})])  # transformers knows no other for Qwen3's files
def test_transformers_computes_the_same_logits(tmp_path, architecture, overrides):
    write_gguf(HuggingFaceFolder(write_model(tmp_path, architecture, **overrides)), "q8_0",
               tmp_path / "model.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    token_ids = [5, 280, 17, 33, 99, 5]
    with torch.inference_mode():
        expected = theirs(torch.tensor([token_ids])).logits[0].numpy()
    for backend in ("numpy", "torch"):
        llm = LLM(tmp_path / "model.gguf", backend=backend, device="cpu", dtype="float32")
        np.testing.assert_allclose(llm.logits(token_ids), expected, rtol=1e-4, atol=1e-4)


def test_the_package_reads_what_a_converter_writes(folder, tmp_path):
    """Keys, their types, names and shapes are those of llama.cpp's converter."""
    write_gguf(HuggingFaceFolder(folder), "q4_0", tmp_path / "ours.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    convert(tmp_path / "theirs.gguf", model)
    ours, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    for key, field in theirs.fields.items():
        if key.startswith(("llama.", "general.")):
            assert ours.fields[key].types == field.types, key
            assert ours.fields[key].contents() == field.contents(), key
    assert ours.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert ours.fields["general.quantization_version"].contents() == 2
    types = ours.fields["tokenizer.ggml.token_type"]
    assert types.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]
    num_tokens = HuggingFaceFolder(folder).tokenizer().vocab_size
    assert types.contents() == [3, 3] + (num_tokens - 4) * [1] + [3, 4] + (300 - num_tokens) * [5]
    assert len(ours.fields["tokenizer.ggml.tokens"].contents()) == 300
    shapes = [{tensor.name: list(tensor.shape) for tensor in reader.tensors}
              for reader in (ours, theirs)]
    assert shapes[0] == shapes[1]
    by_name = {tensor.name: tensor for tensor in ours.tensors}
    query = model.state_dict()["model.layers.1.self_attn.q_proj.weight"].numpy()
    np.testing.assert_array_equal(by_name["blk.1.attn_q.weight"].data,
                                  quantize_q4_0(convert_row_order(query, 4)))
    assert by_name["blk.1.attn_norm.weight"].tensor_type == Format.F32


def test_rotary_scaling(tmp_path):
    write_model(tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})
    linear = HuggingFaceFolder(tmp_path)
    ours = GGUFFile(write_gguf(linear, "q8_0", tmp_path / "linear.gguf").path)
    assert ours.config.rope_scaling == linear.config.rope_scaling
    write_model(tmp_path, rope_parameters=LLAMA3)
    llama3 = HuggingFaceFolder(tmp_path)
    ours = GGUFFile(write_gguf(llama3, "q8_0", tmp_path / "llama3.gguf").path)
    assert ours.config.rope_scaling is None
    np.testing.assert_allclose(rope_frequencies(ours.config, ours.rope_freq_factors),
                               rope_frequencies(llama3.config), rtol=1e-6)
    again = GGUFFile(write_gguf(ours, "q8_0", tmp_path / "again.gguf").path)
    np.testing.assert_array_equal(again.rope_freq_factors, ours.rope_freq_factors)


@pytest.fixture(scope="module")
def real_file(model_path, tmp_path_factory):
    """The real model in a format, written once, by the command."""
    folder = tmp_path_factory.mktemp("real")

    def write(quantize):
        path = folder / f"{quantize}.gguf"
        if not path.exists():
            command = ["quantize", str(model_path), "--quantize", quantize, "--out", str(path)]
            assert main(command) == 0
        return path

    return write


def test_a_gguf_source_keeps_its_keys(model_path, real_file, capsys):
    path = real_file("q4_0")
    assert capsys.readouterr().out == f"{path}: 91.7 MB, 5.35 bits a weight\n"
    ours, source = GGUFFile(path), GGUFFile(model_path)
    assert ours.metadata == source.metadata | {"general.file_type": 2}
    assert ours.config == source.config
    answer = LLM(path, device="cpu", dtype="float32").chat(
        QUESTION, SamplingParams(temperature=0, max_tokens=12))
    assert answer.text.startswith("The capital of France is Paris")
    block_format, raw = ours.blocks("model.embed_tokens.weight")
    assert block_format == Format.Q8_0  # quantized again, without a change
    np.testing.assert_array_equal(raw, source.blocks("model.embed_tokens.weight")[1])


# ---- llama.cpp -------------------------------------------------------------------------------


def llama_cpp_logits(path, token_ids, num_tokens):
    """llama.cpp's logits of each token, and what it goes on to write."""
    llama_cpp = pytest.importorskip("llama_cpp")
    llama = llama_cpp.Llama(str(path), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    llama.eval(token_ids)
    logits, answer = np.array(llama.scores[:len(token_ids)]), []
    while len(answer) < num_tokens and 2 not in answer:  # its end of an answer
        answer.append(int(np.argmax(llama.scores[llama.n_tokens - 1])))
        llama.eval(answer[-1:])
    return logits, answer


def log_softmax(x):
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("quantize, kld", [("q8_0", 0.02), ("q4_0", 0.05)])
def test_llama_cpp_answers_with_the_file(real_file, quantize, kld):
    """The same distribution as ours from the same file, up to llama.cpp's 8-bit activations.

    The first word of the answer is a matter of luck with Q8_0: the logits of "The" and of "L" (as
    in "L'Étoile") are 0.1 apart, and llama.cpp chooses "L" whoever wrote the file, even with the
    Q4_1 that it was made from. So there the answer is begun for it.
    """
    pytest.importorskip("llama_cpp")
    path = real_file(quantize)
    llm = LLM(path, device="cpu", dtype="float32")
    chat = llm.encode_chat(QUESTION)
    theirs, answer = llama_cpp_logits(path, chat, num_tokens=8)
    ours, theirs = log_softmax(llm.logits(chat)), log_softmax(theirs)
    assert (np.exp(ours) * (ours - theirs)).sum(axis=1).mean() < kld
    assert (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean() > 0.8
    our_answer = llm.chat(QUESTION, SamplingParams(temperature=0, max_tokens=8))
    assert our_answer.text.startswith("The capital of France is Paris")
    if quantize == "q4_0":
        assert answer == our_answer.token_ids
    begun = chat + llm.tokenizer.encode("The capital of France is")
    assert llm.tokenizer.decode(llama_cpp_logits(path, begun, num_tokens=1)[1]) == " Paris"


@pytest.mark.parametrize("architecture, overrides", FAMILIES)
def test_llama_cpp_loads_every_architecture(tmp_path, architecture, overrides):
    pytest.importorskip("llama_cpp")
    write_model(tmp_path, architecture, **overrides)
    path = write_gguf(HuggingFaceFolder(tmp_path), "q8_0", tmp_path / "model.gguf").path
    token_ids = [5, 280, 17, 33, 99, 5]
    theirs, _ = llama_cpp_logits(path, token_ids, num_tokens=1)
    ours = LLM(path, backend="numpy").logits(token_ids)
    error = np.sqrt(np.square(ours - theirs).mean() / np.square(ours).mean())
    assert error < 0.05  # of 8-bit activations; rows out of order make it more than 1


# ---- refusals --------------------------------------------------------------------------------


def assert_refused(folder, tmp_path, reason, quantize="q8_0"):
    before = sorted(tmp_path.iterdir())
    with pytest.raises(InputError) as caught:
        write_gguf(HuggingFaceFolder(folder), quantize, tmp_path / "model.gguf")
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("overrides, reason", [
    ({"intermediate_size": 84}, "tensor 'model.layers.0.mlp.down_proj.weight' has rows of 84 num"),
    ({"hidden_size": 80}, "has rows of 80 numbers, must have a multiple of 32 for Q8_0"),
    ({"vocab_size": 280}, "tokens, and the model rows for only 280"),
    ({"architecture": "Qwen3ForCausalLM", "attention_bias": True}, "llama.cpp's qwen3 has no bias"),
])
def test_models_that_a_file_cannot_hold(tmp_path, overrides, reason):
    assert_refused(write_model(tmp_path, **overrides), tmp_path, reason)


@pytest.mark.parametrize("change, reason", [
    ({"normalizer": {"type": "NFC"}}, "cannot say what this tokenizer has under nfc"),
    ({"ignore_merges": True}, "under ignore_merges"),
    ({"merges": []}, "has no merges"),
])
def test_tokenizers_that_a_file_cannot_describe(tmp_path, change, reason):
    write_model(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for key, value in change.items():
        (data if key == "normalizer" else data["model"])[key] = value
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert_refused(tmp_path, tmp_path, reason)


def test_formats_and_sources_that_are_refused(folder, tmp_path):
    assert_refused(folder, tmp_path, "choose q8_0 or q4_0", quantize="int8")
    assert_refused(folder, tmp_path, "choose q8_0 or q4_0", quantize=None)


def test_a_third_token_that_ends_an_answer_is_left_out_with_a_word(folder, tmp_path):
    source = HuggingFaceFolder(folder)
    source.eos_token_ids = (7, 1, 9)
    with pytest.warns(UserWarning, match=r"\[9\] are left out"):
        path = write_gguf(source, "q8_0", tmp_path / "model.gguf").path
    assert GGUFFile(path).eos_token_ids == (1, 7)
    source.eos_token_ids = (1, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = write_gguf(source, "q8_0", tmp_path / "model.gguf").path
    assert GGUFFile(path).eos_token_ids == (1, 9)


@pytest.mark.parametrize("values, kind", [
    ([True], "BOOL"), (["a"], "STRING"), ([0.5], "FLOAT32"), ([float("inf")], "FLOAT32"),
    ([1e300], "FLOAT64"), ([2**32 - 1], "UINT32"), ([-1], "INT32"), ([2**63], "UINT64"),
    ([-2**40], "INT64"),
])
def test_types_of_keys(values, kind):
    assert _value_type(values, "UINT32 INT32 UINT64 INT64") == gguf.GGUFValueType[kind]


def test_the_package_has_nothing_to_complain_about(folder, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        write_gguf(HuggingFaceFolder(folder), "q4_0", tmp_path / "model.gguf")
    assert caplog.records == []
