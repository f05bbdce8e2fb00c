"""Measurements: one a file, and `draw.py`, which gives their figures one look.

The module of a measurement has three functions. `measure()` returns {"arguments": ..., "samples":
...} and whatever else its figure needs; that is written as JSON, with the machine, the versions
and the commit. `figure(result)` and `table(result)` make what is published, from that file alone.
One that compares with an engine which is no requirement of minillm names it in REQUIRED_TO_PUBLISH
{module: what pip installs}, and measures without it where nothing is published.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from pathlib import Path

from tqdm import tqdm

from ..errors import InputError
from . import draw
from .machine import describe_machine

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"

# name: the chapter whose results/ it fills; the measurement is minillm.bench.NAME
BENCHMARKS = {
    "first_token": "01_first_token",
    "vocabulary": "02_tokenizer",
    "block": "03_transformer_block",
    "attention": "04_attention",
    "roofline": "05_model",
    "sampling": "06_sampling",
    "kv_cache": "07_kv_cache",
    "batching": "08_batching",
    "paged_cache": "09_paged_cache",
    "throughput": "10_continuous_batching",
    "load": "10_continuous_batching",
    "quantization": "11_quantization",
    "peers": "peers",
}


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
    names = list(BENCHMARKS) if name == "all" else [name]
    if out is None:
        check_requirements(names)
    for each in tqdm(names, desc="benchmarks", disable=name != "all"):
        folder = Path(out) if out else CHAPTERS / BENCHMARKS[each] / "results"
        folder.mkdir(parents=True, exist_ok=True)
        measurement = importlib.import_module(f"{__name__}.{each}")
        result = {"benchmark": each, "fast": is_fast(), "machine": describe_machine(),
                  **measurement.measure()}
        (folder / f"{each}.json").write_text(json.dumps(result, indent=1) + "\n")
        draw.publish(folder, each, measurement)
        print(f"{each}: {folder}", file=sys.stderr)


def check_requirements(names):
    """Raise InputError, before minutes are spent, where a published table would lose its peers."""
    for name in names:
        measurement = importlib.import_module(f"{__name__}.{name}")
        for module, requirement in getattr(measurement, "REQUIRED_TO_PUBLISH", {}).items():
            if importlib.util.find_spec(module) is None:
                raise InputError(f"the table of bench {name} compares with {module}, which is not "
                                 f"installed: pip install {requirement}, or name a folder with "
                                 "--out to measure without it")
