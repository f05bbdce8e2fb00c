"""What does a checkpoint offer, whatever it was read from?

    path, config, eos_token_ids, chat_template, rope_freq_factors, tokenizer()
    tensor(name, shape)                     one tensor, in float32
    matrix(name, parts, in_size, bias)      one weight that multiplies, in NumPy

A GGUF file and a Hugging Face folder hold tensors, and their matrices are made of these, here. A
checkpoint that holds quantized matrices (`quantize_model.py`, `quantized_file.py`) has its own
`matrix`.
"""

from __future__ import annotations

import numpy as np

from ..linear import Dense


class Checkpoint:
    """The part that all checkpoints share."""

    quantize = None  # the name of the format of its matrices, where they are quantized

    def matrix(self, name, parts, in_size, bias):
        """The weight that the model calls `name`; parts: [(name in the checkpoint, rows), ...].

        Several parts become one matrix, one below the other: a product of many rows costs less
        than several of few.   bias: True if the parts have biases.   -> Dense of np.ndarray.
        """
        weight = join([self.tensor(f"{part}.weight", (size, in_size)) for part, size in parts])
        return Dense(weight, self.bias(parts) if bias else None)

    def bias(self, parts):
        return join([self.tensor(f"{part}.bias", (size,)) for part, size in parts])


def join(arrays):
    """Arrays one below the other; a single one is not copied."""
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
