"""What do a GGUF file's keys say? They are turned into a ModelConfig, or refused by name.

    general.architecture = "llama"       its name begins the keys that describe the model:
    llama.block_count = 30
    tokenizer.ggml.eos_token_id = 2      these describe the tokenizer

The authority is llama.cpp: every default below is what it assumes for a key that is left out. Some
answers are in no key but in the tensors: how large the vocabulary is, whether the output head is
the embedding again, whether the projections carry biases.

Chapter 05_model tells the story of loading. Left out on purpose, and refused: architectures other
than these three, mixtures of experts, YaRN and its relatives, sliding windows, half rotated heads.
"""

from __future__ import annotations

from ..config import ModelConfig, RopeScaling
from ..errors import InputError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # Mistral's files say llama
LARGEST_SIZE = 2**31 - 1


def architecture_from_gguf(metadata: dict) -> str:
    architecture = _text(metadata, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(f"general.architecture is {architecture!r:.80}, supported are "
                         f"{', '.join(ARCHITECTURES)}: use a model of one of them")
    num_parts = _size(metadata, "split.count", 1, least=0)
    if num_parts > 1:
        raise InputError(f"is one of {num_parts} parts of a model, must be whole: join them with "
                         "llama-gguf-split --merge")
    return architecture


def config_from_gguf(metadata: dict, shapes: dict[str, tuple[int, ...]]) -> ModelConfig:
    """The ModelConfig of a file with these keys, and these tensors by Hugging Face's names."""
    architecture = architecture_from_gguf(metadata)
    hidden_size = _size(metadata, f"{architecture}.embedding_length")
    heads = _size(metadata, f"{architecture}.attention.head_count")
    context = _size(metadata, f"{architecture}.context_length")
    head_dim = _size(metadata, f"{architecture}.attention.key_length", hidden_size // heads)
    _refuse_other_models(metadata, architecture, head_dim, context)
    if len(shapes.get("model.embed_tokens.weight", ())) != 2:
        raise InputError("has no two-dimensional tensor 'token_embd.weight': get the file again")

    def any_bias(*projections):
        return any(name.endswith(f"{projection}.bias")
                   for name in shapes for projection in projections)

    return ModelConfig(
        vocab_size=shapes["model.embed_tokens.weight"][0],
        hidden_size=hidden_size,
        intermediate_size=_size(metadata, f"{architecture}.feed_forward_length"),
        num_hidden_layers=_size(metadata, f"{architecture}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=_size(metadata, f"{architecture}.attention.head_count_kv", heads),
        head_dim=head_dim,
        rms_norm_eps=_number(metadata, f"{architecture}.attention.layer_norm_rms_epsilon",
                             least=1e-12, most=1.0),
        rope_theta=_number(metadata, f"{architecture}.rope.freq_base", 10000.0, least=1.0),
        rope_scaling=_rope_scaling(metadata, architecture),
        max_position_embeddings=context,
        tie_word_embeddings="lm_head.weight" not in shapes,
        attention_bias=architecture == "qwen2" or any_bias("q_proj", "k_proj", "v_proj"),
        attention_out_bias=any_bias("o_proj"),
        mlp_bias=any_bias("gate_proj", "up_proj", "down_proj"),
        qk_norm=architecture == "qwen3",
    )


def eos_token_ids_from_gguf(metadata: dict, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end an answer: the end of the text, and the end of a turn of a chat."""
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    ids = [_size(metadata, key, least=0, most=vocab_size - 1) for key in keys if key in metadata]
    return tuple(dict.fromkeys(ids))


def chat_template_from_gguf(metadata: dict) -> str | None:
    key = "tokenizer.chat_template"
    return _text(metadata, key) if key in metadata else None


def _refuse_other_models(metadata, architecture, head_dim, context) -> None:
    """Keys that would change the forward pass into one that minillm does not have."""
    experts = _size(metadata, f"{architecture}.expert_count", 0, least=0)
    if experts:
        raise InputError(f"{architecture}.expert_count is {experts}, must be 0: mixtures of "
                         "experts are not supported")
    window = _size(metadata, f"{architecture}.attention.sliding_window", 0, least=0)
    if 0 < window < context:
        raise InputError(f"{architecture}.attention.sliding_window {window} is narrower than the "
                         f"context of {context}: sliding-window attention is not supported")
    for key in ("rope.dimension_count", "attention.value_length"):
        size = _size(metadata, f"{architecture}.{key}", head_dim)
        if size != head_dim:
            raise InputError(f"{architecture}.{key} is {size}, must be the head dimension "
                             f"{head_dim}: use a model whose heads are rotated as a whole and "
                             "have keys and values of one size")


def _rope_scaling(metadata, architecture) -> RopeScaling | None:
    prefix = f"{architecture}.rope"
    attention_factor = _number(metadata, f"{prefix}.scaling.attn_factor", 1.0)
    if attention_factor != 1.0:
        raise InputError(f"{prefix}.scaling.attn_factor is {attention_factor}, must be 1: "
                         "scaled rotary embeddings are not supported")
    old_factor = _number(metadata, f"{prefix}.scale_linear", 1.0)  # the key's name until 2023
    factor = _number(metadata, f"{prefix}.scaling.factor", old_factor)
    rope_type = _text(metadata, f"{prefix}.scaling.type", "linear")
    if rope_type not in ("none", "linear"):
        raise InputError(f"{prefix}.scaling.type is {rope_type!r:.80}, supported are none and "
                         "linear: use a file without that rotary scaling")
    return RopeScaling("linear", factor) if rope_type == "linear" and factor != 1.0 else None


def _size(metadata, key, default=None, least=1, most=LARGEST_SIZE) -> int:
    value = _value(metadata, key, default)
    if type(value) is not int or not least <= value <= most:  # True is an int as well
        raise InputError(f"{key} is {value!r:.80}, must be a whole number from {least} to {most}")
    return value


def _number(metadata, key, default=None, least=1e-6, most=1e12) -> float:
    value = _value(metadata, key, default)
    if type(value) not in (int, float) or not least <= value <= most:  # NaN is not within either
        raise InputError(f"{key} is {value!r:.80}, must be a number from {least:g} to {most:g}")
    return float(value)


def _text(metadata, key, default=None) -> str:
    value = _value(metadata, key, default)
    if type(value) is not str:
        raise InputError(f"{key} is {value!r:.80}, must be a text")
    return value


def _value(metadata, key, default):
    if key not in metadata and default is None:
        raise InputError(f"key {key} is missing: get the file again")
    return metadata.get(key, default)
