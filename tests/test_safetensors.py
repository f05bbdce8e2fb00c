"""Hugging Face folders: every config field and every tensor as transformers wrote it, or a refusal.
"""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from checkpoints import ARCHITECTURES, SIZES, write_checkpoint

from minillm.config import RopeScaling
from minillm.errors import InputError
from minillm.loading.config_json import config_from_json
from minillm.loading.safetensors import HuggingFaceFolder, refuse_pickle

LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def assert_same_tensors(checkpoint, model):
    """Every tensor of the checkpoint is exactly the model's, and is a float32 array."""
    state = model.state_dict()
    assert len(state) > 20
    for name, expected in state.items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue  # not stored: it is model.embed_tokens.weight
        array = checkpoint.tensor(name, tuple(expected.shape))
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected.float().numpy(), err_msg=name)


def assert_refused(message, function, *arguments):
    """InputError, on one line, matching the pattern."""
    with pytest.raises(InputError, match=message) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)


# ── What transformers writes, we read ────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_and_tensors(tmp_path, architecture, dtype):
    model = write_checkpoint(tmp_path, architecture, dtype=dtype, rms_norm_eps=3e-5)
    checkpoint = HuggingFaceFolder(tmp_path)
    for key, value in SIZES.items():
        assert getattr(checkpoint.config, key) == value
    assert checkpoint.config.rms_norm_eps == 3e-5
    assert checkpoint.config.rope_theta == 10000.0
    assert checkpoint.config.rope_scaling is None and checkpoint.rope_freq_factors is None
    assert checkpoint.config.qk_norm == (architecture == "Qwen3ForCausalLM")
    assert checkpoint.config.attention_bias == (architecture == "Qwen2ForCausalLM")
    assert_same_tensors(checkpoint, model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_output_head(tmp_path, architecture, tied):
    model = write_checkpoint(tmp_path, architecture, tie_word_embeddings=tied)
    checkpoint = HuggingFaceFolder(tmp_path)
    assert checkpoint.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in checkpoint) == (not tied)
    assert_same_tensors(checkpoint, model)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_config_says_which_biases_and_norms_exist(tmp_path, architecture):
    """`attention_bias` and `mlp_bias` are set for all; each class does with them what it does."""
    write_checkpoint(tmp_path, architecture, attention_bias=True, mlp_bias=True)
    checkpoint = HuggingFaceFolder(tmp_path)
    config, layer = checkpoint.config, "model.layers.1."
    for name in ("q_proj", "k_proj", "v_proj"):
        assert config.attention_bias == (f"{layer}self_attn.{name}.bias" in checkpoint)
    assert config.attention_out_bias == (f"{layer}self_attn.o_proj.bias" in checkpoint)
    for name in ("gate_proj", "up_proj", "down_proj"):
        assert config.mlp_bias == (f"{layer}mlp.{name}.bias" in checkpoint)
    for name in ("q_norm", "k_norm"):
        assert config.qk_norm == (f"{layer}self_attn.{name}.weight" in checkpoint)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_transformers(architecture):
    """A config.json without optional keys; 64 heads, because Qwen's classes assume 32 of K."""
    sizes = {"vocab_size": 130, "hidden_size": 128, "intermediate_size": 84,
             "num_hidden_layers": 3, "num_attention_heads": 64}
    extra = {"sliding_window": None} if architecture == "MistralForCausalLM" else {}
    config = config_from_json({"architectures": [architecture], **sizes, **extra})
    reference = getattr(transformers, architecture).config_class(**sizes, **extra)
    for key in ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps",
                "tie_word_embeddings"):
        assert getattr(config, key) == getattr(reference, key), key
    assert config.head_dim == getattr(reference, "head_dim", 128 // 64)
    assert config.rope_theta == reference.rope_parameters["rope_theta"]
    assert config.rope_scaling is None


def test_null_head_counts_mean_the_obvious(config_json):
    config = config_from_json({**config_json, "num_key_value_heads": None, "head_dim": None})
    assert (config.num_key_value_heads, config.head_dim) == (6, 48 // 6)


@pytest.mark.parametrize("rope, scaling", [
    ({"rope_type": "default", "rope_theta": 2e4}, None),
    ({"rope_type": "linear", "rope_theta": 2e4, "factor": 4.0}, RopeScaling("linear", 4.0)),
    ({**LLAMA3, "rope_theta": 2e4}, RopeScaling("llama3", 8.0, 1.0, 4.0, 64)),
])
def test_rope_entry_of_transformers_5_and_before(tmp_path, config_json, rope, scaling):
    write_checkpoint(tmp_path, "LlamaForCausalLM", rope_parameters=dict(rope))
    new = HuggingFaceFolder(tmp_path).config
    del config_json["rope_parameters"]
    old_rope = {key: value for key, value in rope.items() if key != "rope_theta"}
    old = config_from_json({**config_json, "rope_theta": 20000, "rope_scaling": old_rope})
    old_rope["type"] = old_rope.pop("rope_type")
    oldest = config_from_json({**config_json, "rope_theta": 20000, "rope_scaling": old_rope})
    assert new.rope_scaling == old.rope_scaling == oldest.rope_scaling == scaling
    assert new.rope_theta == old.rope_theta == oldest.rope_theta == 20000.0


@pytest.mark.parametrize("entries", [
    {"rope_parameters": {"rope_theta": 2e4}, "rope_theta": 3e4},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0}, "rope_scaling": None},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 2e4},
     "rope_scaling": {"type": "linear", "factor": 3.0}},
    {"rope_scaling": LLAMA3, "original_max_position_embeddings": 32},
    {"rope_scaling": {key: value for key, value in LLAMA3.items() if key[0] != "o"}},
])
def test_rope_entries_that_disagree_are_read_as_transformers_reads_them(config_json, entries):
    reference = transformers.LlamaConfig(**SIZES, **copy.deepcopy(entries))
    reference.standardize_rope_params()
    expected = reference.rope_parameters
    del config_json["rope_parameters"]
    config = config_from_json({**config_json, **entries})
    assert config.rope_theta == expected["rope_theta"]
    for key in set(expected) - {"rope_theta", "type"}:
        assert getattr(config.rope_scaling, key, "default") == expected[key]


def test_shards(tmp_path):
    model = write_checkpoint(tmp_path, "LlamaForCausalLM", dtype="bfloat16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(HuggingFaceFolder(tmp_path), model)


def test_shards_that_are_links_as_in_the_cache_of_the_hub(tmp_path):
    model = write_checkpoint(tmp_path / "blobs", "LlamaForCausalLM", max_shard_size="20KB")
    (tmp_path / "snapshot").mkdir()
    for file in (tmp_path / "blobs").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert_same_tensors(HuggingFaceFolder(tmp_path / "snapshot"), model)


def test_bfloat16_is_read_bit_for_bit(folder):
    """All 65536 bfloat16 numbers, infinities and NaNs included, against torch's conversion."""
    bits = np.arange(65536, dtype=np.uint16)
    write_header(folder, {"x": {"dtype": "BF16", "shape": [65536], "data_offsets": [0, 131072]}},
                 bits.tobytes())
    expected = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    got = HuggingFaceFolder(folder).tensor("x", (65536,))
    np.testing.assert_array_equal(got.view(np.uint32), expected.view(np.uint32))


def test_torch_is_not_imported(tmp_path):
    write_checkpoint(tmp_path, "Qwen3ForCausalLM", dtype="bfloat16")
    code = ("import sys; from minillm.loading.safetensors import HuggingFaceFolder; "
            "HuggingFaceFolder(sys.argv[1]).tensor('model.embed_tokens.weight', (130, 48)); "
            # Not "torch": a module that is yet to be loaded lazily has its name there already.
            "print(sorted({'torch._C', 'transformers', 'tokenizers'} & set(sys.modules)))")
    shown = subprocess.run([sys.executable, "-c", code, tmp_path], check=False, text=True,
                           capture_output=True, cwd=Path(__file__).parents[1])
    assert shown.stdout.strip() == "[]", shown.stderr


# ── config.json: what is refused ─────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A sound checkpoint; tests that break something break a copy."""
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder, "LlamaForCausalLM", num_hidden_layers=2)
    return folder


@pytest.fixture
def config_json(llama):
    return json.loads((llama / "config.json").read_text())


REFUSED = [
    ({"architectures": ["GemmaForCausalLM"]}, "GemmaForCausalLM.*Llama.*Mistral.*Qwen2.*Qwen3"),
    ({"architectures": None}, "architectures is None"),
    ({"architectures": "LlamaForCausalLM"}, "architectures is 'Llama"),
    ({"architectures": [{}, []]}, "architectures is"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "'gptq'.*dense"),
    ({"quantization_config": "fp8"}, "quantization_config.*dense"),
    ({"hidden_size": "48"}, "hidden_size is '48'"),
    ({"hidden_size": True}, "hidden_size is True"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0"),
    ({"vocab_size": 0}, "vocab_size is 0"),
    ({"vocab_size": None}, "vocab_size is None"),
    ({"num_hidden_layers": 10**4000}, "num_hidden_layers is 1000"),
    ({"intermediate_size": -1}, "intermediate_size is -1"),
    ({"max_position_embeddings": 2**40}, "max_position_embeddings is 1099511627776"),
    ({"num_key_value_heads": 4}, "num_attention_heads 6.*num_key_value_heads 4"),
    ({"head_dim": 9}, "head_dim 9 is odd"),
    ({"head_dim": None, "num_attention_heads": 60}, "head_dim is 0"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
    ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
    ({"attention_bias": 1}, "attention_bias is 1"),
    ({"mlp_bias": None}, "mlp_bias is None"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta is inf"),
    ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta is 1000"),
    ({"rope_parameters": {"rope_theta": [1]}}, r"rope_theta is \[1\]"),
    ({"rope_parameters": "linear"}, "rope_parameters is 'linear'"),
    ({"rope_scaling": ["linear"]}, "rope_scaling is"),
    ({"rope_scaling": {"type": "linear"}}, "factor is missing"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, "factor is 0.5"),
    ({"rope_scaling": {"factor": 4.0}}, "'factor' is no parameter of rope_type 'default'"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "'full_attention' is no param"),
    ({"rope_scaling": {"rope_type": ["linear"]}}, r"rope_type is \['linear'\]"),
    ({"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor 1.0.*greater"),
    ({"rope_scaling": {**LLAMA3, "original_max_position_embeddings": "8k"}}, "original_max.*'8k'"),
] + [({"rope_scaling": {"rope_type": kind, "factor": 4.0}}, f"rope_type is '{kind}'.*linear")
     for kind in ("dynamic", "yarn", "longrope", "mrope")]


@pytest.mark.parametrize("change, message", REFUSED)
def test_refused_config(config_json, change, message):
    assert config_from_json(config_json).num_hidden_layers == 2
    assert_refused(message, config_from_json, {**config_json, **change})


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "intermediate_size",
                                 "num_hidden_layers", "num_attention_heads", "architectures"])
def test_missing_key(config_json, key):
    del config_json[key]
    assert_refused(key, config_from_json, config_json)


QWENS = ("Qwen2ForCausalLM", "Qwen3ForCausalLM")
SLIDING = {"use_sliding_window": True, "sliding_window": 64}


@pytest.mark.parametrize("architectures, change, message", [
    (["MistralForCausalLM"], {"sliding_window": 64}, "sliding_window 64.*256"),
    (["MistralForCausalLM"], {"max_position_embeddings": 8192}, "sliding_window 4096.*8192"),
    (["MistralForCausalLM"], {"sliding_window": "64"}, "sliding_window is '64'"),
    (QWENS, {**SLIDING, "max_window_layers": 1}, "sliding_window 64.*256"),
    (QWENS, {**SLIDING, "max_window_layers": 0}, "sliding_window 64.*256"),
    (QWENS, {**SLIDING, "layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
    (QWENS, {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types.*chunked"),
    (QWENS, {"layer_types": 3}, "layer_types is 3"),
    (QWENS, {"use_sliding_window": "yes"}, "use_sliding_window is 'yes'"),
])
def test_refused_sliding_window(config_json, architectures, change, message):
    for architecture in architectures:
        config = {**config_json, "architectures": [architecture], **change}
        assert_refused(message, config_from_json, config)


@pytest.mark.parametrize("architectures, change", [
    (["LlamaForCausalLM"], {"sliding_window": 64}),  # transformers' Llama does not look at it
    (["MistralForCausalLM"], {"sliding_window": None}),
    (["MistralForCausalLM"], {"sliding_window": 256}),
    (QWENS, {"use_sliding_window": False, "sliding_window": 64}),
    (QWENS, {**SLIDING, "max_window_layers": 2}),
    (QWENS, {**SLIDING, "sliding_window": 256, "layer_types": ["sliding_attention"] * 2}),
    (QWENS, {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
])
def test_sliding_window_that_hides_nothing(config_json, architectures, change):
    for architecture in architectures:
        config_from_json({**config_json, "architectures": [architecture], **change})


# ── Files: what is refused ───────────────────────────────────────────────────────────────────


def write_header(folder, header, data=b"\0" * 16):
    """A model.safetensors whose header is `header` (text or object), sound or not."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture
def folder(tmp_path, llama):
    """A copy of the sound checkpoint, to be broken."""
    for file in llama.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    write_checkpoint(tmp_path, "LlamaForCausalLM", max_shard_size="20KB", num_hidden_layers=2)
    return tmp_path


def test_not_a_folder(tmp_path):
    assert_refused("none is not a folder.*config.json", HuggingFaceFolder, tmp_path / "none")
    (tmp_path / "model.safetensors").touch()
    assert_refused("not a folder", HuggingFaceFolder, tmp_path / "model.safetensors")


def test_missing_files(folder):
    (folder / "config.json").rename(folder / "away")
    assert_refused("has no config.json", HuggingFaceFolder, str(folder))
    (folder / "away").rename(folder / "config.json")
    (folder / "model.safetensors").unlink()
    assert_refused("has no model.safetensors and no model.safetensors.index.json",
                   HuggingFaceFolder, folder)
    for file in folder.iterdir():
        file.unlink()
    assert_refused("has no model.safetensors", HuggingFaceFolder, folder)


class Trap:
    """A pickle that raises when it is opened."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was opened",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin",
                                  "model.pt", "model.pth", "last.CKPT", "consolidated.00.pth"])
def test_pickles_are_never_opened(folder, name):
    (folder / name).write_bytes(pickle.dumps(Trap()))
    HuggingFaceFolder(folder)  # safetensors stand beside it
    (folder / "model.safetensors").unlink()
    assert_refused(f"{name} is a pickle.*run any code.*convert", HuggingFaceFolder, folder)
    assert_refused(f"{name} is a pickle", HuggingFaceFolder, folder / name)
    assert_refused(f"{name} is a pickle", refuse_pickle, folder / name)
    refuse_pickle(folder / "model.safetensors")


@pytest.mark.parametrize("content, message", [
    ("", "no valid JSON"), ("{", "no valid JSON"), ("[1]", "holds list"), ("3", "holds int"),
    ("[" * 100_000, "no valid JSON"), ('{"a": ' + "9" * 5000 + "}", "no valid JSON"),
    (b"\xff\xfe{}", "cannot be read as UTF-8"), ("{}", "architectures is None"),
])
def test_broken_config_json(folder, content, message):
    content = content if isinstance(content, bytes) else content.encode()
    (folder / "config.json").write_bytes(content)
    assert_refused(f"config.json.*{message}", HuggingFaceFolder, folder)


@pytest.mark.parametrize("cut", [
    lambda raw: b"", lambda raw: raw[:7], lambda raw: raw[:100], lambda raw: raw[:-1],
    lambda raw: raw + b"\0", lambda raw: b"\xff" * 8 + raw[8:], lambda raw: b"<html>" * 1000,
    lambda raw: b"version https://git-lfs.github.com/spec/v1\n",
])
def test_truncated_or_foreign_file(folder, cut):
    file = folder / "model.safetensors"
    file.write_bytes(cut(file.read_bytes()))
    assert_refused("model.safetensors is no whole safetensors file", HuggingFaceFolder, folder)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize("header", [
    {"x": {**F32, "data_offsets": [0, 32]}},  # beyond the file
    {"x": {**F32, "data_offsets": [16, 0]}},
    {"x": {**F32, "data_offsets": [-16, 0]}},
    {"x": {**F32, "shape": [2, 3]}},  # more than its bytes
    {"x": {**F32, "shape": [2**32, 2**32]}},  # the product overflows
    {"x": {**F32, "shape": [2**64, 1]}},
    {"x": {**F32, "shape": [-2, -2]}},
    {"x": {**F32, "dtype": "Q4_K"}},
    {"x": F32, "y": F32},  # two tensors on the same bytes
    '{"x": %s, "x": %s}' % ((json.dumps({**F32, "data_offsets": [0, 8], "shape": [2]}),) * 2),
    {"x": {"dtype": "F32", "shape": [2, 2]}},
    "[]", "null", "{", "\x00" * 16,
])
def test_malformed_header(folder, header):
    write_header(folder, {"x": F32})
    assert HuggingFaceFolder(folder).tensor("x", (2, 2)).sum() == 0  # the sound form is read
    write_header(folder, header)
    assert_refused("model.safetensors is no whole safetensors file", HuggingFaceFolder, folder)


def test_header_of_any_length_is_read(folder):
    """Nothing aligns the data of a foreign writer: offsets are odd here."""
    numbers = np.arange(4, dtype=np.float32)
    for padding in range(8):
        write_header(folder, json.dumps({"x": F32}) + " " * padding, numbers.tobytes())
        array = HuggingFaceFolder(folder).tensor("x", (2, 2))
        np.testing.assert_array_equal(array.ravel(), numbers)
        assert array.flags.aligned and array.flags.writeable


def test_wrong_shape_and_missing_tensor(llama):
    checkpoint = HuggingFaceFolder(llama)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert_refused(rf"model.safetensors.*'{name}' has shape \[60, 48\].*\[48, 60\]",
                   checkpoint.tensor, name, (48, 60))
    assert_refused("no tensor 'model.layers.9.x'", checkpoint.tensor, "model.layers.9.x", (1,))
    assert name in checkpoint and "model.layers.9.x" not in checkpoint


@pytest.mark.parametrize("dtype, width", [
    ("I8", 1), ("U8", 1), ("BOOL", 1), ("F8_E4M3", 1), ("F8_E5M2", 1), ("I32", 4), ("F64", 8)])
def test_refused_dtype(folder, dtype, width):
    write_header(folder, {"x": {"dtype": dtype, "shape": [16 // width], "data_offsets": [0, 16]}})
    assert_refused(f"'x' is {dtype}, supported are F32, F16, BF16",
                   HuggingFaceFolder(folder).tensor, "x", (16 // width,))


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("escape", ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors",
                                    "..", "", "pytorch_model.bin", "x.safetensors/"])
def test_index_that_leaves_the_folder(sharded, escape):
    edit_json(sharded / "model.safetensors.index.json", weight_map={"x": escape})
    assert_refused("index.json: weight_map names", HuggingFaceFolder, sharded)


def test_broken_index(sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    shard = weight_map["model.norm.weight"]
    edit_json(index, weight_map={**weight_map, "model.extra": shard})
    assert_refused(f"{shard} has no tensor 'model.extra'", HuggingFaceFolder, sharded)
    for bad in (None, [shard], {"model.norm.weight": 1}):
        edit_json(index, weight_map=bad)
        assert_refused("weight_map must be an object", HuggingFaceFolder, sharded)
    index.write_text("{")
    assert_refused("index.json is no valid JSON", HuggingFaceFolder, sharded)


def test_missing_and_truncated_shard(sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert_refused(f"{shard.name} is no whole safetensors file", HuggingFaceFolder, sharded)
    shard.unlink()
    assert_refused(f"{shard.name} is missing", HuggingFaceFolder, sharded)


# ── What stands beside the weights ───────────────────────────────────────────────────────────


def test_tokenizer(folder):
    assert_refused("has no tokenizer.json", HuggingFaceFolder(folder).tokenizer)
    oracle = tokenizers.ByteLevelBPETokenizer()
    oracle.train_from_iterator(["to be or not to be, that is the question"] * 9, vocab_size=280)
    oracle.save(str(folder / "tokenizer.json"))
    text = "that is not to be"
    assert HuggingFaceFolder(folder).tokenizer().encode(text) == oracle.encode(text).ids


@pytest.mark.parametrize("entry, expected", [
    ("{{ old }}", "{{ old }}"), (None, None), ([], None),
    ([{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}], "D"),
    ([{"name": "tool_use", "template": "T"}, "odd"], None),
])
def test_chat_template(folder, entry, expected):
    assert HuggingFaceFolder(folder).chat_template is None
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert HuggingFaceFolder(folder).chat_template == expected
    (folder / "chat_template.jinja").write_text("{{ new }} é\n", encoding="utf-8")
    assert HuggingFaceFolder(folder).chat_template == "{{ new }} é\n"


@pytest.mark.parametrize("entry", [3, {"default": "x"}, [{"name": "default", "template": 3}]])
def test_refused_chat_template(folder, entry):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: chat_template"):
        _ = HuggingFaceFolder(folder).chat_template


def test_eos_token_ids(folder):
    generation = folder / "generation_config.json"
    generation.write_text('{"eos_token_id": [5, 7]}')
    assert HuggingFaceFolder(folder).eos_token_ids == (5, 7)
    generation.write_text('{"eos_token_id": 0}')
    assert HuggingFaceFolder(folder).eos_token_ids == (0,)
    edit_json(folder / "config.json", eos_token_id=[2, 3])
    generation.write_text("{}")
    assert HuggingFaceFolder(folder).eos_token_ids == (2, 3)
    generation.unlink()
    edit_json(folder / "config.json", eos_token_id=None)
    assert HuggingFaceFolder(folder).eos_token_ids == ()
    for bad in ("</s>", [2, "3"], -1, True):
        edit_json(folder / "config.json", eos_token_id=bad)
        with pytest.raises(InputError, match=r"config\.json: eos_token_id"):
            _ = HuggingFaceFolder(folder).eos_token_ids
