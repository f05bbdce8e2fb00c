"""The course: marks, starters, plugging in, and a verdict for whatever a student hands in."""

from __future__ import annotations

import ast
import csv
import io
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from test_llm import write_chat_model

import minillm.attention
import minillm.bpe
import minillm.kv_cache
import minillm.model_runner
from minillm import LLM, InputError
from minillm.cli import main
from minillm.course import using
from minillm.course.check import CheckFailed, close, equal, peak_bytes
from minillm.course.collect import chapters_of
from minillm.course.commands import read_functions
from minillm.course.exercises import (
    all_exercises,
    course_folder,
    exercises_of,
    find_chapter,
    grader_path,
    starter_path,
)
from minillm.course.grading import Limits, Report, grade
from minillm.course.starters import solution, starter
from minillm.course.subject import Subject
from minillm.course.worker import run_checks

ROOT = Path(__file__).parents[1]
CHAPTER = "04_attention"
GRADER = grader_path(ROOT, CHAPTER)
ONLINE = "online_softmax_attention_np"
SOLUTION = solution(CHAPTER)
CHAPTERS = list(dict.fromkeys(each.chapter for each in all_exercises()))


def with_attention(body, before=""):
    """A submission whose attention_np is `body`, and whose other function is right."""
    right = SOLUTION.replace("def attention_np(q, k, v):", "def right_attention(q, k, v):")
    return f"{right}\n{before}\n\ndef attention_np(q, k, v):\n    {body}\n"


def submit(folder, text, name="exercise.py"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text) if isinstance(text, bytes) else path.write_text(text)
    return path


def verdict(folder, text, **limits):
    return grade(CHAPTER, GRADER, submit(folder, text), Limits(**limits))


def verdict_here(folder, text):
    """The same in this process, which is faster, for code that does no harm."""
    report = Report(CHAPTER, submit(folder, text))
    run_checks(CHAPTER, GRADER, report.path, report.take)
    return report


def exit_code(*arguments):
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


# ---- exercises and starters ------------------------------------------------------------------


def test_exercises_are_found_in_the_order_of_the_course():
    assert [each.name for each in all_exercises()] == [
        "request_metrics", "bpe_train", "bpe_encode", "rms_norm_np", "rope_np", "swiglu_np",
        "attention_np", ONLINE, "forward_np", "top_k_np", "top_p_np", "min_p_np", "sample_np",
        "KVCache", "pad_batch", "masked_attention_np", "decode_batch", "BlockTable",
        "paged_gather_np", "match_prefix", "schedule", "quantize_int8_np", "quantize_group_np",
        "pack_int4_np", "quantized_matmul_np"]
    assert [each.twin_name for each in all_exercises() if each.chapter[:2] in ("01", "04", "07")
            ] == [None, "attention_torch", "online_softmax_attention_torch", "KVCacheTorch"]


def test_a_mark_leaves_the_function_as_it_is():
    each = exercises_of(CHAPTER)[0]
    assert each.reference is minillm.attention.attention_np
    assert each.reference.__code__.co_filename == minillm.attention.__file__  # no wrapper


@pytest.mark.parametrize("text", ["4", "04", CHAPTER])
def test_a_chapter_has_a_number_and_a_name(text):
    assert find_chapter(text) == CHAPTER


def test_an_unknown_chapter_is_refused():
    with pytest.raises(InputError, match="chapter '99' has no exercise: choose one of 01_first"):
        find_chapter("99")


@pytest.mark.parametrize("chapter", [
    chapter for chapter in CHAPTERS if (ROOT / "chapters" / chapter).is_dir()])
def test_the_committed_starter_is_what_would_be_generated(chapter):
    assert starter_path(ROOT, chapter).read_text() == starter(chapter), (
        "run `python -m minillm course starters`")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_starter_runs_has_every_contract_and_no_solution(chapter):
    namespace = {"__name__": "starter"}
    exec(starter(chapter), namespace)  # every name that a signature needs is imported
    tree = ast.parse(starter(chapter))
    for each in exercises_of(chapter):
        assert namespace[each.name].__doc__ == each.reference.__doc__
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            body = [part for part in node.body if not isinstance(part, ast.Expr)]
            assert len(body) == 1 and isinstance(body[0], ast.Raise)
    assert all(len(line) <= 100 for line in starter(chapter).splitlines())


def test_starters_are_written_where_they_are_missing_and_over_nobody_s_work(
        tmp_path, monkeypatch, capsys):
    (tmp_path / "tests" / "exercises").mkdir(parents=True)
    (tmp_path / "chapters" / CHAPTER).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    path = starter_path(tmp_path, CHAPTER)
    for _ in range(2):
        assert exit_code("course", "starters") == 0
        assert capsys.readouterr().out == f"{path}\n" and path.read_text() == starter(CHAPTER)
    path.write_text(SOLUTION)
    assert exit_code("course", "starters") == 2
    assert path.read_text() == SOLUTION and "has been filled in" in capsys.readouterr().err


def test_a_class_keeps_its_public_methods_and_properties():
    text = starter("07_kv_cache")
    assert "    @property\n    def length(self):" in text
    assert "def append(self, layer, k, v):" in text and "np.empty" not in text


# ---- using -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_chat_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=40)


def bindings(thing):
    return {(name, key) for name, module in list(sys.modules.items())
            if name.partition(".")[0] == "minillm" and module
            for key, value in list(vars(module).items()) if value is thing}


def zeros(q, k, v):
    return np.zeros_like(q)


def test_a_function_is_replaced_wherever_it_is_bound_and_comes_back(tiny):
    llm = LLM(str(tiny), backend="numpy")
    before, original = llm.logits([1, 2, 3]), minillm.attention.attention_np
    places = bindings(original)
    assert ("minillm.kv_cache", "attention_np") in places
    with using(attention_np=zeros) as plugged:
        assert not bindings(original)
        assert np.abs(llm.logits([1, 2, 3]) - before).max() > 1e-3
        assert plugged["attention_np"].calls == llm.config.num_hidden_layers
    assert bindings(original) == places
    np.testing.assert_array_equal(llm.logits([1, 2, 3]), before)


def test_an_exception_undoes_it_too():
    original = minillm.attention.attention_np
    with pytest.raises(ZeroDivisionError):
        with using(attention_np=zeros, KVCache=dict):
            raise ZeroDivisionError
    assert minillm.kv_cache.attention_np is original
    assert minillm.kv_cache.KVCache.__module__ == "minillm.kv_cache"


def test_blocks_can_be_nested_even_with_the_package_s_own_functions():
    """Two names share one function inside; they must not be mixed up when the blocks end."""
    plain = minillm.attention.attention_np
    online = minillm.attention.online_softmax_attention_np
    q, k, v = np.ones((2, 3, 4)), np.ones((1, 3, 4)), np.ones((1, 3, 4))
    with using(attention_np=online) as outer:
        with using(attention_np=zeros):
            assert minillm.kv_cache.attention_np(q, k, v).sum() == 0
        minillm.kv_cache.attention_np(q, k, v)
        assert outer["attention_np"].calls == 1
    assert minillm.kv_cache.attention_np is plain
    assert minillm.kv_cache.online_softmax_attention_np is online


def test_a_class_a_static_method_and_faster_forms_are_replaced(tiny):
    class Cache(minillm.kv_cache.KVCache):
        pass

    def first(logits, *rest):
        return 65

    def encode(ids, ranks, merged):
        return list(ids)

    with using(KVCache=Cache, sample_np=first, bpe_encode=encode) as plugged:
        llm = LLM(str(tiny), backend="numpy")
        assert llm.generate(["Hi"])[0].token_ids[:3] == [65] * 3
        assert isinstance(llm.runner.new_cache(4), Cache)
    assert all(entry.calls for entry in plugged.values())
    assert minillm.model_runner.NumpyRunner.sample is minillm.sampling.sample_np


def test_the_torch_twin_takes_the_place_of_the_fused_kernel(tiny):
    llm = LLM(str(tiny), device="cpu", dtype="float32")
    with using(attention_torch=minillm.attention.attention_torch) as plugged:
        llm.logits([1, 2, 3])
    assert plugged["attention_torch"].calls == llm.config.num_hidden_layers


def test_plugging_in_leaves_torch_where_it_is():
    """Torch takes seconds to import, and nothing here needs it."""
    code = ("import sys\nfrom minillm.course import using\n"
            "with using(attention_np=print): pass\nsys.exit('torch._C' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name, advice", [
    ("atention_np", "did you mean attention_np?"), ("zzz", "choose from request_metrics")])
def test_an_unknown_name_is_refused(name, advice):
    with pytest.raises(InputError, match=advice.replace("?", r"\?")):
        with using(**{name: zeros}):
            raise AssertionError("not reached")


# ---- what graders are written with -----------------------------------------------------------


def failure(function, *args, **kwargs):
    with pytest.raises(CheckFailed) as caught:
        function(*args, **kwargs)
    return caught.value


def test_close_names_the_first_difference_and_the_mistake():
    close([1.0, 2.0], np.array([1.0, 2.0 + 1e-9]))
    error = failure(close, np.array([[1.0, 5.0]]), [[1.0, 2.0]],
                    mistakes={"other": [[0.0, 0.0]], "it is squared and one": [[1.0, 5.0]]})
    assert error.expected == "2 at [0, 1]" and error.got.startswith("5 at [0, 1] (1 of 2 numbers")
    assert error.hint == "it is squared and one"
    assert "return" in failure(close, None, [1.0]).hint
    assert "shape (2,)" in failure(close, [1.0, 2.0], [1.0]).got
    assert "nan" in failure(close, [np.nan], [1.0]).got
    assert "str" in failure(close, "text", [1.0]).got


def test_equal_does_not_care_about_numpy_s_types():
    equal((np.int64(1), np.array([2, 3])), [1, [2, 3]])
    assert failure(equal, [1], [2], mistakes={"one too few": [1]}).hint == "one too few"


def test_peak_bytes_counts():
    assert 8_000_000 <= peak_bytes(np.ones, 1_000_000) < 8_100_000


def test_a_subject_watches_lists_and_objects_too():
    def drain(ids):
        return [ids.pop()]

    assert "`ids`" in failure(Subject("bpe_encode", drain), [1, 2]).got

    class Cache:
        def append(self, layer, k):
            k += 1

    cache = Subject("KVCache", Cache)()
    assert "`k`" in failure(cache.append, 0, np.zeros(3)).got


# ---- verdicts --------------------------------------------------------------------------------


def test_a_right_submission_passes_all_checks(tmp_path):
    report = verdict(tmp_path, SOLUTION)
    assert report.is_ok and report.passed == report.total > 10
    assert report.verdict == f"{report.total} of {report.total} checks pass; well done"


def test_an_unfilled_starter_says_what_is_to_be_written(tmp_path):
    report = verdict_here(tmp_path, starter(CHAPTER))
    assert report.verdict.startswith("0 of ")
    assert report.verdict.endswith("next: attention_np is still to be written")
    assert len(list(report.lines())) == 4  # and not the same words for every check


@pytest.mark.parametrize("text, reason", [
    (SOLUTION.replace("def attention_np", "def atention_np"),
     "has no attention_np: is atention_np misspelt?"),
    ("x = 1", "has no attention_np, which is asked for"),
    (f"from minillm.attention import attention_np, {ONLINE}",
     "attention_np in exercise.py is not yours, it comes from minillm.attention"),
    (f"import minillm.attention\nattention_np = minillm.attention.attention_np\n{ONLINE} = 5",
     "is not yours"),
    ("def attention_np(q, k, v)\n    return q", "line 1 is not Python (expected ':')"),
    (b"x = '\xff'", "is not Python"),
    (b"x = 1\x00", "is not Python"),
    ("import no_such_library", "line 1: there is no module 'no_such_library'"),
    ("import numpy as np\nx = np.zeros(3) @ np.zeros(4)", "does not load: ValueError"),
    ("import sys\nsys.exit(0)", "does not load: SystemExit: 0 in line 2"),
])
def test_a_file_that_cannot_be_graded_is_refused(tmp_path, text, reason):
    report = verdict_here(tmp_path, text)
    assert reason in report.refused and "\n" not in report.refused
    assert not report.is_ok and report.verdict.startswith("refused: ")


@pytest.mark.parametrize("body, before, words", [
    ("return 1 / 0", "", "ZeroDivisionError: division by zero in line "),
    ("return None", "", "is a `return` missing?"),
    ("return q[0]", "", "an array of shape"),
    ("q *= 2; return right_attention(q, k, v)", "", "input `q` is changed"),
    ("k[:] = 0; return q", "", "input `k` is changed"),
    ("return input('?')", "", "nobody is there to answer input()"),
    ("exit(0)", "", "take exit() out"),
    ("return attention_np(q, k, v)", "", "calls itself without end"),
    ("return reference.attention_np(q, k, v)", "import minillm.attention as reference",
     "a call of minillm's own attention_np"),
])
def test_a_function_that_fails_is_told_why(tmp_path, monkeypatch, body, before, words):
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # as in the process of its own
    report = verdict_here(tmp_path, with_attention(body, before))
    text = "\n".join(report.lines())
    assert words in text
    others = [each for each in report.results if each.label.startswith(ONLINE)]
    assert others and all(each.status == "pass" for each in others)  # one mistake, one verdict


def test_a_check_that_does_not_return_costs_that_check(tmp_path):
    """Each of four checks meets another way not to return; all others are reported as usual."""
    report = verdict(tmp_path, with_attention(
        "if k.shape[1] == 1: endless()\n"
        "    if len(q) == 1 and k.shape[1] == 5: os._exit(3)\n"
        "    if len(q) == 1 and k.shape[1] == 4: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    if len(q) == 1 and k.shape[1] == 7: np.ones(2**28)\n"
        "    return right_attention(q, k, v)",
        "import os, signal\n\ndef endless():\n    while True:\n"
        "        try: sum(range(999))\n        except BaseException: pass"),
        check_seconds=1, memory_bytes=2**30)
    failing = [each.got for each in report.results if each.status != "pass"]
    words = ["did not finish within 1 s", "ended the process with exit code 3",
             "ended the process by signal 11", "MemoryError"]
    assert len(failing) == 4 and all(word in got for word, got in zip(words, failing))
    assert report.passed == report.total - 4
    assert "more memory than the limit" in "\n".join(report.lines())


def test_all_checks_together_have_a_limit_on_time(tmp_path):
    report = verdict(tmp_path, with_attention("while True: pass"), seconds=2.5, check_seconds=1)
    assert len(report.results) == len(report.labels)
    assert "not run: the 2.5 s for all checks are used up" in report.results[-1].got


@pytest.mark.parametrize("text, reason", [
    ("while True: pass", "did not finish within 1 s"),
    ("import os\nos._exit(0)", "ended the process with exit code 0")])
def test_a_file_that_never_comes_to_its_end_is_refused(tmp_path, text, reason):
    assert f"does not load: {reason}" in verdict(tmp_path, text, check_seconds=1).refused


def test_printing_is_no_mistake_and_is_shown(tmp_path):
    report = verdict_here(tmp_path, with_attention(
        "print('shape', q.shape * 9999); return right_attention(q, k, v)"))
    assert report.is_ok
    assert any("your code prints" in line and "shape" in line for line in report.lines())


def test_the_torch_twin_is_graded_by_the_same_checks(tmp_path):
    twin = ("\nimport torch\n\ndef attention_torch(q, k, v):\n"
            "    assert isinstance(q, torch.Tensor)\n"
            "    return torch.from_numpy(attention_np(q.numpy(), k.numpy(), v.numpy())){}\n")
    report = verdict(tmp_path, SOLUTION + twin.format(""))
    assert report.is_ok and report.passed == report.total
    assert "8 of 8 on PyTorch" in report.verdict
    report = verdict_here(tmp_path, SOLUTION + twin.format(" * 2"))
    assert not report.is_ok and report.passed == report.total  # extra work costs no points
    assert "next: attention_torch: one query" in report.verdict


# ---- the command line ------------------------------------------------------------------------


def test_grade_prints_a_report_and_exits_with_its_outcome(tmp_path, capsys):
    path = submit(tmp_path, SOLUTION)
    assert exit_code("grade", "04", "--impl", path) == 0
    assert capsys.readouterr().out.endswith("checks pass; well done\n")
    assert exit_code("grade", "04", "--impl", submit(tmp_path, with_attention("return q"))) == 1
    assert "FAIL  attention_np: one query" in capsys.readouterr().out


@pytest.mark.parametrize("arguments, reason", [
    (["grade"], "which chapter?"),
    (["grade", "99"], "chapter '99'"),
    (["grade", "04", "--impl", "no-such-file.py"], "no-such-file.py is not there"),
    (["grade", "04", "--csv"], "--submissions"),
    (["grade", "--submissions", "no-such-folder"], "is no folder"),
    (["grade", "04", "--submissions", ".", "--impl", "x.py"], "choose one"),
    (["grade", "04", "--seconds", "0"], "--seconds is 0"),
    (["course"], "ACTION"),
    (["course", "export", "tests"], "is there already"),
    (["generate", "Hi", "--impl", "no-such-file.py"], "is not there"),
])
def test_a_wrong_command_costs_one_line(monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(ROOT)
    assert exit_code(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and reason in err


def generate_with(tiny, path, *options):
    return exit_code("generate", "--model", tiny, "--max-tokens", "2", "--impl", path, *options,
                     "Hi")


def test_generate_runs_on_the_student_s_functions(tiny, tmp_path, capsys):
    text = SOLUTION.replace(f"def {ONLINE}", "def not_yet") + "\n\n" + starter(CHAPTER)[
        starter(CHAPTER).index(f"def {ONLINE}"):]
    assert generate_with(tiny, submit(tmp_path, text)) == 0
    err = capsys.readouterr().err
    assert "[your attention_np: 6 calls]" in err  # 3 layers, 2 passes
    assert f"[{ONLINE} is still to be written" in err


@pytest.mark.parametrize("text, options, reason", [
    (SOLUTION, ["--backend", "torch"], "attention_np in exercise.py is for NumPy"),
    (starter(CHAPTER), [], "attention_np, online_softmax_attention_np in exercise.py is still"),
    (SOLUTION.replace("def attention_np", "def atention_np"), [], "is that attention_np, misspelt"),
    ("x = 1", [], "no function of any chapter"),
    (f"from minillm.attention import {ONLINE}", [], "not yours"),
    (with_attention("return q[0] @ v"), [], "your code failed: ValueError"),
])
def test_generate_refuses_what_it_cannot_run(tiny, tmp_path, capsys, text, options, reason):
    assert generate_with(tiny, submit(tmp_path, text), *options) == 2
    err = capsys.readouterr().err
    assert reason in err and err.count("\n") == 1


def test_a_folder_of_submissions_becomes_a_table(tmp_path, capsys):
    submit(tmp_path, SOLUTION, "ada.py")
    submit(tmp_path, with_attention("return q"), "bob/attention/exercise.py")
    submit(tmp_path, SOLUTION.replace("def attention_np", "def atention_np"), "cleo.py")
    submit(tmp_path, "def f(:", "dan.py")
    submit(tmp_path, "x = 1", "=eve.py")
    submit(tmp_path, "broken(", ".hidden/x.py")
    assert exit_code("grade", "--submissions", tmp_path, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["name"] for row in rows] == ["'=eve", "ada", "bob", "cleo", "dan"]
    eve, ada, bob, cleo, dan = rows
    assert (ada["chapter"], ada["passed"], ada["percent"]) == (CHAPTER, ada["total"], "100")
    assert 0 < int(bob["passed"]) < int(bob["total"]) and "next: attention_np" in bob["verdict"]
    assert "misspelt" in cleo["verdict"] and cleo["chapter"] == CHAPTER and cleo["total"] != "0"
    assert "not Python" in dan["verdict"] and "no function of any chapter" in eve["verdict"]


# ---- the hand-out ----------------------------------------------------------------------------


def test_the_hand_out_has_what_students_need_and_no_solution_in_sight(tmp_path, monkeypatch):
    target = tmp_path / "hand-out"
    assert exit_code("course", "export", target) == 0
    files = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert {"README.md", "requirements.txt", f"chapters/{CHAPTER}/exercise.py",
            f"tests/exercises/test_{CHAPTER}.py"} <= files
    assert not any(word in name for name in files for word in ("mutants", "alternatives", "peers"))
    assert not any(name.startswith("minillm") for name in files)
    assert starter_path(target, CHAPTER).read_text() == starter(CHAPTER)
    [archive] = (target / "packages").iterdir()
    assert f"./packages/{archive.name}" in (target / "requirements.txt").read_text()
    names = {name.partition("/")[2] for name in zipfile.ZipFile(archive).namelist()}
    assert {"pyproject.toml", "README.md", "minillm/attention.py", "minillm/course/worker.py"
            } <= names
    assert "not secret" in (target / "README.md").read_text()

    monkeypatch.chdir(target / "chapters")
    assert course_folder() == target  # the grader next to these chapters, not the checkout's


def test_grade_works_inside_the_hand_out(tmp_path):
    """As a student: minillm is somewhere else, and only this folder is here."""
    target = tmp_path / "hand-out"
    assert exit_code("course", "export", target) == 0
    with zipfile.ZipFile(next((target / "packages").iterdir())) as archive:
        archive.extractall(tmp_path / "installed")
    [installed] = (tmp_path / "installed").iterdir()
    done = subprocess.run([sys.executable, "-m", "minillm", "grade", "04"], cwd=target,
                          env={"PYTHONPATH": str(installed)}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert str(starter_path(target, CHAPTER)) in done.stdout
    assert "attention_np is still to be written" in done.stdout


def test_what_is_imported_beside_own_work_is_not_handed_in(tmp_path):
    """Chapter 05's starter imports the functions of chapter 03."""
    path = tmp_path / "exercise.py"
    path.write_text("from minillm.norm import rms_norm_np\n\n\ndef forward_np(weights, tokens, "
                    "positions, cache, rows=None):\n    return rms_norm_np\n")
    assert chapters_of(path) == ["05_model"]
    functions, unfilled = read_functions(path)
    assert list(functions) == ["forward_np"] and unfilled == []


def test_an_argument_that_is_no_number_is_not_taken_for_a_changed_one():
    assert Subject("f", lambda u: 1)(float("nan")) == 1
