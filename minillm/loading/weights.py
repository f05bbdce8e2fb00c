"""From a checkpoint's tensors to the weights that `forward_*` reads, one matrix at a time.

The checkpoint says what the numbers are; `convert` and `convert_matrix` say where they go: a dtype,
a device, an order of bytes. At no moment is more than one matrix in memory twice.
"""

from __future__ import annotations

import numpy as np

from ..model import LayerWeights, Weights
from ..rope import rope_frequencies


def load_weights(checkpoint, convert, convert_matrix=None):
    """Build `Weights` from a checkpoint.

    checkpoint: a `loading.checkpoint.Checkpoint`.
    convert: np.ndarray -> the array or tensor that the forward pass will read, for norms.
    convert_matrix(matrix, has_rows): the same for the objects that multiply, whatever
    checkpoint.matrix returns; has_rows is True for the embedding, whose rows are looked up.
    None: they are Dense, and their arrays are converted as those of the norms.
    Raises InputError where a tensor is missing or has another shape than the configuration says.
    """
    config = checkpoint.config
    V, C, F = config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, D = config.heads
    convert_matrix = convert_matrix or (lambda matrix, has_rows: matrix.converted(convert))

    def vector(name, size):
        return convert(checkpoint.tensor(f"{name}.weight", (size,)))

    def matrix(name, out_size, in_size, bias=False):
        return stacked(name, [(name, out_size)], in_size, bias)

    def stacked(name, parts, in_size, bias=False):
        return convert_matrix(checkpoint.matrix(name, parts, in_size, bias),
                              has_rows=name == "model.embed_tokens")

    def head_norms(attention):
        q_norm = checkpoint.tensor(f"{attention}.q_norm.weight", (D,))
        k_norm = checkpoint.tensor(f"{attention}.k_norm.weight", (D,))
        return convert(np.concatenate([np.tile(q_norm, (H, 1)), np.tile(k_norm, (K, 1))]))

    def layer(prefix):
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        qkv = [(f"{attention}.q_proj", H * D), (f"{attention}.k_proj", K * D),
               (f"{attention}.v_proj", K * D)]
        return LayerWeights(
            input_layernorm=vector(f"{prefix}.input_layernorm", C),
            qkv_proj=stacked(f"{attention}.qkv_proj", qkv, C, config.attention_bias),
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
