"""The exercises on the command line: grade, course, and `generate --impl`."""

from __future__ import annotations

import contextlib
import sys

from ..errors import InputError
from .collect import grade_folder, write_csv, write_table
from .exercises import (
    all_exercises,
    course_folder,
    find_chapter,
    grader_path,
    starter_path,
)
from .export import export_course
from .grading import Limits, grade
from .plug import using
from .starters import write_starters
from .submission import (
    close_name,
    describe_error,
    find_submission,
    handed_in,
    is_unfilled,
    load_submission,
    parse_submission,
    take_function,
)

EXIT_NOT_YET = 1


def add_commands(command):
    """command: cli.py's function that adds a subcommand."""
    grade_command = command("grade", run_grade, "check an exercise, or a folder of submissions")
    grade_command.add_argument("chapter", nargs="?", metavar="CHAPTER", help="such as 04")
    grade_command.add_argument("--impl", metavar="FILE",
                               help="your functions; by default the chapter's exercise.py")
    grade_command.add_argument("--submissions", metavar="FOLDER",
                               help="grade every file in it, each in a process of its own")
    grade_command.add_argument("--csv", action="store_true",
                               help="with --submissions: a row of CSV for each file")
    limits = Limits()
    grade_command.add_argument("--seconds", type=float, default=limits.seconds, metavar="S",
                               help=f"for a submission; the default is {limits.seconds:g}")
    grade_command.add_argument("--check-seconds", type=float, default=limits.check_seconds,
                               metavar="S", help="for one check; the default is "
                               f"{limits.check_seconds:g}")
    grade_command.add_argument("--memory-gib", type=float, default=limits.memory_bytes / 2**30,
                               metavar="G", help="for a submission; the default is "
                               f"{limits.memory_bytes / 2**30:g}")
    course_command = command("course", run_course, "for instructors and authors")
    actions = course_command.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("starters", help="write every chapter's exercise.py from the package anew")
    export_action = actions.add_parser("export", help="write the folder that students get")
    export_action.add_argument("folder", metavar="FOLDER")


def run_grade(args):
    limits = read_limits(args)
    chapter = find_chapter(args.chapter) if args.chapter else None
    course = course_folder()
    if args.submissions:
        if args.impl:
            raise InputError("--impl is one file and --submissions a folder: choose one of them")
        rows = grade_folder(args.submissions, course, chapter, limits)
        (write_csv if args.csv else write_table)(rows, sys.stdout)
        return 0
    if args.csv:
        raise InputError("--csv is for a folder of submissions: add --submissions FOLDER")
    if chapter is None:
        raise InputError("which chapter? Give its number, such as 04, or --submissions FOLDER")
    path = find_submission(args.impl or starter_path(course, chapter))
    report = grade(chapter, grader_path(course, chapter), path, limits)
    if report.refused:
        raise InputError(report.refused)
    for line in report.lines():
        print(line)
    return 0 if report.is_ok else EXIT_NOT_YET


def read_limits(args):
    for name in ("seconds", "check_seconds", "memory_gib"):
        if not 0 < getattr(args, name) < 1e6:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name):g}, must be "
                             "above 0 and below 1000000")
    return Limits(args.seconds, args.check_seconds, int(args.memory_gib * 2**30))


def run_course(args):
    if args.action == "starters":
        for path in write_starters():
            print(path)
    else:
        print(export_course(args.folder))


@contextlib.contextmanager
def plugged_in(path, backend):
    """Run the engine on the functions in a student's file, of whatever chapters; says on standard
    error what was used, so that nobody takes the engine's own work for theirs. Yields their names.
    """
    if path is None:
        yield []
        return
    path = find_submission(path)
    functions, unfilled = read_functions(path)
    functions = for_backend(functions, backend, path)
    for name in unfilled:
        print(f"[{name} is still to be written: the engine uses its own]", file=sys.stderr)
    try:
        with using(**functions) as plugged:
            yield list(functions)
    except InputError:
        raise
    except Exception as error:
        text = describe_error(error, path)
        if " in line " not in text:
            raise  # not in the student's code, though perhaps through it: show all of it
        raise InputError(f"your code failed: {text}") from None
    for name, entry in plugged.items():
        print(f"[your {name}: {entry.calls} calls]" if entry.calls else
              f"[your {name} was not called on the way to this text]", file=sys.stderr)


def read_functions(path):
    """-> ({name: function} of what the file has written, [names that are still to be written])."""
    names = [name for each in all_exercises() for name in (each.name, each.twin_name) if name]
    nodes = handed_in(parse_submission(path), names)
    for name in names:
        similar = close_name(name, [other for other in nodes if other not in names])
        if name not in nodes and similar:
            raise InputError(f"{path.name} has {similar}: is that {name}, misspelt?")
    found = [name for name in names if name in nodes]
    if not found:
        raise InputError(f"{path.name} has no function of any chapter: look at the names in "
                         "chapters/NN_.../exercise.py")
    unfilled = [name for name in found if nodes[name] is not None and is_unfilled(nodes[name])]
    if unfilled == found:
        raise InputError(f"{', '.join(unfilled)} in {path.name} is still to be written")
    module = load_submission(path)
    return {name: take_function(module, name) for name in found if name not in unfilled}, unfilled


def for_backend(functions, backend, path):
    """The functions that this backend can call.   Raises InputError for one that it never would."""
    chosen = dict(functions)
    for each in all_exercises():
        if not each.twin_name:
            continue  # no matter of arrays or tensors: both backends call it
        if backend == "torch" and each.name in functions and each.twin_name not in functions:
            raise InputError(f"{each.name} in {path.name} is for NumPy: use --backend numpy, or "
                             f"write {each.twin_name} too")
        chosen.pop(each.name if backend == "torch" else each.twin_name, None)
    return chosen
