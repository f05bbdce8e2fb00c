"""How is a submission graded? In a process of its own, watched from here, and told in words.

Each check has a limit on time. When it runs out, or the process dies, that check has failed, and a
new process goes on with the next one: one endless loop costs one check, not the report.
The limits are against accidents. A submission can read your files and use your network as any
program that you start; grade strangers' code in a container or on a machine that you can lose.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .exercises import CHECKOUT

# What a submission's process inherits: enough to find Python and its packages, and no secrets.
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT", "VIRTUAL_ENV",
               "PYTHONHOME", "PYTHONPATH")


@dataclass(frozen=True)
class Limits:
    """seconds: for a submission.   check_seconds: for one check, or for loading the file."""

    seconds: float = 60.0
    check_seconds: float = 10.0
    memory_bytes: int = 2 * 2**30


@dataclass(frozen=True)
class Result:
    """How one check went.   status: "pass", "fail" or "unfilled"."""

    label: str
    status: str
    is_twin: bool = False
    expected: str = ""
    got: str = ""
    hint: str | None = None
    printed: str = ""

    def lines(self):
        if self.status == "pass":
            return [f"  ok    {self.label}"]
        if self.status == "unfilled":
            return []  # told once for all the checks that wait for the same function
        parts = [("expected", self.expected), ("got", self.got), ("likely", self.hint)]
        return [f"  FAIL  {self.label}",
                *(f"          {name:9} {text}" for name, text in parts if text)]


@dataclass
class Report:
    """What a submission is told. PyTorch twins are extra: they count for ok, not for the score."""

    chapter: str
    path: Path
    labels: list[str] = field(default_factory=list)
    twins: list[bool] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    refused: str | None = None

    @property
    def total(self):
        return self.twins.count(False)

    @property
    def passed(self):
        return sum(each.status == "pass" for each in self.results if not each.is_twin)

    @property
    def is_ok(self):
        """Every check passes, those of PyTorch twins included."""
        return not self.refused and bool(self.results) and not self._failing()

    def _failing(self):
        return [each for each in self.results if each.status != "pass"]

    @property
    def verdict(self):
        """One line: how far they are, and what comes next."""
        if self.refused:
            return f"refused: {self.refused}"
        score = f"{self.passed} of {self.total} checks pass"
        num_twins = self.twins.count(True)
        if num_twins:
            passed = sum(each.status == "pass" for each in self.results if each.is_twin)
            score += f", {passed} of {num_twins} on PyTorch"
        failing = self._failing()
        if not failing:
            return f"{score}; well done"
        first = failing[0]
        if first.status == "unfilled":
            return f"{score}; next: {first.got} is still to be written"
        return f"{score}; next: {first.label}"

    def lines(self):
        """The report, line by line; the verdict is the last."""
        yield f"chapter {self.chapter}: {self.path}"
        unfilled = Counter(each.got for each in self.results if each.status == "unfilled")
        for each in self.results:
            yield from each.lines()
        for name, count in unfilled.items():
            yield f"  ...   {name} is still to be written: {count} checks wait for it"
        printed = next((each.printed for each in self.results if each.printed.strip()), None)
        if printed:
            yield f"  your code prints, which is fine: {' '.join(printed.split())[:70]!r} ..."
        yield self.verdict

    def take(self, event, index=None, labels=None, twins=None, reason=None, **fields):
        """Note what worker.py reports."""
        if event == "plan":
            # The first plan of each process lacks the twins: the file is not loaded by then.
            if len(labels) > len(self.labels):
                self.labels, self.twins = labels, twins
        elif event == "refused":
            self.refused = reason
        elif event == "result":
            self.results.append(Result(self.labels[index], is_twin=self.twins[index], **fields))

    def fail_next(self, reason, hint=None):
        """The check that is under way, or would be next, has come to nothing."""
        self.take("result", len(self.results), status="fail", expected="an answer", got=reason,
                  hint=hint)


def grade(chapter, grader, submission, limits=None):
    """Grade one file in processes of its own; -> Report."""
    limits = limits or Limits()
    report = Report(chapter, submission)
    ends_at = time.monotonic() + limits.seconds
    with tempfile.TemporaryDirectory(prefix="minillm-grade-") as folder:
        while True:
            worker = Worker(report, grader, folder, limits)
            reason, hint = worker.follow(ends_at)
            if reason is None or report.labels and len(report.results) == len(report.labels):
                return report
            if not worker.has_loaded and not report.results:
                report.refused = (f"{submission.name} does not load: {reason}; {hint}, or a busy "
                                  "machine: if in doubt, try again")
                return report
            is_over = time.monotonic() >= ends_at
            if worker.has_loaded or not is_over:
                report.fail_next(reason, hint)
            while is_over and len(report.results) < len(report.labels):
                report.fail_next(f"not run: the {limits.seconds:g} s for all checks are used up")
            if len(report.results) == len(report.labels):
                return report


class Worker:
    """One process of worker.py.   has_loaded: it has got as far as the first check."""

    def __init__(self, report, grader, folder, limits):
        self.report, self.limits, self.has_loaded = report, limits, False
        job = {"chapter": report.chapter, "grader": str(grader), "submission": str(report.path),
               "finished": list(range(len(report.results))), "seconds": limits.seconds,
               "memory_bytes": limits.memory_bytes}
        environment = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(CHECKOUT), *filter(None, [environment.get("PYTHONPATH")])])
        environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TMPDIR": folder,
                        "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "minillm.course.worker", json.dumps(job)], cwd=folder,
            env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            start_new_session=True)
        self.lines = queue.Queue()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def follow(self, ends_at):
        """Note all that the worker reports; -> (why it did not come to its end, a hint).

        (None, None) if it did: every check is done, or the submission is refused.
        """
        seconds = self.limits.seconds  # the first line: Python and its libraries have to start
        try:
            while True:
                seconds = min(seconds, max(0.0, ends_at - time.monotonic()))
                try:
                    line = self.lines.get(timeout=seconds)
                except queue.Empty:
                    return (f"did not finish within {seconds:.3g} s",
                            "a loop that does not end, or far too much work")
                if line is None:
                    return self._death()
                fields = json.loads(line)
                self.report.take(**fields)
                if fields["event"] in ("refused", "end"):
                    return None, None
                self.has_loaded |= fields["event"] == "start"
                seconds = self.limits.check_seconds
        finally:
            self._end()

    def _death(self):
        code = self.process.wait()
        if code == -getattr(signal, "SIGXCPU", 0):
            return "used up its processor time", "a loop that does not end, or far too much work"
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        return f"ended the process {how}", "out of memory, os._exit(), or a crash in a library"

    def _end(self):
        """End the process and all that it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (AttributeError, ProcessLookupError, PermissionError):  # Windows; or gone already
            self.process.kill()
        self.process.wait()
        self.reader.join(timeout=1)  # longer only if something holds on to the pipe
