"""What does each matrix of a model see when the model reads?

A piece of text goes through the model once, in float32. Each matrix of each layer is a `Watched`
one: when its activations arrive, all of them at once, it hands them to a function, which may
collect what it likes, and may give back another matrix, that multiplies from then on. So the
layers behind see the errors of a layer that was quantized a moment ago, as in GPTQ's own code.

Sequences attend within themselves, through a cache that keeps nothing. Everything is NumPy, for
both backends: the same model, quantized, is the same to the last bit, whatever runs it.

Chapter 11_quantization tells the story. `gptq.py` and `smoothquant.py` say what is done with what
is seen. Left out: texts of one's own, and models so large that the activations of a layer do not
fit in memory: for NUM_SEQUENCES·SEQUENCE_LEN tokens, a few times as many numbers as tokens·F.
"""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from .attention import attention_np
from .loading.checkpoint import Checkpoint
from .loading.registry import fetch
from .loading.weights import load_weights
from .model import forward_np

NUM_SEQUENCES = 16  # 8192 tokens: twice as many take twice as long
SEQUENCE_LEN = 512
TEXT = "shakespeare"  # and never "macbeth", which is held out for evaluation
CHARACTERS_A_TOKEN = 16  # at most, to cut an excerpt before it is encoded: English has 3 to 4
MATRICES_A_LAYER = 5


def calibration_tokens(tokenizer, context_len):
    """Excerpts of TEXT, evenly spaced:  -> np.ndarray int [sequences, tokens of each].

    A sequence begins as the model's texts do, with the token for that where it wants one: what
    stands first is where activations are largest.
    """
    text = fetch(TEXT, verify=False).read_text(encoding="utf-8")
    length = min(SEQUENCE_LEN, context_len)
    start = [tokenizer.bos_token_id] * bool(tokenizer.add_bos_token)
    size = CHARACTERS_A_TOKEN * length
    offsets = np.linspace(0, len(text) - size, NUM_SEQUENCES).astype(int)
    excerpts = [text[offset : offset + size].partition("\n")[2] for offset in offsets]
    return np.array([(start + tokenizer.encode(excerpt))[:length] for excerpt in excerpts])


class SeparateSequences:
    """A cache that keeps nothing: of the N tokens each `length` are a sequence of their own."""

    def __init__(self, length):
        self.length = length

    def attend(self, layer, q, k, v):
        """q: [N, H, D], k, v: [N, K, D]  ->  [N, H, D];   N is a multiple of `length`."""
        parts = [slice(i, i + self.length) for i in range(0, len(q), self.length)]
        heads_first = ([each[part].swapaxes(0, 1) for each in (q, k, v)] for part in parts)
        return np.concatenate([attention_np(*qkv).swapaxes(0, 1) for qkv in heads_first])


class Watched:
    """A matrix that hands its activations to see(name, dense, x), and multiplies by what that
    returns.   name: what `load_weights` calls it, as in "model.layers.3.mlp.down_proj"."""

    def __init__(self, name, dense, see):
        self.name, self.dense, self.see = name, dense, see
        self.bias = dense.bias

    def matmul_np(self, x):
        return self.see(self.name, self.dense, x).matmul_np(x)


class WatchedCheckpoint(Checkpoint):
    """A checkpoint in float32 whose matrices in the layers are Watched."""

    def __init__(self, checkpoint, see):
        self.checkpoint, self.see = checkpoint, see
        self.config = checkpoint.config
        self.rope_freq_factors = checkpoint.rope_freq_factors

    def tensor(self, name, shape):
        return self.checkpoint.tensor(name, shape)

    def matrix(self, name, parts, in_size, bias):
        dense = self.checkpoint.matrix(name, parts, in_size, bias)
        return Watched(name, dense, self.see) if ".layers." in name else dense


def watch(checkpoint, see):
    """Read the calibration text, with see(name, dense, x) -> matrix at every matrix of the layers.

    dense: float32 of NumPy, x: [N, in] float32.   A progress bar goes to standard error.
    """
    tokens = calibration_tokens(checkpoint.tokenizer(), checkpoint.config.max_position_embeddings)
    num_sequences, length = tokens.shape
    positions = np.tile(np.arange(length), num_sequences)
    num_matrices = MATRICES_A_LAYER * checkpoint.config.num_hidden_layers
    with tqdm(total=num_matrices, desc="calibrating", unit="matrix") as bar:

        def see_and_tell(name, dense, x):
            matrix = see(name, dense, x)
            bar.update()
            return matrix

        watched = WatchedCheckpoint(checkpoint, see_and_tell)
        weights = load_weights(watched, as_float32, lambda matrix, has_rows: matrix)
        forward_np(weights, tokens.reshape(-1), positions, SeparateSequences(length), rows=[-1])


def as_float32(array):
    return array.astype(np.float32, copy=False)
