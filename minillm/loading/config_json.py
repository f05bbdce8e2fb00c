"""What does a config.json say? It is turned into a ModelConfig, or refused by name.

The authority is transformers: every default below is what its configuration class assumes for a
key that the file leaves out. A number read wrongly here makes a model that runs and babbles, so
whatever would change the forward pass and is not implemented is an error and never ignored.

Chapter 05_model tells the story. Left out on purpose: other architectures, other rotary scalings
(dynamic, yarn, longrope), sliding windows, quantized weights.
"""

from __future__ import annotations

from ..config import ModelConfig, RopeScaling
from ..errors import InputError

# Three defaults differ from class to class. A head count of None means "as many as query heads",
# a head_dim of None means hidden_size // num_attention_heads; both may also be null in the file.
DEFAULTS = {
    "LlamaForCausalLM": {
        "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048},
    "MistralForCausalLM": {
        "num_key_value_heads": 8, "head_dim": None, "max_position_embeddings": 131072},
    "Qwen2ForCausalLM": {
        "num_key_value_heads": 32, "head_dim": None, "max_position_embeddings": 32768},
    "Qwen3ForCausalLM": {
        "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
}

# The numbers that belong to each kind of rotary scaling, beside its type and rope_theta.
ROPE_KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor",
               "original_max_position_embeddings"},
}

LARGEST_SIZE = 2**31 - 1


def config_from_json(config: dict) -> ModelConfig:
    """The ModelConfig of a parsed config.json; InputError names the key that stands in the way."""
    architecture = _architecture(config)
    _refuse_other_models(config)
    config = {**DEFAULTS[architecture], **config}

    heads = _size(config, "num_attention_heads")
    if config["num_key_value_heads"] is None:
        config["num_key_value_heads"] = heads
    if config["head_dim"] is None:
        config["head_dim"] = _size(config, "hidden_size") // heads
    _refuse_sliding_window(config, architecture)

    is_llama = architecture == "LlamaForCausalLM"
    is_qwen2 = architecture == "Qwen2ForCausalLM"
    is_qwen3 = architecture == "Qwen3ForCausalLM"
    # Mistral's and Qwen2's classes do not look at the key: never a bias, and always one on q, k, v.
    attention_bias = (is_llama or is_qwen3) and _flag(config, "attention_bias")
    return ModelConfig(
        vocab_size=_size(config, "vocab_size"),
        hidden_size=_size(config, "hidden_size"),
        intermediate_size=_size(config, "intermediate_size"),
        num_hidden_layers=_size(config, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_size(config, "num_key_value_heads"),
        head_dim=_size(config, "head_dim"),
        rms_norm_eps=_number(config, "rms_norm_eps", 1e-6, least=1e-12, most=1.0),
        rope_theta=_rope_theta(config),
        rope_scaling=_rope_scaling(config),
        max_position_embeddings=_size(config, "max_position_embeddings"),
        tie_word_embeddings=_flag(config, "tie_word_embeddings"),
        attention_bias=attention_bias or is_qwen2,
        attention_out_bias=attention_bias,
        mlp_bias=is_llama and _flag(config, "mlp_bias"),
        qk_norm=is_qwen3,
    )


def _architecture(config: dict) -> str:
    named = config.get("architectures")
    for architecture in DEFAULTS:
        if named == [architecture]:
            return architecture
    raise InputError(f"architectures is {named!r:.80}, supported are {', '.join(DEFAULTS)}: "
                     "use a checkpoint of one of them")


def _refuse_other_models(config: dict) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise InputError(f"quantization_config has quant_method {method!r:.40}, but only dense "
                         "checkpoints (F32, F16, BF16) are read: use the unquantized one")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise InputError(f"hidden_act is {activation!r:.40}, supported is 'silu': use a checkpoint "
                         "with SwiGLU layers")


def _refuse_sliding_window(config: dict, architecture: str) -> None:
    """A window as wide as the context hides nothing: only a narrower one is in the way."""
    if architecture == "LlamaForCausalLM" or not _has_sliding_layers(config, architecture):
        return
    window = _size(config, "sliding_window", 4096)
    context = _size(config, "max_position_embeddings")
    if window < context:
        raise InputError(f"sliding_window {window} is narrower than max_position_embeddings "
                         f"{context}: sliding-window attention is not supported")


def _has_sliding_layers(config: dict, architecture: str) -> bool:
    if architecture == "MistralForCausalLM":
        return config.get("sliding_window", 4096) is not None
    layer_types = config.get("layer_types")
    if layer_types is None:  # older files: the layers from max_window_layers on
        return (_flag(config, "use_sliding_window")
                and _size(config, "max_window_layers", 28, least=0)
                < _size(config, "num_hidden_layers"))
    supported = ["full_attention", "sliding_attention"]
    if not isinstance(layer_types, list) or any(kind not in supported for kind in layer_types):
        raise InputError(f"layer_types is {layer_types!r:.80}, must be a list of "
                         f"{' and '.join(supported)}")
    return "sliding_attention" in layer_types


def _rope(config: dict) -> dict:
    """The rotary entry: "rope_scaling" before transformers 5, "rope_parameters" since."""
    key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
    rope = config.get(key) or {}
    if not isinstance(rope, dict):
        raise InputError(f"{key} is {rope!r:.40}, must be an object with a rope_type")
    return rope


def _rope_theta(config: dict) -> float:
    """Transformers 5 moved the base into the rotary entry, which wins over the old place."""
    config = {**config, **_rope(config)}
    rotated = _number(config, "partial_rotary_factor", 1.0)
    if rotated != 1.0:
        raise InputError(f"partial_rotary_factor is {rotated}, supported is 1: "
                         "use a checkpoint that rotates whole heads")
    return _number(config, "rope_theta", 10000.0, least=1.0)


def _rope_scaling(config: dict) -> RopeScaling | None:
    rope = _rope(config)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in list(ROPE_KEYS):  # a list, because what the file says may not be hashable
        raise InputError(f"rope_type is {rope_type!r:.40}, supported are {', '.join(ROPE_KEYS)}: "
                         "use a checkpoint without that rotary scaling")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"} | ROPE_KEYS[rope_type]
    if unknown := sorted(set(rope) - known):
        raise InputError(f"{unknown[0]!r:.40} is no parameter of rope_type {rope_type!r}: "
                         f"it takes {', '.join(sorted(ROPE_KEYS[rope_type])) or 'none'}")
    if rope_type == "default":
        return None
    factor = _number(rope, "factor", least=1.0)
    if rope_type == "linear":
        return RopeScaling("linear", factor)
    low = _number(rope, "low_freq_factor")
    high = _number(rope, "high_freq_factor")
    if high <= low:
        raise InputError(f"high_freq_factor {high} must be greater than low_freq_factor {low}")
    # Unlike the other numbers, this one is read outside the entry first (transformers does so).
    original = _size({**rope, **config}, "original_max_position_embeddings",
                     _size(config, "max_position_embeddings"))
    return RopeScaling("llama3", factor, low, high, original)


def _size(config: dict, key: str, default: int | None = None, least: int = 1) -> int:
    value = _value(config, key, default)
    if type(value) is not int or not least <= value <= LARGEST_SIZE:  # True is an int as well
        raise InputError(f"{key} is {value!r:.40}, must be a whole number from {least} to "
                         f"{LARGEST_SIZE}")
    return value


def _number(config: dict, key: str, default: float | None = None,
            least: float = 1e-6, most: float = 1e12) -> float:
    value = _value(config, key, default)
    if type(value) not in (int, float) or not least <= value <= most:  # NaN is not within either
        raise InputError(f"{key} is {value!r:.40}, must be a number from {least:g} to {most:g}")
    return float(value)


def _flag(config: dict, key: str) -> bool:
    value = config.get(key, False)
    if type(value) is not bool:
        raise InputError(f"{key} is {value!r:.40}, must be true or false")
    return value


def _value(config: dict, key: str, default: float | None) -> object:
    if key not in config and default is None:
        raise InputError(f"{key} is missing: add it, or download config.json again")
    return config.get(key, default)
