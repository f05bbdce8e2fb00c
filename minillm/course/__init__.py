"""Exercises: what a student writes, runs inside the finished engine, and has graded.

    exercises.py    which functions are exercises, and where the chapters are
    starters.py     the files that students fill in, made from the package
    submission.py   a student's file, loaded or refused in words
    plug.py         `using(...)`: a student's function in the place of ours
    check.py        what graders are written with
    subject.py      a student's function as a grader sees it: counted, its inputs watched
    worker.py       the process that runs the checks
    grading.py      the process that watches it, and the report
    collect.py      a folder of submissions, a row each
    export.py       the folder that is handed out
    commands.py     grade · course, on the command line
"""

from .plug import using

__all__ = ["using"]
