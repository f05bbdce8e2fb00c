"""From a checkpoint's tensors to the weights that `forward_*` reads, one tensor at a time.

The checkpoint (a GGUF file or a Hugging Face folder) says what the numbers are; `convert` says
where they go: a dtype, a device. At no moment is more than one tensor in memory twice.
"""

from __future__ import annotations

import numpy as np

from ..linear import Dense
from ..model import LayerWeights, Weights
from ..rope import rope_frequencies


def load_weights(checkpoint, convert):
    """Build `Weights` from a checkpoint.

    checkpoint: `.config`, `.tensor(name, shape)` -> np.ndarray float32, `.rope_freq_factors`.
    convert: np.ndarray -> the array or tensor that the forward pass will read.
    Raises InputError where a tensor is missing or has another shape than the configuration says.
    """
    config = checkpoint.config
    V, C, F = config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, D = config.heads

    def vector(name, size):
        return convert(checkpoint.tensor(f"{name}.weight", (size,)))

    def matrix(name, out_size, in_size, bias=False):
        return stacked([(name, out_size)], in_size, bias)

    def stacked(parts, in_size, bias=False):
        """One matrix of several: a product of many rows costs less than several of few."""
        weights = [checkpoint.tensor(f"{name}.weight", (size, in_size)) for name, size in parts]
        biases = [checkpoint.tensor(f"{name}.bias", (size,)) for name, size in parts if bias]
        return Dense(convert(join(weights)), convert(join(biases)) if bias else None)

    def head_norms(attention):
        q_norm = checkpoint.tensor(f"{attention}.q_norm.weight", (D,))
        k_norm = checkpoint.tensor(f"{attention}.k_norm.weight", (D,))
        return convert(np.concatenate([np.tile(q_norm, (H, 1)), np.tile(k_norm, (K, 1))]))

    def layer(prefix):
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            input_layernorm=vector(f"{prefix}.input_layernorm", C),
            qkv_proj=stacked([(f"{attention}.q_proj", H * D), (f"{attention}.k_proj", K * D),
                              (f"{attention}.v_proj", K * D)], C, config.attention_bias),
            o_proj=matrix(f"{attention}.o_proj", C, H * D, config.attention_out_bias),
            post_attention_layernorm=vector(f"{prefix}.post_attention_layernorm", C),
            gate_proj=matrix(f"{mlp}.gate_proj", F, C, config.mlp_bias),
            up_proj=matrix(f"{mlp}.up_proj", F, C, config.mlp_bias),
            down_proj=matrix(f"{mlp}.down_proj", C, F, config.mlp_bias),
            qk_norm=head_norms(attention) if config.qk_norm else None,
        )

    embed_tokens = matrix("model.embed_tokens", V, C)
    return Weights(
        config=config,
        embed_tokens=embed_tokens,
        layers=[layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)],
        norm=vector("model.norm", C),
        lm_head=embed_tokens if config.tie_word_embeddings else matrix("lm_head", V, C),
        inv_freq=rope_frequencies(config, checkpoint.rope_freq_factors),
    )


def join(arrays):
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
