"""Measurements: one a file, and `draw.py`, which turns their JSON into a figure and a table.

A measurement writes every sample, the machine, the versions, the commit and its arguments; what is
published is drawn from that file and from nothing else.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from ..errors import InputError

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"

# name: (module, the chapter whose results/ it fills)
BENCHMARKS = {"peers": ("minillm.bench.peers", "peers")}


def is_fast():
    """MINILLM_FAST=1 shrinks every size, so that a test can run it; nothing is measured then."""
    return os.environ.get("MINILLM_FAST") == "1"


def run_benchmark(name, out=None):
    """Measure `name` (or "all"), write its JSON and figure to `out`, fill the tables it feeds."""
    if name != "all" and name not in BENCHMARKS:
        raise InputError(f"benchmark {name!r} is unknown: choose all, {', '.join(BENCHMARKS)}")
    if out is None and is_fast():
        raise InputError("MINILLM_FAST=1 measures nothing worth publishing: name a folder for it "
                         "with --out")
    if out is None and not CHAPTERS.is_dir():
        raise InputError("an installed minillm has no chapters to write to: name a folder with "
                         "--out")
    for each in BENCHMARKS if name == "all" else [name]:
        module, chapter = BENCHMARKS[each]
        folder = Path(out) if out else CHAPTERS / chapter / "results"
        folder.mkdir(parents=True, exist_ok=True)
        importlib.import_module(module).run(folder)
        print(f"{each}: {folder}")
