"""Which matrix of a model gets how many bits, and how do they get there?

From outside: a quantized checkpoint wraps another one, and hands out `Int8`, `Int4` or `W8A8` where
that has `Dense`. What loads weights, and the model, see no difference. Chapter 11_quantization
tells the story.

Norms and biases, a thousandth of the numbers, stay in floating point. The embedding, which is often
the head as well, is kept in int8 with groups, like Q8_0: its rows are what every layer starts from.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from gguf import GGMLQuantizationType

from .calibration import as_float32, watch
from .errors import InputError
from .gptq import gptq_np
from .linear import Dense
from .loading.checkpoint import Checkpoint, join
from .loading.gguf import GGUFFile
from .loading.gguf_blocks import quantize_q8_0, read_q4_0, read_q4_1, read_q8_0
from .loading.weights import load_weights
from .quantization import (
    dequantize_group_np,
    pack_int4_np,
    quantize_group_np,
    quantize_int8_np,
)
from .quantized_linear import W8A8, Int4, Int8, row_tiles
from .smoothquant import smooth_layer

FORMATS = ("int8, w8a8, w8a8-smooth, native, int4; int4 takes -g32 (the default), -g64 or -g128, "
           "-sym and -gptq, as in int4-g64-gptq")


@dataclass(frozen=True)
class QuantizationFormat:
    """What a name such as "int4-g64-gptq" stands for.

    method: "int8" (weights by row), "w8a8" (weights by row, activations by token), "int4" (weights
    by group), "native" (a GGUF file's own blocks).   group_size, symmetric: of int4.
    smooth: migrate outliers of the activations into the weights first (w8a8).
    gptq: round with a view to calibration data (int4).
    """

    method: str
    group_size: int = 32
    symmetric: bool = False
    smooth: bool = False
    gptq: bool = False


def parse_format(text):
    """
    >>> parse_format("int4-g64-sym")
    QuantizationFormat(method='int4', group_size=64, symmetric=True, smooth=False, gptq=False)

    Raises InputError for a name that stands for nothing.
    """
    plain = re.fullmatch(r"(int8|native)|w8a8(-smooth)?", str(text))
    if plain:
        return QuantizationFormat(plain[1] or "w8a8", smooth=bool(plain[2]))
    groups = re.fullmatch(r"int4(?:-g(32|64|128))?(-sym)?(-gptq)?", str(text))
    if groups:
        return QuantizationFormat("int4", int(groups[1] or 32), bool(groups[2]),
                                  gptq=bool(groups[3]))
    in_gguf = " (q8_0 and q4_0 are written to .gguf files)" if text in ("q8_0", "q4_0") else ""
    raise InputError(f"quantize={text!r} is unknown: choose {FORMATS}{in_gguf}")


def quantize_checkpoint(checkpoint, quantize):
    """The checkpoint with its matrices in the format that is called `quantize`.

    Raises InputError for an unknown name, and for a checkpoint that is quantized already.
    """
    if checkpoint.quantize is not None:
        raise InputError(f"{checkpoint.path} is quantized already, as {checkpoint.quantize}: "
                         "give the model that it was made from, or leave quantize at None")
    return QuantizedCheckpoint(checkpoint, quantize)


class QuantizedCheckpoint(Checkpoint):
    """A checkpoint whose matrices are quantized when they are read, one at a time.

    quantize: the name of the format. One that looks at data takes a minute now, in which the
    model reads text, and keeps what came of it: the matrices, and for smoothing the norms.
    """

    def __init__(self, checkpoint, quantize):
        self.checkpoint = FiniteCheckpoint(checkpoint)
        self.quantize = quantize
        self.format = parse_format(quantize)
        self.config = checkpoint.config
        self.eos_token_ids = checkpoint.eos_token_ids
        self.chat_template = checkpoint.chat_template
        self.rope_freq_factors = checkpoint.rope_freq_factors
        if self.format.method == "native" and not isinstance(checkpoint, GGUFFile):
            raise InputError(f"{checkpoint.path} has no quantized blocks, which quantize='native' "
                             "would keep: give a .gguf file, or choose another format")
        self.ready = {}  # matrices and tensors by name
        if self.format.gptq:
            self.ready = gptq_layers(self.checkpoint, self.format)
        elif self.format.smooth:
            self.ready = smoothed_layers(self.checkpoint, self.format)

    def tokenizer(self):
        return self.checkpoint.tokenizer()

    def tensor(self, name, shape):
        return self.ready[name] if name in self.ready else self.checkpoint.tensor(name, shape)

    def matrix(self, name, parts, in_size, bias):
        if name in self.ready:
            return self.ready[name]
        if self.format.method == "native":
            return native_matrix(self.checkpoint.checkpoint, name, parts, in_size, bias)
        dense = self.checkpoint.matrix(name, parts, in_size, bias)
        return quantize_matrix(dense, self.format, is_layer=".layers." in name)


class FiniteCheckpoint(Checkpoint):
    """A checkpoint whose numbers are numbers. A NaN or an infinity has no scale, and would be gone
    once it is quantized."""

    def __init__(self, checkpoint):
        self.checkpoint, self.path = checkpoint, checkpoint.path
        self.config, self.tokenizer = checkpoint.config, checkpoint.tokenizer
        self.rope_freq_factors = checkpoint.rope_freq_factors

    def tensor(self, name, shape):
        tensor = self.checkpoint.tensor(name, shape)
        if not np.isfinite(tensor).all():
            raise InputError(f"{self.path}: {name} holds NaN or infinities, which cannot be "
                             "quantized: get the checkpoint again")
        return tensor


def quantize_matrix(dense, quantization_format, is_layer=True):
    """A Dense matrix (NumPy) in another format, rounded to nearest.

    is_layer: False for the embedding and the head, which are kept in int8, in groups of 32 where
    these divide a row.
    """
    method = quantization_format.method
    if not is_layer:
        return int8_by_group(dense)
    if method == "int4":
        size, symmetric = quantization_format.group_size, quantization_format.symmetric
        return int4_matrix(*quantize_group_np(dense.weight, size, symmetric), size, dense.bias)
    return int8_by_row(dense, W8A8 if method == "w8a8" else Int8)


def int8_by_row(dense, kind=Int8):
    """Int8 or W8A8, with a scale for each row."""
    tiles = [quantize_int8_np(dense.weight[rows]) for rows in row_tiles(dense.weight)]
    q, scale = (join(each) for each in zip(*tiles))
    return kind(q, scale, q.shape[1], dense.bias)


def int8_by_group(dense):
    """Int8 in groups of 32, by row where these do not divide a row: what Q8_0 blocks hold.

    An embedding is large: tile by tile, so that its float32 copies are not.
    """
    if dense.weight.shape[1] % 32:
        return int8_by_row(dense)
    tiles = [read_q8_0(quantize_q8_0(dense.weight[rows])) for rows in row_tiles(dense.weight)]
    q, scale = (join(each) for each in zip(*tiles))
    return Int8(q, scale, 32, dense.bias)


def gptq_layers(checkpoint, quantization_format):
    """Every matrix of the layers rounded by GPTQ, on the activations that come out of the layers
    before it once these are quantized.   -> {name: Int4}
    """
    size, symmetric = quantization_format.group_size, quantization_format.symmetric
    ready = {}

    def see(name, dense, x):
        q, scale, minimum = gptq_np(dense.weight, x.T @ x, size, symmetric)
        ready[name] = int4_matrix(q, scale, minimum, size, dense.bias)
        return Dense(dequantize_group_np(q, scale, minimum, size), dense.bias)

    watch(checkpoint, see)
    return ready


def smoothed_layers(checkpoint, quantization_format):
    """The matrices of the layers after smoothing, quantized, and the norms that pay for it.

    -> {name: W8A8, or np.ndarray for a norm}
    """
    seen, ready = {}, {}

    def see(name, dense, x):
        seen[name] = np.abs(x).max(axis=0)
        return dense

    watch(checkpoint, see)
    weights = load_weights(checkpoint, as_float32)
    for index, layer in enumerate(weights.layers):
        names = {field: f"model.layers.{index}.{path}" for field, path in MATRIX_PATHS.items()}
        layer = smooth_layer(layer, {field: seen[name] for field, name in names.items()},
                             checkpoint.config.heads)
        for field, name in names.items():
            ready[name] = quantize_matrix(getattr(layer, field), quantization_format)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            ready[f"model.layers.{index}.{norm}.weight"] = getattr(layer, norm)
    return ready


MATRIX_PATHS = {  # from a field of LayerWeights to what follows the layer in a name
    "qkv_proj": "self_attn.qkv_proj",
    "o_proj": "self_attn.o_proj",
    "gate_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "down_proj": "mlp.down_proj",
}


def int4_matrix(q, scale, minimum, group_size, bias=None):
    """Int4 from what quantize_group_np returns."""
    return Int4(pack_int4_np(q), scale, minimum, group_size, q.shape[1], bias)


def native_matrix(checkpoint, name, parts, in_size, bias):
    """A GGUF file's own blocks, as Int4 or Int8, or Dense where the file has floats."""
    formats = {checkpoint.blocks(f"{part}.weight")[0] for part, _ in parts}
    if all(each.name in ("F32", "F16", "BF16") for each in formats):
        return checkpoint.matrix(name, parts, in_size, bias)
    if len(formats) > 1 or not formats <= set(NATIVE_READERS):
        names = ", ".join(sorted(each.name for each in formats))
        raise InputError(f"{checkpoint.path}: {name} is in {names}, and quantize='native' keeps "
                         "Q8_0, Q4_0 and Q4_1, one for q, k and v: choose another format")
    read, is_int4 = NATIVE_READERS[formats.pop()]
    for part, size in parts:
        checkpoint.check_shape(f"{part}.weight", (size, in_size))
    blocks = [read(checkpoint.blocks(f"{part}.weight")[1]) for part, _ in parts]
    q, scale, *minimum = (join(each) for each in zip(*blocks))
    biases = checkpoint.bias(parts) if bias else None
    return int4_matrix(q, scale, *minimum, 32, biases) if is_int4 else Int8(q, scale, 32, biases)


NATIVE_READERS = {  # how to read the blocks, and whether these are of 4 bits
    GGMLQuantizationType.Q8_0: (read_q8_0, False),
    GGMLQuantizationType.Q4_0: (read_q4_0, True),
    GGMLQuantizationType.Q4_1: (read_q4_1, True),
}
