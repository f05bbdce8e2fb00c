"""The process in which a student's code runs: it loads the file, runs the checks, and reports each.

`grading.py` starts it and ends it; run_checks() is also called directly where the code can be
trusted (the tests that grade the graders). Reports are lines of JSON on what was standard output;
what the student prints goes nowhere but into the report.

The limits keep accidents from hurting. They are no prison: the code runs as the user who grades.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path

from ..errors import InputError
from .check import CheckFailed, checks_of
from .exercises import exercises_of
from .plug import using
from .subject import Subject, Unfilled
from .submission import describe_error, line_of, load_submission, take_function

MAX_PRINTED = 300  # characters of what a check printed that are kept
MAX_FILE_BYTES = 2**26


def main(job):
    """job: chapter, grader, submission, finished (checks not to run again), memory_bytes."""
    reports = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)

    def report(**fields):
        reports.write(json.dumps(fields) + "\n")
        reports.flush()

    path = Path(job["submission"])
    if re.search(rb"^\s*(import|from)\s+torch\b", path.read_bytes(), re.MULTILINE):
        importlib.import_module("torch")  # before the limit: it is not the student's memory
    set_limits(job["memory_bytes"], job["seconds"])
    run_checks(job["chapter"], job["grader"], path, report, set(job["finished"]))
    os._exit(0)  # a thread that the student left running would keep the process


def set_limits(memory_bytes, seconds):
    """Limits of the operating system, on top of what is in use; only Unix has them."""
    try:
        import resource
    except ImportError:
        return
    statm = Path("/proc/self/statm")
    if statm.exists():  # where it is not (macOS), RLIMIT_AS limits nothing either
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + memory_bytes,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds) + 2,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES,) * 2)


def run_checks(chapter, grader, path, report, finished=frozenset(), only=None):
    """Load the submission and run every check on it.

    report: called with event="plan" (labels, twins), then for each check event="start" (index) and
    event="result", and at last event="end"; or with event="refused" (reason).
    only: names of functions; checks of others are left out, and these need not be there.
    """
    wanted = [each for each in exercises_of(chapter) if only is None or each.name in only]
    # The package's own solutions are out of reach from here on, for students and for graders.
    with using(**forbidden(exercises_of(chapter))):
        names = {each.name: each.name for each in wanted}
        checks = [each for each in checks_of(load_grader(grader)) if {*each.subjects} <= {*names}]
        plan = [(each, names) for each in checks]
        announce(report, plan)
        output = Output()
        try:
            with redirected(output):
                module = load_submission(path)
                twins = {each.name: each.twin_name for each in wanted
                         if each.twin_name in vars(module)}
                things = {name: take_function(module, name)
                          for name in (*names, *twins.values())}
        except InputError as error:
            report(event="refused", reason=str(error))
            return
        plan += [(each, names | twins) for each in checks
                 if each.twin and {*each.subjects} & {*twins}]
        announce(report, plan)
        for index, (each, chosen) in enumerate(plan):
            if index in finished:
                continue
            report(event="start", index=index)
            subjects = {name: Subject(chosen[name], things[chosen[name]], chosen[name] != name)
                        for name in each.subjects}
            report(event="result", index=index, **run_check(each, subjects, path))
    report(event="end")


def announce(report, plan):
    """plan: pairs of a check and {exercise: the name of what is tested, itself or its twin}."""
    labels = [f"{', '.join(chosen[name] for name in each.subjects)}: {each.title}"
              for each, chosen in plan]
    report(event="plan", labels=labels,
           twins=[any(chosen[name] != name for name in each.subjects) for each, chosen in plan])


def forbidden(exercises):
    """Stand-ins for the package's own solutions, which refuse to be called."""
    def refuse(name, module):
        def refused(*args, **kwargs):
            raise CheckFailed(f"{name} to be your own work", f"a call of minillm's own {name}",
                              "compute the result in your function")

        refused.__module__ = module  # a student who hands it back is told where it comes from
        return refused

    return {name: refuse(name, each.module.__name__) for each in exercises
            for name in (each.name, each.twin_name) if name}


def load_grader(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    grader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grader)
    return grader


def run_check(check, subjects, path):
    """-> the fields of a result: status "pass", "fail" or "unfilled", and what to say about it."""
    output = Output()
    status, expected, got, hint = "fail", "", "", None
    try:
        with redirected(output):
            check.function(**subjects)
            for subject in subjects.values():
                if subject.calls == 0:
                    raise CheckFailed(f"a call of {subject.name}", "none", "the grader is at "
                                      "fault, not you: please report it")
        status = "pass"
    except Unfilled as error:
        status, got = "unfilled", str(error)
    except CheckFailed as error:
        expected, got = error.expected, error.got
        hint = error.hint or check.hint or error.general_hint
    except MemoryError as error:
        expected, got = "less memory", describe_error(error, path)
        hint = "it asked for more memory than the limit: look at the shapes in that line"
    except BaseException as error:  # also sys.exit() and KeyboardInterrupt: this is their code
        expected, got = "an answer", describe_error(error, path)
        hint = explain(error, path) or check.hint
    return {"status": status, "expected": expected, "got": got, "hint": hint,
            "printed": output.getvalue()}


def explain(error, path):
    """What usually lies behind an exception."""
    if isinstance(error, RecursionError):
        return "the function calls itself without end"
    if isinstance(error, EOFError):
        return "nobody is there to answer input(): take it out"
    if isinstance(error, SystemExit):
        return "take exit() out: the function is to return"
    if not line_of(error, path):
        return "the answer has another form than the docstring says"
    return None


class Output(io.StringIO):
    """Keeps the beginning of what is written, however much there is."""

    def write(self, text):
        super().write(text[: max(0, MAX_PRINTED - self.tell())])
        return len(text)


@contextlib.contextmanager
def redirected(output):
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
