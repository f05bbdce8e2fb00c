"""A kept quantized model answers bit for bit as one that is quantized when it is loaded."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from checkpoints import SIZES, write_checkpoint
from test_llm import write_chat_model
from test_safetensors import LLAMA3

from minillm import LLM, InputError, SamplingParams
from minillm.cli import main
from minillm.linear import Dense
from minillm.loading import open_checkpoint, quantized_writer
from minillm.loading.gguf_writer import write_gguf
from minillm.loading.quantized_file import Inventory, QuantizedFile, read_metadata
from minillm.loading.quantized_writer import whole_file, write_quantized_file
from minillm.loading.registry import resolve
from minillm.loading.safetensors import HuggingFaceFolder
from minillm.loading.stored_json import config_from_dict, tokenizer_from_dict, tokenizer_to_dict
from minillm.quantize_model import quantize_checkpoint
from minillm.quantized_linear import W8A8, Int4, Int8
from minillm.tokenizer import Tokenizer

FORMATS = ["int8", "w8a8", "int4", "int4-g64", "int4-g128", "int4-sym"]
SLOW = "ignore:no fast operator:UserWarning"
TOKEN_IDS = [3, 200, 256, 17, 99, 3, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model whose last groups are short, with an odd number of columns in down_proj."""
    return write_chat_model(tmp_path_factory.mktemp("tiny"), intermediate_size=85)


def keep(source, quantize, path):
    write_quantized_file(quantize_checkpoint(open_checkpoint(source), quantize), path)
    return path


@pytest.fixture(scope="module")
def kept(folder, tmp_path_factory):
    """The tiny model as a file of 4-bit groups."""
    return keep(folder, "int4", tmp_path_factory.mktemp("kept") / "tiny.safetensors")


def assert_same_answers(path, source, quantize, backend, **options):
    ours = LLM(path, backend=backend, device="cpu", **options)
    fresh = LLM(source, backend=backend, device="cpu", quantize=quantize, **options)
    assert ours.quantize == quantize and ours.config == fresh.config
    assert ours.runner.dtype == fresh.runner.dtype
    np.testing.assert_array_equal(ours.logits(TOKEN_IDS), fresh.logits(TOKEN_IDS), strict=True)
    params = SamplingParams(temperature=0, max_tokens=8)
    answers = [llm.generate(TOKEN_IDS, params)[0].token_ids for llm in (ours, fresh)]
    assert len(answers[0]) > 0 and answers[0] == answers[1]


# ---- the same answers ------------------------------------------------------------------------


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("quantize", FORMATS)
def test_answers_bit_for_bit(folder, tmp_path, quantize):
    path = keep(folder, quantize, tmp_path / "model.safetensors")
    assert_same_answers(path, folder, quantize, "numpy")
    assert_same_answers(path, folder, quantize, "torch")
    assert_same_answers(path, folder, quantize, "torch", dtype="float32")


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("blocks", ["q8_0", "q4_0"])
def test_blocks_of_a_gguf_file(tmp_path, blocks):
    write_chat_model(tmp_path, hidden_size=96, intermediate_size=160, num_attention_heads=4,
                     head_dim=16)
    add_a_merge(tmp_path / "tokenizer.json")
    source = write_gguf(open_checkpoint(tmp_path), blocks, tmp_path / "model.gguf").path
    path = keep(source, "native", tmp_path / "model.safetensors")
    for backend in ("numpy", "torch"):
        assert_same_answers(path, source, "native", backend)


def add_a_merge(path):
    """llama.cpp knows no tokenizer without merges: here, "Ġ" and "a" become <end>'s neighbour."""
    data = json.loads(path.read_text())
    data["model"]["vocab"]["Ġa"] = 256
    data["model"]["merges"] = [["Ġ", "a"]]
    data["added_tokens"] = []
    path.write_text(json.dumps(data))


def test_the_real_model(model_path, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    assert main(["quantize", str(model_path), "--quantize", "native", "--out", str(path)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 98.1 MB, 5.74 bits a weight")
    assert_same_answers(path, model_path, "native", "torch")
    kept, source = QuantizedFile(path), open_checkpoint(model_path)
    assert tokenizer_to_dict(kept.tokenizer()) == tokenizer_to_dict(source.tokenizer())
    assert kept.chat_template == source.chat_template
    assert kept.eos_token_ids == source.eos_token_ids == (2,)
    text = "It's 1984:  naïve <|im_end|> 日本\n\n"
    assert kept.tokenizer().encode(text, True) == source.tokenizer().encode(text, True)


@pytest.mark.filterwarnings(SLOW)
@pytest.mark.parametrize("architecture, overrides", [
    ("LlamaForCausalLM", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}),
    ("LlamaForCausalLM", {"rope_parameters": LLAMA3}),
    ("Qwen2ForCausalLM", {}),
    ("Qwen3ForCausalLM", {}),
])
def test_architectures(tmp_path, architecture, overrides):
    """Biases, norms of heads, tied and own heads, rotary scaling: all of it is kept."""
    write_chat_model(tmp_path)  # its tokenizer
    write_checkpoint(tmp_path, architecture, **{"vocab_size": 257, **overrides})
    path = keep(tmp_path, "int4-g64", tmp_path / "kept.safetensors")
    for backend in ("numpy", "torch"):
        assert_same_answers(path, tmp_path, "int4-g64", backend)


class AnyCheckpoint(HuggingFaceFolder):
    """Matrices as a data-aware method may make them: scales of any value, minima of any sign."""

    quantize = "mine"
    rope_freq_factors = np.array([1, 1.1, 2, 3, 4], dtype=np.float32)

    def matrix(self, name, parts, in_size, bias):
        rng = np.random.default_rng(len(name))
        out_size, half, groups = sum(size for _, size in parts), -(-in_size // 2), -(-in_size // 9)
        scale = rng.normal(size=(out_size, groups)).astype(np.float32)
        bias = rng.normal(size=out_size).astype(np.float32) if bias else None
        if "qkv" in name:
            return Dense(rng.normal(size=(out_size, in_size)).astype(np.float32), bias)
        if "down" in name:
            return Int8(rng.integers(-127, 128, (out_size, in_size), np.int8), scale, 9, bias)
        if "gate" in name:
            q = rng.integers(-127, 128, (out_size, in_size), np.int8)
            return W8A8(q, scale[:, :1], in_size, bias)
        packed = rng.integers(0, 256, (out_size, half), np.uint8)
        return Int4(packed, scale, rng.normal(size=scale.shape).astype(np.float32), 9, in_size,
                    bias)


def test_whatever_a_checkpoint_holds_comes_back(folder, tmp_path):
    checkpoint = AnyCheckpoint(folder)
    written = write_quantized_file(checkpoint, tmp_path / "any.safetensors")
    kept = QuantizedFile(written.path)
    inventory = Inventory(checkpoint.config)
    assert len(inventory.matrices) == 3 * 5 + 2 and len(inventory.tensors) == 3 * 2 + 1
    for arguments in inventory.matrices:
        ours, theirs = kept.matrix(*arguments), checkpoint.matrix(*arguments)
        assert type(ours) is type(theirs)
        for name, value in vars(theirs).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(getattr(ours, name), value, strict=True)
            else:
                assert getattr(ours, name) == value
    for arguments in inventory.tensors:
        np.testing.assert_array_equal(kept.tensor(*arguments), checkpoint.tensor(*arguments))
    np.testing.assert_array_equal(kept.rope_freq_factors, checkpoint.rope_freq_factors)


# ---- the file --------------------------------------------------------------------------------


def test_the_file_is_plain_safetensors_and_says_nothing_twice(folder, kept, tmp_path):
    arrays = safetensors.numpy.load_file(kept)
    name = "model.layers.1.mlp.down_proj"
    packed, scale = arrays[f"{name}.packed"], arrays[f"{name}.scale"]
    assert (packed.shape, packed.dtype) == ((48, 43), np.uint8)
    assert (scale.shape, scale.dtype) == ((48, 3), np.float16)
    assert arrays[f"{name}.minimum"].dtype == np.float16
    assert arrays["lm_head.q"].dtype == np.int8 and arrays["lm_head.scale"].dtype == np.float32
    assert arrays["model.norm.weight"].dtype == np.float32
    symmetric = safetensors.numpy.load_file(keep(folder, "int4-sym", tmp_path / "s.safetensors"))
    assert {key for key in arrays.keys() ^ symmetric.keys()} == {
        key for key in arrays if key.endswith(".minimum")}


def test_bits_a_weight_by_hand(folder, tmp_path):
    """int8 by row: 8 bits a weight, 32 a row for its scale, 32 for each number of the norms."""
    written = write_quantized_file(quantize_checkpoint(open_checkpoint(folder), "int8"),
                                   tmp_path / "model.safetensors")
    C, F, HD, KD, V, L = 48, 85, 60, 20, 257, 3
    matrices = [(V, C), (V, C)] + L * [(HD + 2 * KD, C), (C, HD), (F, C), (F, C), (C, F)]
    norms = (2 * L + 1) * C
    bits = sum(8 * out * size + 32 * out for out, size in matrices) + 32 * norms
    weights = sum(out * size for out, size in matrices) + norms
    assert written.bits_a_weight == bits / weights
    assert written.size_bytes == written.path.stat().st_size


@pytest.mark.parametrize("family, nfc", [("gpt-2", False), ("smollm", True), ("qwen2", False)])
def test_any_tokenizer_comes_back(family, nfc):
    """Also parts of characters, added tokens of both kinds, and combinations no file has yet."""
    trained = Tokenizer.train("lower löwer 日本 " * 3, 270, family=family, special_tokens=["<x>"])
    values = tokenizer_to_dict(trained) | {"nfc": nfc, "ignore_merges": True, "bos_token_id": 3,
                                           "add_bos_token": True}
    values["tokens"].append("Ġhi")
    values["added_tokens"] += [{"id": len(values["tokens"]) - 1, "text": "Ġhi", "special": False,
                                "normalized": True}]
    values = json.loads(json.dumps(values))
    again = tokenizer_from_dict(values)
    assert json.loads(json.dumps(tokenizer_to_dict(again))) == values
    assert again.pretokenizer.added_tokens[-1].normalized and again.add_bos_token
    text = "low lower Ġhi <x> 日本é e\u0301"
    plain = tokenizer_from_dict(values | {"ignore_merges": False, "add_bos_token": False})
    assert again.decode(again.encode(text, True)) == plain.decode(plain.encode(text, True))
    assert trained.encode("lower 日本") == tokenizer_from_dict(
        json.loads(json.dumps(tokenizer_to_dict(trained)))).encode("lower 日本")


def test_an_interrupt_leaves_what_was_there(folder, tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    path.write_text("before")

    def interrupted(*arguments):
        raise KeyboardInterrupt

    checkpoint = quantize_checkpoint(open_checkpoint(folder), "int8")
    monkeypatch.setattr(quantized_writer, "_write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_quantized_file(checkpoint, path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "other").write_text("")
    with whole_file(tmp_path / "file") as partial:
        partial.write_text("")
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "other").stat().st_mode


# ---- the command -----------------------------------------------------------------------------


def refusal(capsys, *arguments):
    assert main(["quantize", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("minillm quantize: ")
    return err


def test_command(folder, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    command = [folder, "--quantize", "int8", "--out", path]
    assert main(["quantize", *map(str, command)]) == 0
    assert capsys.readouterr().out.startswith(f"{path}: 0.1 MB, 8.70 bits")
    assert LLM(path, backend="numpy").quantize == "int8"
    assert "exists already: give another path, or add --force" in refusal(capsys, *command)
    assert main(["quantize", *map(str, command), "--force"]) == 0


@pytest.mark.parametrize("quantize, out, reason", [
    ("int8", "model.bin", "must end in .safetensors (for minillm) or .gguf"),
    ("q4_0", "model.safetensors", "quantize='q4_0' is unknown: choose int8"),
    ("int4", "model.gguf", "choose q8_0 or q4_0, or a .safetensors file"),
    ("int8", "no/such/model.safetensors", "there is no folder"),
    ("int8", "folder.safetensors", "is a folder"),
    ("native", "model.safetensors", "has no quantized blocks"),
])
def test_command_refuses(folder, tmp_path, capsys, quantize, out, reason):
    (tmp_path / "folder.safetensors").mkdir()
    err = refusal(capsys, folder, "--quantize", quantize, "--out", tmp_path / out)
    assert reason in err and [each.name for each in tmp_path.iterdir()] == ["folder.safetensors"]


def test_a_kept_model_is_not_quantized_again(kept, tmp_path, capsys):
    for quantize, name in (("int8", "again.safetensors"), ("q8_0", "again.gguf")):
        err = refusal(capsys, kept, "--quantize", quantize, "--out", tmp_path / name)
        assert "is quantized already, as int4" in err
    with pytest.raises(InputError, match="is quantized already, as int4"):
        LLM(kept, quantize="int4")


# ---- what is wrong with a file ---------------------------------------------------------------


def read_parts(path):
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


def write_parts(path, header, arrays):
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + arrays)
    return path


def load_all(path):
    """Everything that LLM reads of a file."""
    file = QuantizedFile(resolve(path))
    inventory = Inventory(file.config)
    for arguments in inventory.tensors:
        file.tensor(*arguments)
    for arguments in inventory.matrices:
        file.matrix(*arguments)
    file.tokenizer()


def assert_refused(path, reason=""):
    with pytest.raises(InputError) as caught:
        load_all(path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def metadata_changes():
    """(metadata key, function that changes its parsed value, words of the refusal)."""
    def set_to(*keys_and_value):
        *keys, last, value = keys_and_value

        def change(data):
            for key in keys:
                data = data[key]
            data[last] = value
        return change

    matrix = "model.layers.0.mlp.up_proj"
    yield "config", set_to("num_hidden_layers", 2), "array 'model.layers.2"
    yield "config", set_to("num_hidden_layers", 4), "layers.3.self_attn.qkv_proj' is None"
    yield "config", set_to("num_hidden_layers", 10**9), "more than there are in the file"
    yield "config", set_to("head_dim", 2**30), "more than there are in the file"
    yield "config", set_to("num_hidden_layers", 10**12), "num_hidden_layers is 1000000000000"
    yield "config", set_to("vocab_size", 258), "[257, 48], must be"
    yield "config", set_to("vocab_size", 257.0), "vocab_size is 257.0"
    yield "config", set_to("vocab_size", True), "vocab_size is True"
    yield "config", set_to("head_dim", -10), "head_dim is -10"
    yield "config", set_to("num_key_value_heads", 4), "no multiple of num_key_value_heads 4"
    yield "config", set_to("attention_bias", True), "qkv_proj.bias' is missing"
    yield "config", set_to("qk_norm", True), "q_norm.weight' is missing"
    yield "config", set_to("tie_word_embeddings", True), "array 'lm_head.q' is no part"
    yield "config", set_to("tie_word_embeddings", 1), "tie_word_embeddings is 1"
    yield "config", set_to("rms_norm_eps", float("nan")), "rms_norm_eps is nan"
    yield "config", set_to("rope_theta", "x"), "rope_theta is 'x'"
    yield "config", set_to("more", 1), "'more' is unknown"
    yield "config", set_to("rope_scaling", {}), "is missing in the configuration"
    yield "config", set_to("rope_scaling", []), "rope_scaling is []"
    yield "config", set_to("rope_scaling", {
        "rope_type": "yarn", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8}), "rope_type is 'yarn'"
    yield "matrices", set_to(matrix, "kind", "Int2"), "must be one of Dense, Int8, W8A8, Int4"
    yield "matrices", set_to(matrix, "kind", ["Int4"]), "must be one of"
    yield "matrices", set_to(matrix, "kind", "Int8"), "up_proj.q' is missing"
    yield "matrices", set_to(matrix, None), "must be one of"
    yield "matrices", set_to(matrix, "group_size", 0), "groups of 0, must be from 1 to 256"
    yield "matrices", set_to(matrix, "group_size", 2**31), "groups of 2147483648"
    yield "matrices", set_to(matrix, "group_size", "32"), "groups of '32'"
    yield "matrices", set_to(matrix, "group_size", 16), "up_proj.scale' is F16 [85, 2], must be"
    yield "tokenizer", set_to("tokens", None), "tokens is None in the tokenizer"
    yield "tokenizer", set_to("tokens", 3, 5), "tokens holds 5"
    yield "tokenizer", set_to("tokens", 3, "日"), "stands for no byte"
    yield "tokenizer", set_to("merges", [[0, 257]]), "merges holds [0, 257]"
    yield "tokenizer", set_to("merges", [[0, -1]]), "merges holds [0, -1]"
    yield "tokenizer", set_to("merges", [[0, 1]]), "a merge makes"
    yield "tokenizer", set_to("merges", [None]), "merges holds None"
    yield "tokenizer", set_to("added_tokens", [{"id": 1}]), "added_tokens holds {'id': 1}"
    yield "tokenizer", set_to("added_tokens", 0, "text", ""), "is empty"
    yield "tokenizer", set_to("family", "other"), "no pre-tokenizer 'other'"
    yield "tokenizer", set_to("bos_token_id", 257), "bos_token_id is 257"
    yield "tokenizer", set_to("add_bos_token", 1), "add_bos_token is 1"
    yield "tokenizer", lambda values: values.pop("family"), "family is None"
    yield "eos_token_ids", set_to(0, 257), "must be token ids from 0 to 256"
    yield "eos_token_ids", set_to(0, True), "must be token ids"


@pytest.mark.parametrize("key, change, reason", list(metadata_changes()))
def test_metadata_that_is_wrong(kept, tmp_path, key, change, reason):
    header, arrays = read_parts(kept)
    value = json.loads(header["__metadata__"][key])
    change(value)
    header["__metadata__"][key] = json.dumps(value)
    assert_refused(write_parts(tmp_path / "x.safetensors", header, arrays), reason)


@pytest.mark.parametrize("key", ["config", "eos_token_ids", "chat_template", "matrices",
                                 "tokenizer"])
@pytest.mark.parametrize("text, reason", [
    ("{", "is no valid JSON"), ("3", "is 3"), ("[" * 100_000, "is no valid JSON"),
    ("9" * 5000, "is no valid JSON"), ("", "has no metadata"), (None, "has no metadata"),
])
def test_metadata_that_is_no_json(kept, tmp_path, key, text, reason):
    header, arrays = read_parts(kept)
    header["__metadata__"][key] = text
    if text is None:
        del header["__metadata__"][key]
    assert_refused(write_parts(tmp_path / "x.safetensors", header, arrays), reason)


def test_arrays_that_are_wrong(kept, tmp_path):
    header, arrays = read_parts(kept)
    path = tmp_path / "x.safetensors"
    name = "model.layers.0.mlp.up_proj.scale"
    for key, value in (("dtype", "I16"), ("shape", [2, 85])):
        changed = copy.deepcopy(header)
        changed[name][key] = value
        assert_refused(write_parts(path, changed, arrays), f"array {name!r} is ")
    changed = {key if key != name else "other": value for key, value in header.items()}
    assert_refused(write_parts(path, changed, arrays), f"array {name!r} is missing")
    changed = copy.deepcopy(header)
    changed["more"] = {"dtype": "U8", "shape": [0], "data_offsets": 2 * [len(arrays)]}
    assert_refused(write_parts(path, changed, arrays), "array 'more' is no part of the model")
    changed["rope_freq_factors"] = changed.pop("more")
    assert_refused(write_parts(path, changed, arrays), "'rope_freq_factors' is U8 [0], must be")
    changed["rope_freq_factors"] = {"dtype": "F32", "shape": [5],
                                    "data_offsets": [len(arrays), len(arrays) + 20]}
    assert_refused(write_parts(path, changed, arrays + 20 * b"\0"), "must hold positive numbers")


def test_truncated_and_foreign_files(folder, kept, tmp_path):
    data, path = kept.read_bytes(), tmp_path / "x.safetensors"
    for size in (0, 4, 8, 100, 5000, len(data) - 1):
        path.write_bytes(data[:size])
        assert_refused(path, "is no whole safetensors file")
    path.write_bytes(data + b"\0")
    assert_refused(path, "is no whole safetensors file")
    assert_refused(folder / "model.safetensors", "was not written by minillm quantize; for the "
                   "weights of a Hugging Face model, give the folder that holds config.json")
    with pytest.raises(InputError, match="is no whole safetensors file"):
        QuantizedFile(tmp_path / "missing.safetensors")
    header, arrays = read_parts(kept)
    header["__metadata__"]["minillm_version"] = "2"
    assert_refused(write_parts(path, header, arrays), "is of version '2'")
    assert read_metadata(kept)["minillm_version"] == "1"


def leaves(value, path=()):
    """The paths of everything in parsed JSON."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from leaves(item, (*path, key))


ODD = [None, True, -1, 0, 1, 2**31, 2**64, -2**70, 0.5, 1e308, float("nan"), float("inf"), "",
       "x", "\ud800", [], {}, [[]], [None], "9" * 40, "I8", "F64", "W8A8", "Dense"]


@pytest.mark.parametrize("seed", range(5))
def test_mutated_headers_load_or_are_refused(kept, tmp_path, seed):
    """Any value of the header and of the JSON in it, replaced by something odd."""
    rng = random.Random(seed)
    header, arrays = read_parts(kept)
    metadata = header.pop("__metadata__")
    parsed = {key: json.loads(value) if value[:1] in "[{" else value
              for key, value in metadata.items()}
    whole = {"header": header, "metadata": parsed}
    by_part, loaded = {}, []
    for path in leaves(whole):
        if len(path) > 1:
            by_part.setdefault(path[:2] if path[0] == "metadata" else path[:1], []).append(path)
    for _ in range(60):
        changed = copy.deepcopy(whole)
        *keys, last = rng.choice(by_part[rng.choice(list(by_part))])
        target = changed
        for key in keys:
            target = target[key]
        target[last] = rng.choice(ODD)
        metadata = {key: value if isinstance(value, str) else json.dumps(value)
                    for key, value in changed["metadata"].items()}
        path = write_parts(tmp_path / "x.safetensors",
                           {"__metadata__": metadata, **changed["header"]}, arrays)
        loaded.append(load_or_refuse(path))
    assert loaded.count(False) > 30, "most of what is odd is refused"


@pytest.mark.parametrize("seed", range(5))
def test_mutated_bytes_load_or_are_refused(kept, tmp_path, seed):
    rng = random.Random(seed)
    original = kept.read_bytes()
    header_bytes = 8 + int.from_bytes(original[:8], "little")
    loaded = []
    for _ in range(60):
        data = bytearray(original)
        for _ in range(rng.choice([1, 1, 2, 8])):
            data[rng.randrange(rng.choice([16, header_bytes, len(data)]))] = rng.randrange(256)
        path = tmp_path / "x.safetensors"
        path.write_bytes(data)
        loaded.append(load_or_refuse(path))
    assert False in loaded and True in loaded, "a byte of the header matters, one of an array less"


def load_or_refuse(path):
    """True if the file loads, False if it is refused, in one line that names it."""
    try:
        load_all(path)
    except InputError as error:
        assert "\n" not in str(error) and str(path) in str(error)
        return False
    return True


def test_config_comes_back():
    fields = {**SIZES, "rms_norm_eps": 1e-05, "rope_theta": 10000, "rope_scaling": None,
              "tie_word_embeddings": False, "attention_bias": False, "attention_out_bias": False,
              "mlp_bias": False, "qk_norm": True}
    assert config_from_dict(fields).qk_norm and config_from_dict(fields).rope_theta == 10000


def test_the_tokenizer_is_that_of_the_library(folder, kept):
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("Grüße, 世界!", "a  b\n\t", "\x00\x7f"):
        assert QuantizedFile(kept).tokenizer().encode(text) == theirs.encode(text).ids
