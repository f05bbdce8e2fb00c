"""The outside world: checkpoints, in formats that hold numbers and no code."""

from __future__ import annotations

from pathlib import Path


def open_checkpoint(path: Path):
    """A GGUFFile, a HuggingFaceFolder or a QuantizedFile: three formats, one interface."""
    if path.is_dir():
        from .safetensors import HuggingFaceFolder

        return HuggingFaceFolder(path)
    if path.suffix.lower() == ".safetensors":
        from .quantized_file import QuantizedFile

        return QuantizedFile(path)
    from .gguf import GGUFFile

    return GGUFFile(path)
