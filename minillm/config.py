"""What is a model? A handful of numbers, carried under the names that config.json gives them.

Chapter 05_model tells the story. Left out on purpose: everything about training (dropout,
initialisation), and every architecture that is not a pre-norm decoder with RMSNorm, RoPE,
grouped-query attention and SwiGLU; `loading/` refuses those by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import InputError


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for a longer context; `rope.py` has the formulas.

    rope_type "linear" uses only `factor`; "llama3" uses all four numbers.
    """

    rope_type: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """The shape of one decoder-only transformer (letters as in the README's shape table)."""

    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int  # L
    num_attention_heads: int  # H
    num_key_value_heads: int  # K
    head_dim: int  # D, often but not always C / H
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # q, k and v carry a bias
    attention_out_bias: bool = False  # o carries one
    mlp_bias: bool = False  # gate, up and down carry one
    qk_norm: bool = False  # RMSNorm over each query and key head (Qwen3)

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "head_dim",
                     "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"num_attention_heads {self.num_attention_heads} is no multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim {self.head_dim} is odd: rotary pairs need an even one")

    @property
    def heads(self):
        """(H, K, D): query heads, key/value heads, entries a head."""
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim
