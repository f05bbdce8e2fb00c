"""The outside world: checkpoints in the two formats that hold numbers and no code."""

from __future__ import annotations

from pathlib import Path


def open_checkpoint(path: Path):
    """A GGUFFile or a HuggingFaceFolder: two formats, one interface (config, tensor, tokenizer)."""
    if path.is_dir():
        from .safetensors import HuggingFaceFolder

        return HuggingFaceFolder(path)
    from .gguf import GGUFFile

    return GGUFFile(path)
