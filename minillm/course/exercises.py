"""Which functions are exercises, and where are the chapters that ask for them?

Exercises are found by looking through the package for the mark of `minillm/exercise.py`; there is
no list to keep up to date. Only the modules right inside `minillm/` are looked through: what lies
in its folders is not asked of students.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType

import minillm

from ..errors import InputError
from ..exercise import Mark

CHECKOUT = Path(minillm.__file__).resolve().parents[1]


@dataclass(frozen=True)
class Exercise:
    """One function or class that a chapter asks for; `reference` is the package's own."""

    name: str
    chapter: str
    reference: object

    @property
    def module(self):
        return sys.modules[self.reference.__module__]

    @property
    def twin_name(self):
        """The PyTorch form's name, "attention_torch" or "KVCacheTorch"; None if there is none."""
        name = self.name.removesuffix("_np") + "_torch"
        if inspect.isclass(self.reference):
            name = f"{self.name}Torch"
        return name if hasattr(self.module, name) else None


@functools.cache  # also because a mark is out of sight while a student's function is plugged in
def all_exercises():
    """Every Exercise, by chapter, in the order in which a student meets them."""
    found = []
    for info in pkgutil.iter_modules(minillm.__path__, "minillm."):
        if info.ispkg or info.name == "minillm.__main__":
            continue
        module = importlib.import_module(info.name)
        for name, thing in vars(module).items():
            # By type(), because isinstance() asks the thing itself, and a lazy torch would load.
            if not issubclass(type(thing), (FunctionType, type)):
                continue
            mark = vars(thing).get("exercise")  # not getattr: subclasses would inherit the mark
            if isinstance(mark, Mark) and thing.__module__ == module.__name__:
                found.append((mark.chapter, mark.order, Exercise(name, mark.chapter, thing)))
    found.sort(key=lambda entry: entry[:2])
    return tuple(entry[2] for entry in found)


def exercises_of(chapter):
    return [each for each in all_exercises() if each.chapter == chapter]


def find_chapter(text):
    """The chapter that "4", "04" or "04_attention" means.   Raises InputError for any other."""
    chapters = sorted({each.chapter for each in all_exercises()})
    for chapter in chapters:
        number = chapter.partition("_")[0]
        if text == chapter or text.isdecimal() and int(text) == int(number):
            return chapter
    raise InputError(f"chapter {text!r} has no exercise: choose one of {', '.join(chapters)}")


def course_folder():
    """The folder that holds chapters/ and tests/exercises/: the one you are in, or the checkout.

    Also a folder above the current one counts. What `course export` has written is such a folder.
    """
    here = Path.cwd()
    for folder in (here, *here.parents, CHECKOUT):
        if (folder / "chapters").is_dir() and (folder / "tests" / "exercises").is_dir():
            return folder
    raise InputError(f"no chapters are in {here}: go to the folder that holds chapters/ and tests/")


def starter_path(folder, chapter):
    return folder / "chapters" / chapter / "exercise.py"


def grader_path(folder, chapter):
    path = folder / "tests" / "exercises" / f"test_{chapter}.py"
    if not path.is_file():
        raise InputError(f"chapter {chapter} has no grader: {path} is not there")
    return path
