"""How does a .gguf file become a model? Its tensors under Hugging Face's names, in their row order.

GGUF is llama.cpp's format. It holds in one file what a Hugging Face folder holds in many, with
other names for the tensors (`blk.0.attn_q.weight` for `model.layers.0.self_attn.q_proj.weight`)
and, for the llama architecture, which covers Mistral, with the rows of q and k in another order.

Chapter 05_model tells the story of loading. `gguf_container.py` knows how a file is laid out,
`gguf_blocks.py` how its numbers are quantized, `gguf_config.py` what its keys say. Left out on
purpose: tensors that no supported model reads; a file that has one is refused, because a part of
a model that is left out makes another model.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ..errors import InputError
from .checkpoint import Checkpoint
from .gguf_blocks import dequantize
from .gguf_config import (
    architecture_from_gguf,
    chat_template_from_gguf,
    config_from_gguf,
    eos_token_ids_from_gguf,
)
from .gguf_container import GGUFContainer

MODEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
NORM_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
QWEN3_NORM_NAMES = {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
PROJECTION_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # no weight of the model: it has no name at Hugging Face


class GGUFFile(Checkpoint):
    """A checkpoint in one .gguf file, with the interface of `safetensors.HuggingFaceFolder`.

    config: ModelConfig                    metadata: every key of the file
    eos_token_ids: tuple of int            chat_template: Jinja source or None
    rope_freq_factors: [D/2] float32 or None; Llama 3.1 divides its rotary frequencies by them

    Everything but the weights is read and checked at once, the weights when they are asked for.
    Raises InputError, one line that names the file, for what is wrong or not supported in it.
    """

    def __init__(self, path: str | Path):
        self._container = GGUFContainer(path)
        self.path = self._container.path
        self.metadata = self._container.metadata
        try:
            self._architecture = architecture_from_gguf(self.metadata)
            self._infos = self._infos_by_hugging_face_name()
            shapes = {name: info.shape for name, info in self._infos.items()}
            self.config = config_from_gguf(self.metadata, shapes)
            self._refuse_surplus_layers()
            self.eos_token_ids = eos_token_ids_from_gguf(self.metadata, self.config.vocab_size)
            self.chat_template = chat_template_from_gguf(self.metadata)
            self.rope_freq_factors = self._read_rope_freq_factors()
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def tensor(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor as a fresh float32 array of that shape."""
        block_format, raw = self.blocks(name)
        self.check_shape(name, shape)
        try:
            return dequantize(block_format, raw)
        except InputError as error:
            raise InputError(f"{self.path}: tensor {name!r}: {error}") from error

    def blocks(self, name: str):
        """The tensor as it is stored: a gguf.GGMLQuantizationType, and [..., bytes of a row] uint8.

        The bytes are a read-only view of the file, or a copy where their rows were out of order.
        """
        if name not in self._infos:
            raise InputError(f"{self.path} has no tensor {name!r}, which its keys imply: get the "
                             "file again")
        info = self._infos[name]
        raw = self._container.raw(info.name)
        if self._architecture == "llama" and ".q_proj." in name:
            raw = self._reorder(info, raw, self.config.num_attention_heads)
        elif self._architecture == "llama" and ".k_proj." in name:
            raw = self._reorder(info, raw, self.config.num_key_value_heads)
        return info.block_format, raw

    def check_shape(self, name, shape):
        """Raise InputError unless the file's tensor `name` has this shape."""
        stored_shape = self._infos[name].shape
        if stored_shape != tuple(shape):
            raise InputError(f"{self.path}: tensor {name!r} has shape {list(stored_shape)}, the "
                             f"file's keys imply {list(shape)}: get the file again")

    def tokenizer(self):
        from ..tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.metadata)

    def _infos_by_hugging_face_name(self):
        """Where every tensor is, under the name that it has at Hugging Face."""
        return {hugging_face_name(name, self._architecture): info
                for name, info in self._container.tensors.items() if name != ROPE_FACTORS}

    def _refuse_surplus_layers(self):
        layers = [int(name.split(".")[2]) for name in self._infos if ".layers." in name]
        num_layers = self.config.num_hidden_layers
        if max(layers, default=0) >= num_layers:
            raise InputError(f"{self._architecture}.block_count is {num_layers}, but there are "
                             f"tensors of block {max(layers)}: get the file again")

    def _read_rope_freq_factors(self):
        if ROPE_FACTORS not in self._container.tensors:
            return None
        info, size = self._container.tensors[ROPE_FACTORS], self.config.head_dim // 2
        if info.shape != (size,):
            raise InputError(f"tensor {ROPE_FACTORS!r} has shape {list(info.shape)}, must have "
                             f"[{size}], half of head_dim: get the file again")
        factors = dequantize(info.block_format, self._container.raw(ROPE_FACTORS))
        if not np.all((factors > 0) & np.isfinite(factors)):
            raise InputError(f"tensor {ROPE_FACTORS!r} holds {factors.min()} ... {factors.max()}, "
                             "must hold positive numbers: get the file again")
        return factors

    def _reorder(self, info, raw, heads):
        num_rows = heads * self.config.head_dim
        if info.shape[0] != num_rows or info.size_bytes % num_rows:
            raise InputError(f"{self.path}: tensor {info.name!r} has shape {list(info.shape)} in "
                             f"{info.block_format.name}, must have {num_rows} separate rows for "
                             f"{heads} heads: get the file again")
        return hugging_face_row_order(raw, heads, num_rows)


def hugging_face_name(name: str, architecture: str) -> str:
    """
    >>> hugging_face_name("blk.3.attn_q.weight", "llama")
    'model.layers.3.self_attn.q_proj.weight'
    """
    if name in MODEL_NAMES:
        return MODEL_NAMES[name]
    parts = re.fullmatch(r"blk\.(0|[1-9][0-9]*)\.(\w+)\.(weight|bias)", name)
    if parts:
        layer, part, kind = parts.groups()
        norms = NORM_NAMES | QWEN3_NORM_NAMES if architecture == "qwen3" else NORM_NAMES
        names = PROJECTION_NAMES | norms if kind == "weight" else PROJECTION_NAMES
        if part in names:
            return f"model.layers.{layer}.{names[part]}.{kind}"
    raise InputError(f"tensor {name!r} belongs to no {architecture} model that is supported: "
                     "use a plain decoder of that architecture")


def hugging_face_row_order(raw, heads, num_rows):
    """Undo the order of rows in which llama.cpp keeps the q and k of a llama model.

    Rotary embedding turns pairs of a head's numbers. Hugging Face pairs number i with i + D/2,
    llama.cpp pairs neighbours, so its converter moved the rows of each head, here with D = 8:

        Hugging Face   a0 a1 a2 a3 b0 b1 b2 b3         pairs: (a0, b0) ... (a3, b3)
        GGUF           a0 b0 a1 b1 a2 b2 a3 b3

    GGUF's order is a table of D/2 pairs; its columns, one after the other, are Hugging Face's:

        a0 b0
        a1 b1     read down,        a0 a1 a2 a3
        a2 b2     transposed   ->   b0 b1 b2 b3
        a3 b3

    raw: [H·D, bytes of a row] or [bytes of H·D numbers], uint8   ->   the same shape, a copy
    Whole rows move, so the blocks inside them need not be dequantized first. With grouped heads
    k has fewer of them than q: `heads` is the K of the shape table for k, the H for q.
    """
    pairs = raw.reshape(heads, num_rows // heads // 2, 2, -1)  # [H, D/2, 2, bytes of a row]
    return pairs.swapaxes(1, 2).reshape(raw.shape)
