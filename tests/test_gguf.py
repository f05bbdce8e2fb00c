"""A .gguf file gives the configuration and the tensors of the model that it was made from."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoints import write_checkpoint
from gguf import MODEL_ARCH, GGMLQuantizationType

from minillm.config import RopeScaling
from minillm.errors import InputError
from minillm.loading.gguf import GGUFFile
from minillm.loading.safetensors import HuggingFaceFolder

EPS = 2**-20  # keys are float32: a number that survives that
SIZES = {"hidden_size": 96, "rms_norm_eps": EPS, "rope_theta": 50000.0}  # 3 blocks of 32 a row
ARCHITECTURES = {
    "LlamaForCausalLM": MODEL_ARCH.LLAMA, "MistralForCausalLM": MODEL_ARCH.LLAMA,
    "Qwen2ForCausalLM": MODEL_ARCH.QWEN2, "Qwen3ForCausalLM": MODEL_ARCH.QWEN3,
}


def llama_cpp_row_order(weights, heads):
    """The permutation of llama.cpp's convert_hf_to_gguf.py."""
    halves = weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(weights.shape))


def write_gguf(path, model, keys=(), formats=(), extra_tensors=()):
    """Convert a transformers model as llama.cpp does.

    keys: metadata that is added, replaced, or with None left out
    formats: the block format of tensors whose Hugging Face name ends like this
    """
    config = model.config
    architecture = ARCHITECTURES[type(model).__name__]
    prefix = gguf.MODEL_ARCH_NAMES[architecture]
    metadata = {
        f"{prefix}.block_count": config.num_hidden_layers,
        f"{prefix}.context_length": config.max_position_embeddings,
        f"{prefix}.embedding_length": config.hidden_size,
        f"{prefix}.feed_forward_length": config.intermediate_size,
        f"{prefix}.attention.head_count": config.num_attention_heads,
        f"{prefix}.attention.head_count_kv": config.num_key_value_heads,
        f"{prefix}.attention.key_length": config.head_dim,
        f"{prefix}.attention.value_length": config.head_dim,
        f"{prefix}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{prefix}.rope.dimension_count": config.head_dim,
        f"{prefix}.rope.freq_base": config.rope_parameters["rope_theta"],
        "tokenizer.ggml.eos_token_id": 2,
    } | dict(keys)

    writer = gguf.GGUFWriter(path, metadata.pop("general.architecture", prefix))
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
           bool: writer.add_bool, list: writer.add_array}
    for key, value in metadata.items():
        if value is not None:
            add[type(value)](key, value)

    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weights = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        part = name.split(".")[-2]
        if architecture == MODEL_ARCH.LLAMA and part in heads:
            weights = llama_cpp_row_order(weights, heads[part])
        block_format = dict(formats).get(part, GGMLQuantizationType.F32)
        if weights.ndim == 2:
            weights = gguf.quants.quantize(weights, block_format)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), weights,
                          raw_dtype=block_format if weights.ndim == 2 else None)
    for name, weights in dict(extra_tensors).items():
        writer.add_tensor(name, weights)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "LlamaForCausalLM", **SIZES)


@pytest.mark.parametrize("overrides", [
    {"architecture": "LlamaForCausalLM"},
    {"architecture": "LlamaForCausalLM", "attention_bias": True, "mlp_bias": True},
    {"architecture": "LlamaForCausalLM", "tie_word_embeddings": True},
    {"architecture": "MistralForCausalLM", "sliding_window": None},
    {"architecture": "Qwen2ForCausalLM", "head_dim": 16},
    {"architecture": "Qwen3ForCausalLM", "tie_word_embeddings": True},
], ids=lambda overrides: "-".join(str(value) for value in overrides.values()))
def test_file_gives_the_model_it_was_made_from(tmp_path, overrides):
    model = write_checkpoint(tmp_path, **SIZES, **overrides)
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", model))
    assert file.config == HuggingFaceFolder(tmp_path).config
    assert file.rope_freq_factors is None and file.chat_template is None
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            assert name not in file
            continue
        assert name in file
        np.testing.assert_array_equal(file.tensor(name, tensor.shape), tensor, strict=True)


def test_quantized_file_agrees_with_transformers(tmp_path, llama):
    formats = {"q_proj": GGMLQuantizationType.Q8_0, "k_proj": GGMLQuantizationType.Q4_1,
               "v_proj": GGMLQuantizationType.Q4_0, "embed_tokens": GGMLQuantizationType.F16,
               "gate_proj": GGMLQuantizationType.BF16, "up_proj": GGMLQuantizationType.Q5_1}
    tokenizer = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.merges": ["a b"],
                 "tokenizer.ggml.tokens": [f"t{i}" for i in range(llama.config.vocab_size)]}
    path = write_gguf(tmp_path / "model.gguf", llama, tokenizer, formats)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32)
    file = GGUFFile(path)
    for name, tensor in theirs.state_dict().items():
        np.testing.assert_array_equal(file.tensor(name, tensor.shape), tensor, strict=True)
    block_format, raw = file.blocks("model.layers.1.self_attn.k_proj.weight")
    assert block_format == GGMLQuantizationType.Q4_1
    assert raw.shape == (20, 3 * 20) and raw.dtype == np.uint8


def test_default_model(model_path):
    file = GGUFFile(model_path)
    config = file.config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (49152, 576, 1536)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (30, 8192)
    heads = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    assert heads == (9, 3, 64)
    assert config.rope_theta == 100000 and config.tie_word_embeddings
    assert file.eos_token_ids == (2,) and file.chat_template.startswith("{% for message")
    assert file.tensor("model.layers.29.self_attn.k_proj.weight", (192, 576)).shape == (192, 576)
    assert file.tokenizer().vocab_size == 49152


@pytest.mark.parametrize("keys, config", [
    ({"llama.rope.freq_base": None}, {"rope_theta": 10000.0}),
    ({"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0}, {"rope_scaling": None}),
    ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
     {"rope_scaling": RopeScaling("linear", 4.0)}),
    ({"llama.rope.scale_linear": 2.0}, {"rope_scaling": RopeScaling("linear", 2.0)}),
    ({"llama.attention.sliding_window": 256, "llama.expert_count": 0}, {}),
    ({"llama.rope.dimension_count": None}, {"head_dim": 10}),
])
def test_keys_that_are_supported(tmp_path, llama, keys, config):
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", llama, keys))
    for name, value in config.items():
        assert getattr(file.config, name) == value


def test_head_dim_and_kv_heads_have_defaults(tmp_path):
    model = write_checkpoint(tmp_path, "LlamaForCausalLM", **SIZES, head_dim=16,
                             num_key_value_heads=6)
    keys = dict.fromkeys(["llama.attention.key_length", "llama.attention.value_length",
                          "llama.attention.head_count_kv"])
    config = GGUFFile(write_gguf(tmp_path / "model.gguf", model, keys)).config
    assert (config.head_dim, config.num_key_value_heads) == (16, 6)


def test_end_of_turn_is_an_end_too(tmp_path, llama):
    keys = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.chat_template": "{{ messages }}"}
    file = GGUFFile(write_gguf(tmp_path / "model.gguf", llama, keys))
    assert file.eos_token_ids == (2, 5) and file.chat_template == "{{ messages }}"
    keys = {"tokenizer.ggml.eos_token_id": None}
    assert GGUFFile(write_gguf(tmp_path / "none.gguf", llama, keys)).eos_token_ids == ()


def test_rope_freq_factors(tmp_path, llama):
    factors = np.array([1, 1, 2.5, 8, 8], np.float32)  # D/2 of them
    path = write_gguf(tmp_path / "model.gguf", llama, extra_tensors={"rope_freqs.weight": factors})
    assert np.array_equal(GGUFFile(path).rope_freq_factors, factors)
    for wrong in [factors[:4], -factors, factors * np.nan]:
        path = write_gguf(tmp_path / "wrong.gguf", llama,
                          extra_tensors={"rope_freqs.weight": wrong})
        with pytest.raises(InputError, match=r"rope_freqs\.weight"):
            GGUFFile(path)


@pytest.mark.parametrize("keys, reason", [
    ({"general.architecture": "gemma3"}, "general.architecture is 'gemma3', supported are llama"),
    ({"split.count": 3}, "one of 3 parts"),
    ({"llama.block_count": None}, "llama.block_count is missing"),
    ({"llama.attention.layer_norm_rms_epsilon": None}, "layer_norm_rms_epsilon is missing"),
    ({"llama.embedding_length": "96"}, "llama.embedding_length is '96'"),
    ({"llama.context_length": True}, "llama.context_length is True"),
    ({"llama.attention.head_count": [6, 6, 6]}, r"head_count is \[6, 6, 6\]"),
    ({"llama.attention.head_count": 0}, "head_count is 0, must be .* from 1"),
    ({"llama.attention.head_count_kv": 4}, "no multiple"),
    ({"llama.attention.key_length": 9, "llama.attention.value_length": 9,
      "llama.rope.dimension_count": 9}, "head_dim 9 is odd"),
    ({"llama.rope.freq_base": float("nan")}, "freq_base is nan"),
    ({"llama.rope.scaling.type": "yarn"}, "scaling.type is 'yarn'"),
    ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
    ({"llama.rope.dimension_count": 8}, "dimension_count is 8, must be the head dimension 10"),
    ({"llama.attention.value_length": 8}, "value_length is 8"),
    ({"llama.expert_count": 8}, "llama.expert_count is 8"),
    ({"llama.attention.sliding_window": 255}, "sliding_window 255"),
    ({"llama.block_count": 2}, "block_count is 2, but there are tensors of block 2"),
    ({"tokenizer.ggml.eos_token_id": 130}, "eos_token_id is 130, must be .* from 0 to 129"),
    ({"tokenizer.chat_template": 1}, "chat_template is 1"),
])
def test_keys_that_are_refused(tmp_path, llama, keys, reason):
    path = write_gguf(tmp_path / "model.gguf", llama, keys)
    with pytest.raises(InputError, match=reason) as error:
        GGUFFile(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["blk.0.ffn_gate_inp.weight", "blk.0.attn_norm.bias",
                                  "blk.0.attn_q_norm.weight", "blk.00.ffn_up.weight"])
def test_tensor_that_no_llama_has_is_refused(tmp_path, llama, name):
    path = write_gguf(tmp_path / "model.gguf", llama, extra_tensors={name: np.zeros(4, "f4")})
    with pytest.raises(InputError, match=name):
        GGUFFile(path)


def test_tensors_that_are_missing_or_wrong(tmp_path, llama):
    path = write_gguf(tmp_path / "model.gguf", llama, {"llama.attention.head_count_kv": 3})
    file = GGUFFile(path)
    for name, shape, reason in [
        ("model.layers.3.mlp.up_proj.weight", (84, 96), "has no tensor 'model.layers.3.mlp.up"),
        ("model.layers.0.mlp.up_proj.weight", (96, 84), r"shape \[84, 96\], .* imply \[96, 84\]"),
        ("model.layers.0.self_attn.k_proj.weight", (30, 96), "must have 30 separate rows"),
    ]:
        with pytest.raises(InputError, match=reason) as error:
            file.tensor(name, shape)
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_random_damage_is_harmless(tmp_path, llama):
    """A file with broken keys and tables gives tensors or an InputError, and nothing else."""
    path = write_gguf(tmp_path / "model.gguf", llama)
    content = path.read_bytes()
    rng = random.Random(0)
    outcomes = []
    for _ in range(600):
        damaged = bytearray(content)
        damaged[rng.randrange(3000)] = rng.choice([0, 1, 255, rng.randrange(256)])
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            for name, tensor in llama.state_dict().items():
                assert file.tensor(name, tensor.shape).shape == tensor.shape
            outcomes.append("loaded")
        except InputError:
            outcomes.append("refused")
    assert min(outcomes.count("loaded"), outcomes.count("refused")) > 20
