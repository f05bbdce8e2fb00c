"""Small random checkpoints, written by transformers itself: the oracle of the loading tests."""

from __future__ import annotations

import torch
import transformers

# Pairwise different, so that no transposition and no mixed-up size can pass: H·D = 60, K·D = 20.
SIZES = {
    "vocab_size": 130, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10,
    "max_position_embeddings": 256,
}
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def write_checkpoint(folder, architecture, *, dtype="float32", max_shard_size="5GB", seed=0,
                     **overrides):
    """Write config.json and safetensors into `folder`, and return the transformers model.

    Every parameter is random: fresh models have biases of 0 and norms of 1, which hide mistakes.
    overrides: config.json entries, beside those of SIZES (None leaves an entry out).
    """
    fields = {key: value for key, value in {**SIZES, **overrides}.items() if value is not None}
    model_class = getattr(transformers, architecture)
    model = model_class(model_class.config_class(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.15, generator=generator)
    model.to(getattr(torch, dtype)).eval()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model
