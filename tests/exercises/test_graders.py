"""The graders are graded: wrong code fails with the right words, right code passes.

Everything here is our own code, so it runs in this process; test_course.py takes the same road
as a student, through the command line and its processes.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from minillm.course.exercises import all_exercises, exercises_of
from minillm.course.grading import Report
from minillm.course.starters import solution, starter
from minillm.course.submission import defined_names
from minillm.course.worker import run_checks

HERE = Path(__file__).parent
CHAPTERS = [chapter for chapter in dict.fromkeys(each.chapter for each in all_exercises())
            if (HERE / f"test_{chapter}.py").exists()]
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NaN is what mutants make
MIN_MUTANTS, MIN_ALTERNATIVES = 3, 1


def files(kind, chapter):
    return sorted((HERE / kind / chapter[:2]).glob("*.py"))


def every(kind):
    return pytest.mark.parametrize("chapter, path", [
        pytest.param(chapter, path, id=f"{chapter}:{path.stem}")
        for chapter in CHAPTERS for path in files(kind, chapter)])


every_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


def asked_for(chapter, path):
    """The exercises that a file defines: a mutant need not write those that it does not spoil."""
    names = defined_names(ast.parse(path.read_text()))
    return [each.name for each in exercises_of(chapter) if each.name in names]


def grade(chapter, path, only=None):
    report = Report(chapter, path)
    run_checks(chapter, HERE / f"test_{chapter}.py", path, report.take, only=only)
    return report


@every("mutants")
def test_a_mutant_fails_with_a_message_that_names_the_symptom(chapter, path):
    symptom = ast.get_docstring(ast.parse(path.read_text()))
    report = grade(chapter, path, asked_for(chapter, path))
    assert not report.refused and not report.is_ok
    assert any(symptom in line for line in report.lines()), "\n".join(report.lines())


@every("alternatives")
def test_an_alternative_passes(chapter, path):
    report = grade(chapter, path, asked_for(chapter, path))
    assert report.is_ok, "\n".join(report.lines())


@every_chapter
def test_the_packages_own_functions_pass(chapter, tmp_path):
    path = tmp_path / "solution.py"
    path.write_text(solution(chapter))
    report = grade(chapter, path)
    assert report.is_ok, "\n".join(report.lines())


@every_chapter
def test_the_starter_fails_and_says_what_is_to_be_written(chapter, tmp_path):
    path = tmp_path / "exercise.py"
    path.write_text(starter(chapter))
    report = grade(chapter, path)
    assert report.passed == 0 and report.total > 0
    for each in exercises_of(chapter):
        assert any(f"{each.name}" in line and "still to be written" in line
                   for line in report.lines())


@every_chapter
def test_every_exercise_has_checks_mutants_and_alternatives(chapter):
    for each in exercises_of(chapter):
        for kind, least in (("mutants", MIN_MUTANTS), ("alternatives", MIN_ALTERNATIVES)):
            count = sum(each.name in asked_for(chapter, path) for path in files(kind, chapter))
            assert count >= least, f"{each.name} has {count} {kind}, needs {least}"
