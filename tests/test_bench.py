"""Benchmarks run, in small, and what is published is what was measured."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minillm import LLM, InputError
from minillm.bench import BENCHMARKS, CHAPTERS, draw, llamacpp, peers, run_benchmark
from minillm.bench.machine import describe_machine

REPOSITORY = CHAPTERS.parent


@pytest.fixture(scope="module")
def fast_peers(tmp_path_factory, model_path):
    """The files of a shrunken run of `bench peers`."""
    folder = tmp_path_factory.mktemp("peers")
    command = [sys.executable, "-m", "minillm", "bench", "peers", "--out", str(folder)]
    subprocess.run(command, check=True, env=os.environ | {"MINILLM_FAST": "1"}, cwd=REPOSITORY,
                   capture_output=True)
    return folder


def test_peers_records_every_sample(fast_peers):
    result = json.loads((fast_peers / "peers.json").read_text())
    contestants = list(result["contestants"])
    assert [(sample["contestant"], sample["round"]) for sample in result["samples"]] == [
        (name, number) for number in range(2) for name in contestants], "turns are interleaved"
    for sample in result["samples"]:
        times_s = sample["token_times_s"]
        assert len(times_s) == 4 and sorted(times_s) == times_s and times_s[0] > 0
    for about in result["contestants"].values():
        assert about["load_s"] > 0 and about["peak_memory_bytes"] > about["memory_before_bytes"] > 0
    assert result["machine"]["versions"]["transformers"]
    assert result["fast"] is True


def test_engines_in_float32_give_the_same_tokens(fast_peers):
    answers = json.loads((fast_peers / "peers.json").read_text())["answers"]
    assert (answers["minillm NumPy fp32"] == answers["minillm torch fp32"]
            == answers["transformers fp32"])


def test_llama_cpp_answers_with_the_same_file(fast_peers):
    pytest.importorskip("llama_cpp")
    answers = json.loads((fast_peers / "peers.json").read_text())["answers"]
    assert answers["llama.cpp Q4_1"] == answers["minillm native"] == answers["minillm torch fp32"]


def test_peers_are_measured_without_llama_cpp_only_where_nothing_is_published(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("MINILLM_FAST", "0")
    for name in ("peers", "quantization"):
        with pytest.raises(InputError, match="pip install llama-cpp-python"):
            run_benchmark(name)
    assert llamacpp.has_llama_cpp() is False


def test_llama_cpp_gives_the_logits_of_the_same_file(model_path):
    """Close to ours, as far as activations in int8 allow; and the same, read in pieces."""
    pytest.importorskip("llama_cpp")
    token_ids, llm = [1, 504, 3575, 282, 4649, 314], LLM(str(model_path), device="cpu",
                                                         dtype="float32")
    engine = llamacpp.LlamaCpp(str(model_path))
    theirs, ours = engine.forward(token_ids, 0, all_rows=True).copy(), llm.logits(token_ids)
    assert np.corrcoef(theirs.ravel(), ours.ravel())[0, 1] > 0.999
    engine.clear()
    engine.forward(token_ids[:4], 0)
    pieces = engine.forward(token_ids[4:], 4)
    assert np.corrcoef(pieces[0], theirs[-1])[0, 1] > 0.999


def test_the_figure_is_drawn(fast_peers):
    assert (fast_peers / "peers.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", BENCHMARKS)
def test_published_table_is_drawn_from_the_published_samples(name):
    chapter = CHAPTERS / BENCHMARKS[name]
    result = json.loads((chapter / "results" / f"{name}.json").read_text())
    assert result["fast"] is False
    table = importlib.import_module(f"minillm.bench.{name}").table(result)
    pages = [chapter / "README.md"]
    if f"<!-- bench:{name} -->" in draw.README.read_text(encoding="utf-8"):
        pages.append(draw.README)
    for path in pages:
        content = path.read_text(encoding="utf-8")
        assert draw.with_markers_filled(content, name, table) == content, path


@pytest.mark.parametrize("name", [name for name in BENCHMARKS if name != "peers"])
def test_a_shrunken_measurement_runs(name, tmp_path, monkeypatch):
    """Every other one, in this process: it draws, and says that it measured nothing."""
    monkeypatch.setenv("MINILLM_FAST", "1")
    run_benchmark(name, tmp_path)
    assert json.loads((tmp_path / f"{name}.json").read_text())["fast"] is True
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_taken_within_a_round():
    """A round in which everything is ten times slower leaves the ratio as it was."""
    def sample(name, number, tpot_s):
        return {"contestant": name, "round": number, "prefill_s": 10 * tpot_s,
                "token_times_s": [tpot_s, 2 * tpot_s]}

    result = {
        "arguments": {"prefill_tokens": 10, "rounds": 3, "decode_prompt_tokens": 2,
                      "decode_tokens": 2},
        "machine": {"cores": 2, "cpu": "x", "versions": {"torch": "1", "transformers": "2"},
                    "date": "today"},
        "limits": {"layer_params": 10, "head_params": 5, "read_bytes_per_s": 1e3,
                   "read_again": [[60, 1e3]],
                   "flops_per_s": {"float32": 1e3, "bfloat16": 1e3, "int8": 1e3}},
        "contestants": {name: {"bits": (32, 32), "load_s": 1.0, "memory_before_bytes": 1e6,
                               "peak_memory_bytes": 2e6} for name in ("ours", "transformers fp32")},
        "samples": [sample(name, number, slow * tpot_s)
                    for number, slow in enumerate((1, 10, 100))
                    for name, tpot_s in (("ours", 0.1), ("transformers fp32", 0.2))],
    }
    table = peers.table(result)
    assert "| ours | 0 | 1 (0–10) | 17 | 2.00 | – |" in table
    assert "| ours | 1 (0–10) | 48 | 2.00 | – | 1.0 | 2 (1) |" in table


@pytest.mark.parametrize("name, fast, words", [
    ("nonsense", False, "unknown"), ("peers", True, "--out"), ("all", True, "--out")])
def test_refusals(monkeypatch, name, fast, words):
    monkeypatch.setenv("MINILLM_FAST", "1" if fast else "0")
    with pytest.raises(InputError, match=words):
        run_benchmark(name)


def test_markers_must_be_there():
    with pytest.raises(ValueError, match="bench:x"):
        draw.with_markers_filled("no markers", "x", "table")


def test_describe_machine():
    machine = describe_machine()
    assert machine["cores"] >= 1 and machine["memory_bytes"] > 2**30 and machine["cpu"]
    assert Path(REPOSITORY / ".git").exists() is (machine["commit"] is not None)
