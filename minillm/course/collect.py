"""A folder of submissions, graded one after the other: a row for each file.

A submission is a file (`ada.py`) or a folder (`ada/exercise.py`, `ada/04/exercise.py`). Which
chapter a file belongs to is seen from the names that it defines, misspelt ones included; it is
not run to find out.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError
from .exercises import all_exercises, grader_path
from .grading import grade
from .submission import close_name, handed_in, parse_submission

COLUMNS = ("name", "chapter", "passed", "total", "percent", "verdict", "file")


@dataclass(frozen=True)
class Row:
    """One file's outcome; chapter is None where it answers none."""

    name: str
    file: str
    chapter: str | None
    passed: int
    total: int
    verdict: str

    def values(self):
        percent = round(100 * self.passed / self.total) if self.total else 0
        return (self.name, self.chapter or "", self.passed, self.total, percent, self.verdict,
                self.file)


def grade_folder(folder, course, chapter, limits):
    """Grade every submission in a folder; yields Rows.   chapter: only this one, if not None."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder: name the one that holds the submissions")
    paths = [path for path in sorted(folder.rglob("*.py")) if not _is_hidden(path, folder)]
    if not paths:
        raise InputError(f"{folder} holds no .py file: name the folder that holds the submissions")
    for path in tqdm(paths, desc="grading", unit="file"):
        name = path.relative_to(folder).parts[0].removesuffix(".py")
        file = str(path.relative_to(folder))
        try:
            chapters = [chapter] if chapter else chapters_of(path)
        except InputError as error:
            yield Row(name, file, None, 0, 0, f"refused: {error}")
            continue
        if not chapters:
            yield Row(name, file, None, 0, 0, "no function of any chapter is in it")
        for each in chapters:
            report = grade(each, grader_path(course, each), path.resolve(), limits)
            yield Row(name, file, each, report.passed, report.total, report.verdict)


def chapters_of(path):
    """The chapters whose functions a file defines: most of them by name, the rest by likeness."""
    names = handed_in(parse_submission(path), [each.name for each in all_exercises()])
    exact = [each.chapter for each in all_exercises() if each.name in names]
    alike = [each.chapter for each in all_exercises() if close_name(each.name, names)]
    return list(dict.fromkeys(exact or alike))


def write_csv(rows, file):
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        # A spreadsheet would run a cell that begins like a formula, and these are others' words.
        writer.writerow([f"'{value}" if str(value).startswith(("=", "+", "-", "@")) else value
                         for value in row.values()])
        file.flush()


def write_table(rows, file):
    for row in rows:
        print(f"{row.name:24} {row.chapter or '-':24} {row.passed:3} of {row.total:<3} "
              f"{row.verdict}", file=file, flush=True)


def _is_hidden(path, folder):
    return any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
