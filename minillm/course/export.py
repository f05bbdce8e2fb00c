"""The folder that an instructor hands out: everything but the solutions and the tests of graders.

minillm comes as an archive that pip installs, so that the folder works wherever it is copied. The
solutions lie in there: out of sight, and no secret.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import minillm

from ..errors import InputError
from .exercises import CHECKOUT, all_exercises, starter_path
from .starters import starter

README = """\
# {title}

Set up once, in this folder (Python 3.11 or newer):

```
python3 -m venv .venv
.venv/bin/python -m pip install -r requirements.txt
.venv/bin/python -m minillm fetch smollm2-135m-instruct
```

For each chapter: read `chapters/NN_.../README.md` and run the notebook of the same name in
`notebooks/`; predict before you look. Write the functions in `chapters/NN_.../exercise.py`. Then

```
.venv/bin/python -m minillm grade 04
.venv/bin/python -m minillm generate "Once upon a time" --temperature 0 \\
    --impl chapters/04_attention/exercise.py
```

The first says which checks pass and what is wrong. The second writes text with the finished
engine, in which your functions have taken the place of its own.

Chapters: {chapters}

The solutions are not secret. The engine that you installed *is* the solution: `packages/` holds
its source, and it is public. Nothing stops you from looking but the wish to find out yourself; the
grader runs your code with the engine's own functions out of reach, so importing them is no answer.
"""

LEFT_OUT = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".DS_Store")


def export_course(target):
    """Write the hand-out to a folder that does not exist yet, or is empty; -> its path."""
    target = Path(target)
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise InputError("course export copies from a checkout of minillm, and this one is "
                         "installed: run it in the repository")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there already: name a folder that does not exist yet")
    if target.resolve().is_relative_to(CHECKOUT / "chapters"):
        raise InputError(f"{target} is inside chapters/, which is to be copied: name another place")
    graders = target / "tests" / "exercises"
    graders.mkdir(parents=True)
    exported = []
    for chapter in dict.fromkeys(each.chapter for each in all_exercises()):
        folder, grader = CHECKOUT / "chapters" / chapter, f"tests/exercises/test_{chapter}.py"
        if not folder.is_dir() or not (CHECKOUT / grader).is_file():
            continue
        exported.append(chapter)
        shutil.copytree(folder, target / "chapters" / chapter, ignore=LEFT_OUT)
        # Not copied: an instructor may have solved it in place.
        starter_path(target, chapter).write_text(starter(chapter), encoding="utf-8")
        shutil.copy(CHECKOUT / grader, graders)
    for path in sorted((CHECKOUT / "notebooks").glob("*")):
        if path.stem in exported:
            (target / "notebooks").mkdir(exist_ok=True)
            shutil.copy(path, target / "notebooks")
    archive = write_package(target / "packages")
    (target / "requirements.txt").write_text(
        f"# Run pip in this folder: the path below starts here.\n./packages/{archive.name}\n"
        "jupyter\nmatplotlib\n")
    (target / "README.md").write_text(
        README.format(title="How LLM inference works", chapters=", ".join(exported)),
        encoding="utf-8")
    return target


def write_package(folder):
    """minillm as a source archive that `pip install` takes; -> its path."""
    folder.mkdir()
    path = folder / f"minillm-{minillm.__version__}.zip"
    files = [CHECKOUT / "pyproject.toml", CHECKOUT / "README.md",
             *sorted(path for path in (CHECKOUT / "minillm").rglob("*")
                     if path.is_file() and "__pycache__" not in path.parts)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            archive.write(file, Path(path.stem) / file.relative_to(CHECKOUT))
    return path
