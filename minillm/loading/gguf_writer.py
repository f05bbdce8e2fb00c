"""How do our numbers reach llama.cpp? Any checkpoint as a .gguf file, in Q8_0 or Q4_0 blocks.

What reading does is done backwards: names become GGUF's, the rows of q and k of the llama
architecture go back to the order in which llama.cpp pairs them, and what config.json and
tokenizer.json said becomes keys. The arithmetic is ours (`gguf_blocks.py`); the `gguf` package
writes the container. Matrices are quantized, and norms and biases stay in float32; the embedding
and the head are Q8_0 in both formats, because every later layer starts from them.

Chapter 11_quantization tells the story. Left out on purpose: the other formats, and a change of
format without float32 in between.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, LlamaFileType
from tqdm import tqdm

from ..errors import InputError
from ..rope import rope_frequencies
from ..tokenizer import Tokenizer
from .gguf import (
    MODEL_NAMES,
    NORM_NAMES,
    PROJECTION_NAMES,
    QWEN3_NORM_NAMES,
    ROPE_FACTORS,
    GGUFFile,
)
from .gguf_blocks import quantize_q4_0, quantize_q8_0
from .quantized_file import Inventory
from .quantized_writer import Written, whole_file
from .stored_json import tokenizer_to_dict
from .tokenizer_files import CONTROL, NORMAL, UNUSED, USER_DEFINED

QUANTIZERS = {
    GGMLQuantizationType.Q8_0: quantize_q8_0,
    GGMLQuantizationType.Q4_0: quantize_q4_0,
}
FORMATS = {"q8_0": GGMLQuantizationType.Q8_0, "q4_0": GGMLQuantizationType.Q4_0}
FILE_TYPES = {"q8_0": LlamaFileType.MOSTLY_Q8_0, "q4_0": LlamaFileType.MOSTLY_Q4_0}
# Keys of a source file that speak of that file, and would be wrong in another.
LEFT_OUT = ("general.architecture", "general.alignment", "general.file_type",
            "general.quantization_version", "split.", "quantize.")
GGUF_NAMES = {hugging_face: name for names in (PROJECTION_NAMES, NORM_NAMES, QWEN3_NORM_NAMES)
              for name, hugging_face in names.items()}
GGUF_MODEL_NAMES = {hugging_face: name for name, hugging_face in MODEL_NAMES.items()}


def check_gguf_format(quantize):
    """Raise InputError unless `quantize` is the name of a format that write_gguf writes."""
    if quantize not in FORMATS:
        raise InputError(f"quantize={quantize!r} cannot be written to a .gguf file: choose "
                         f"{' or '.join(FORMATS)}, or a .safetensors file")


def write_gguf(checkpoint, quantize, path):
    """Write a model to the .gguf file `path`; -> Written.

    checkpoint: GGUFFile or HuggingFaceFolder.   quantize: "q8_0" or "q4_0".
    Raises InputError for what the format or llama.cpp cannot hold: rows that are no multiple of 32,
    a tokenizer or biases that no key or tensor stands for. One matrix is in memory at a time.
    """
    check_gguf_format(quantize)
    if checkpoint.quantize is not None:
        raise InputError(f"{checkpoint.path} is quantized already, as {checkpoint.quantize}: give "
                         "the model that it was made from")
    try:
        architecture = gguf_architecture(checkpoint)
        metadata = gguf_metadata(checkpoint, architecture)
        tensors = plan(checkpoint.config, FORMATS[quantize])
    except InputError as error:
        raise InputError(f"{checkpoint.path}: {error}") from error
    metadata["general.file_type"] = int(FILE_TYPES[quantize])
    with whole_file(path) as partial:
        writer = gguf.GGUFWriter(partial, architecture)
        try:
            _add_metadata(writer, metadata)
            num_bytes, num_weights = _write_tensors(writer, checkpoint, architecture, tensors)
        finally:
            writer.close()
    return Written(Path(path), os.path.getsize(path), 8 * num_bytes / num_weights)


def gguf_architecture(checkpoint):
    """The name of the architecture at llama.cpp.   Raises InputError for biases it has no place
    for."""
    if isinstance(checkpoint, GGUFFile):
        return checkpoint.metadata["general.architecture"]
    config = checkpoint.config
    if config.qk_norm and (config.attention_bias or config.attention_out_bias):
        raise InputError("llama.cpp's qwen3 has no biases, and this model has: it cannot be "
                         "written to a .gguf file")
    if config.qk_norm:
        return "qwen3"
    return "qwen2" if config.attention_bias and not config.attention_out_bias else "llama"


# ---- tensors ---------------------------------------------------------------------------------


def plan(config, block_format):
    """Which tensors the file has: [(Hugging Face's name, shape, format), ...].

    Raises InputError where rows cannot be cut into blocks.
    """
    inventory = Inventory(config)
    tensors = [(name, shape, GGMLQuantizationType.F32) for name, shape in inventory.tensors]
    for _, parts, in_size, bias in inventory.matrices:
        for part, size in parts:
            is_layer = ".layers." in part
            matrix_format = block_format if is_layer else GGMLQuantizationType.Q8_0
            tensors.append((f"{part}.weight", (size, in_size), matrix_format))
            if in_size % 32:
                raise InputError(f"tensor '{part}.weight' has rows of {in_size} numbers, must have "
                                 f"a multiple of 32 for {matrix_format.name}: write a .safetensors "
                                 "file, whose formats take any size")
            if bias:
                tensors.append((f"{part}.bias", (size,), GGMLQuantizationType.F32))
    return tensors


def _write_tensors(writer, checkpoint, architecture, tensors):
    """Write the container up to the tensors, then each of these; -> (their bytes, numbers)."""
    num_bytes, num_weights = 0, 0
    for name, shape, block_format in tensors:
        weights_a_block, block_bytes = GGML_QUANT_SIZES[block_format]
        size_bytes = math.prod(shape) // weights_a_block * block_bytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), size_bytes,
                               raw_dtype=block_format)
        num_bytes, num_weights = num_bytes + size_bytes, num_weights + math.prod(shape)
    factors = rope_factors(checkpoint)
    if factors is not None:
        writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape, block_format in tqdm(tensors, desc="quantizing", unit="tensor", disable=None):
        values = checkpoint.tensor(name, shape)
        if architecture == "llama":
            values = llama_cpp_row_order(name, values, checkpoint.config)
        if block_format in QUANTIZERS:
            values = QUANTIZERS[block_format](values)
        writer.write_tensor_data(values)
    if factors is not None:
        writer.write_tensor_data(factors)
    return num_bytes, num_weights


def gguf_name(name):
    """
    >>> gguf_name("model.layers.3.self_attn.q_proj.weight")
    'blk.3.attn_q.weight'
    """
    if name in GGUF_MODEL_NAMES:
        return GGUF_MODEL_NAMES[name]
    _, _, layer, *parts, kind = name.split(".")
    return f"blk.{layer}.{GGUF_NAMES['.'.join(parts)]}.{kind}"


def llama_cpp_row_order(name, values, config):
    """The inverse of `gguf.hugging_face_row_order`, for the weights and biases of q and k."""
    H, K, D = config.heads
    heads = {"q_proj": H, "k_proj": K}.get(name.split(".")[-2])
    if heads is None:
        return values
    halves = values.reshape(heads, 2, D // 2, -1)  # [H, 2, D/2, in]: a0 ... then b0 ...
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)


def rope_factors(checkpoint):
    """[D/2] float32, the divisors of the rotary frequencies, or None: llama.cpp has no key for
    "llama3" scaling, it takes what that scaling comes to."""
    config = checkpoint.config
    if checkpoint.rope_freq_factors is not None:
        return checkpoint.rope_freq_factors
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    plain = rope_frequencies(replace(config, rope_scaling=None))
    return (plain / rope_frequencies(config)).astype(np.float32)


# ---- keys ------------------------------------------------------------------------------------


def gguf_metadata(checkpoint, architecture):
    """The keys of the file. Those of a GGUF source are kept."""
    if isinstance(checkpoint, GGUFFile):
        metadata = {key: value for key, value in checkpoint.metadata.items()
                    if not key.startswith(LEFT_OUT)}
    else:
        metadata = {"general.type": "model", "general.name": checkpoint.path.resolve().name,
                    **_model_keys(checkpoint.config, architecture), **_tokenizer_keys(checkpoint)}
    return {**metadata, "general.quantization_version": gguf.GGML_QUANT_VERSION}


def _model_keys(config, architecture):
    keys = {
        "vocab_size": config.vocab_size,
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": config.rope_theta,
    }
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": config.rope_scaling.factor}
    return {f"{architecture}.{key}": value for key, value in keys.items()}


def _tokenizer_keys(checkpoint):
    """tokenizer.ggml.*, as llama.cpp's converter writes them.

    Raises InputError for a tokenizer that would come back as another one.
    """
    tokenizer = checkpoint.tokenizer()
    parts = tokenizer_to_dict(tokenizer)
    added = {token["id"]: token for token in parts["added_tokens"]}
    tokens = [added[id]["text"] if id in added else token
              for id, token in enumerate(parts["tokens"])]
    types = [NORMAL if id not in added else CONTROL if added[id]["special"] else USER_DEFINED
             for id in range(len(tokens))]
    keys = {
        "model": "gpt2",
        "pre": parts["family"],
        "tokens": tokens,
        "token_type": types,
        "merges": [f"{parts['tokens'][left]} {parts['tokens'][right]}"
                   for left, right in parts["merges"]],
        "add_bos_token": parts["add_bos_token"],
        "bos_token_id": parts["bos_token_id"],
        "eos_token_id": parts["eos_token_id"],
    }
    if not keys["merges"]:
        raise InputError("the tokenizer has no merges, and llama.cpp loads none without: write a "
                         ".safetensors file")
    _refuse_what_changes(tokenizer, keys)
    num_padding = checkpoint.config.vocab_size - len(tokens)
    if num_padding < 0:
        raise InputError(f"the tokenizer has {len(tokens)} tokens, and the model rows for only "
                         f"{checkpoint.config.vocab_size}, which llama.cpp refuses: get both from "
                         "one checkpoint")
    keys["tokens"] = tokens + [f"[PAD{len(tokens) + i}]" for i in range(num_padding)]
    keys["token_type"] = types + [UNUSED] * num_padding
    keys |= _end_keys(checkpoint.eos_token_ids, parts["eos_token_id"])
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    if checkpoint.chat_template is not None:
        keys["tokenizer.chat_template"] = checkpoint.chat_template
    return keys


def _refuse_what_changes(tokenizer, keys):
    """Raise InputError unless the keys make the same tokenizer again."""
    keys = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    ours, theirs = tokenizer_to_dict(tokenizer), tokenizer_to_dict(Tokenizer.from_gguf(keys))
    for parts in (ours, theirs) if not ours["nfc"] else ():
        for token in parts["added_tokens"]:
            token["normalized"] = False  # where nothing is normalised, it makes no difference
    different = [name for name in ours if ours[name] != theirs[name]]
    if different:
        raise InputError(f"a .gguf file cannot say what this tokenizer has under "
                         f"{', '.join(different)}: write a .safetensors file")


def _end_keys(eos_token_ids, eos_token_id):
    """A GGUF file has two keys for what ends an answer: the end of the text, and of a turn."""
    ids = sorted(eos_token_ids, key=lambda id: id != eos_token_id)
    if len(ids) > 2:
        warnings.warn(f"a .gguf file names two tokens that end an answer: {ids[2:]} are left out",
                      stacklevel=2)
    return dict(zip(("eos_token_id", "eot_token_id"), ids))


def _add_metadata(writer, metadata):
    for key, value in metadata.items():
        if not isinstance(value, list):
            writer.add_key_value(key, value, _value_type([value], "UINT32 INT32 UINT64 INT64"))
        elif value:  # the package writes no empty arrays
            kind = _value_type(value, "INT32 INT64 UINT64")
            writer.add_key_value(key, value, GGUFValueType.ARRAY, kind)


def _value_type(values, integer_types):
    """The first type that holds all values; llama.cpp expects numbers of 32 bits."""
    if isinstance(values[0], (bool, str)):
        return GGUFValueType.BOOL if isinstance(values[0], bool) else GGUFValueType.STRING
    if isinstance(values[0], float):
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0)
        fits = largest <= float(np.finfo(np.float32).max)
        return GGUFValueType.FLOAT32 if fits else GGUFValueType.FLOAT64
    ranges = {"UINT32": range(2**32), "INT32": range(-2**31, 2**31),
              "UINT64": range(2**64), "INT64": range(-2**63, 2**63)}
    return next(GGUFValueType[name] for name in integer_types.split()
                if min(values) in ranges[name] and max(values) in ranges[name])
