"""The command line: one JSON object, or one line about what is wrong; never a traceback."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from safetensors.numpy import load_file, save_file
from test_gguf_container import MALFORMED
from test_llm import write_chat_model

from minillm import LLM, SamplingParams
from minillm import llm as llm_module
from minillm.cli import build_parser, main, read_sampling_params
from minillm.course.exercises import all_exercises

ROOT = Path(__file__).parents[1]
QUESTION = "What is the capital of France?"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny random model, which talks nonsense at once."""
    folder = tmp_path_factory.mktemp("tiny")
    return str(write_chat_model(folder, max_position_embeddings=40))


def command(*arguments):
    return [sys.executable, "-m", "minillm", *arguments]


def run(*arguments, **options):
    """The real command, in a process of its own; -> CompletedProcess"""
    return subprocess.run(command(*arguments), cwd=ROOT, capture_output=True,
                          **{"stdin": subprocess.DEVNULL, **options})


def exit_code(arguments):
    """main's, in this process."""
    try:
        return main(arguments)
    except SystemExit as end:  # argparse's way to end
        return end.code


def assert_refused(capsys, arguments, *reasons):
    capsys.readouterr()  # what preparing the test has printed
    assert exit_code([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("minillm")
    for reason in reasons:
        assert reason in err


# ---- answers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(model_path):
    """What --json prints to the question, from each backend."""
    done = [run("generate", "--model", str(model_path), "--backend", backend, "--chat",
                "--temperature", "0", "--max-tokens", "32", "--json", QUESTION)
            for backend in ("torch", "numpy")]
    assert [(each.returncode, each.stderr) for each in done] == [(0, b"")] * 2
    return [json.loads(each.stdout) for each in done]  # exactly one object, or this raises


def test_the_capital_of_france_is_paris(answers, model_path):
    for answer, backend in zip(answers, ["torch", "numpy"]):
        assert answer["text"] == "The capital of France is Paris."
        assert answer["finish_reason"] == "stop"
        assert (answer["model"], answer["backend"]) == (str(model_path), backend)
        assert answer["dtype"] in ("float32", "bfloat16")
        assert answer["quantize"] is None
        assert answer["metrics"]["num_output_tokens"] == len(answer["token_ids"])
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_json_has_the_documented_keys(answers):
    documented = {"text", "token_ids", "finish_reason", "metrics", "model", "backend", "device",
                  "dtype", "quantize"}
    assert documented <= set(answers[0])
    assert {"ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"} <= set(answers[0]["metrics"])


def test_text_is_printed_and_stats_go_to_standard_error(tiny, capsys):
    assert main(["generate", "--model", tiny, "--temperature", "0", "--max-tokens", "3", "--stats",
                 "--logit-bias", "65=100", "--backend", "numpy", "Hi"]) == 0
    out, err = capsys.readouterr()
    assert len(out) == 3 + 1 and out.endswith("\n") and len(set(out)) == 2
    assert err.count("\n") == 1
    assert "2 prompt tokens" in err and "3 output tokens" in err and "tokens/s" in err


def test_n_answers_are_printed_one_below_the_other(tiny, capsys):
    arguments = ["generate", "--model", tiny, "--backend", "numpy", "--n", "2", "--seed", "1",
                 "--max-tokens", "2", "Hi"]
    assert main([*arguments, "--json"]) == 0
    outputs = json.loads(capsys.readouterr().out)["outputs"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "\n---\n".join(each["text"] for each in outputs) + "\n"


def test_every_sampling_flag_sets_its_parameter():
    given = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "n": 2,
             "repetition_penalty": 1.5, "presence_penalty": -1.0, "frequency_penalty": 0.75,
             "seed": 11, "max_tokens": 3, "min_tokens": 2, "logprobs": 4}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    flags += ["--ignore-eos", "--stop=a", "--stop=b", "--logit-bias=5=-1.5", "--logit-bias=6=2"]
    params = read_sampling_params(build_parser().parse_args(["generate", "Hi", *flags]))
    expected = {**given, "ignore_eos": True, "stop": ("a", "b"), "logit_bias": {5: -1.5, 6: 2.0}}
    assert vars(params) == expected


@pytest.mark.parametrize("prompt", ["-5", "- a list", "--", "two\nlines", "😀"])
def test_an_odd_prompt_is_a_prompt(tiny, capsys, prompt):
    dashes = ["--"] if prompt == "--" else []
    assert main(["generate", "--model", tiny, "--backend", "numpy", "--max-tokens", "1", "--json",
                 *dashes, prompt]) == 0
    assert len(json.loads(capsys.readouterr().out)["prompt_token_ids"]) == len(prompt.encode())


# ---- which loop answers ----------------------------------------------------------------------


@pytest.fixture
def loops(monkeypatch):
    """The names of the loops that requests go through, of generate and of stream."""
    taken = []

    def noted(name, method):
        def method_noted(*args):
            taken.append(name)
            return method(*args)

        return method_noted

    for name, method in list(llm_module.BATCHING.items()):
        monkeypatch.setitem(llm_module.BATCHING, name, noted(name, method))
    monkeypatch.setattr(LLM, "_steps", noted("continuous", LLM._steps))
    monkeypatch.setattr(LLM, "_steps_alone", noted("none", LLM._steps_alone))
    return taken


def test_every_kind_of_batching_prints_the_same_text(tiny, loops, capsys):
    printed = []
    for options in ([], ["--batching", "continuous"], ["--batching", "static"],
                    ["--batching=none"]):
        assert main(["generate", "--model", tiny, "--backend", "numpy", "--temperature", "0",
                     "--max-tokens", "8", *options, "Hi"]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        printed.append(out)
    assert len(set(printed)) == 1 and len(printed[0]) > 1
    assert loops == ["continuous", "continuous", "static", "none"]


@pytest.mark.parametrize("batching", ["continuous", "static", "none"])
def test_json_does_not_depend_on_the_loop(tiny, loops, capsys, batching):
    assert main(["generate", "--model", tiny, "--backend", "numpy", "--seed", "3", "--n", "2",
                 "--max-tokens", "8", "--json", "--batching", batching, "Hi"]) == 0
    found = json.loads(capsys.readouterr().out)
    wanted = LLM(tiny, "numpy", batching="none").generate(
        "Hi", SamplingParams(seed=3, n=2, max_tokens=8))[0]
    assert [each["token_ids"] for each in found["outputs"]] == [
        each.token_ids for each in wanted.outputs]
    assert loops[0] == batching


@pytest.mark.parametrize("batching", ["dynamic", "Static", "contin\nuous"])
def test_an_unknown_kind_of_batching_is_refused(tiny, capsys, batching):
    assert_refused(capsys, ["generate", "Hi", "--model", tiny, "--batching", batching],
                   f"batching {batching!r} is unknown", "continuous, static, none")


def test_a_static_batch_has_no_int8_cache(tiny, capsys):
    assert_refused(capsys, ["generate", "Hi", "--model", tiny, "--batching", "static",
                            "--kv-dtype", "int8"], "kv_dtype 'int8' is not for a static batch")


IMPORTS = """
import math
import numpy as np
from minillm.attention import attention_np, check_shapes, online_softmax_attention_np
from minillm.block_manager import ROOT_HASH, hash_block
from minillm.kv_cache import MAX_PLAIN_SCORES
from minillm.scheduler import preempt
by_arrival = lambda sequence: sequence.order
"""


def submission(folder, *names):
    """A file in which a student has written what the package has under these names."""
    things = {each.name: each.reference for each in all_exercises()}
    sources = [inspect.getsource(things[name]).partition("\n")[2] for name in names]  # no mark
    path = folder / "mine.py"
    path.write_text("\n\n".join([IMPORTS, *sources]))
    return str(path)


@pytest.mark.parametrize("names, batching", [
    (["attention_np"], "none"),
    (["KVCache"], "none"),
    (["pad_batch"], "static"),
    (["decode_batch", "masked_attention_np"], "static"),
    (["pad_batch", "KVCache"], "static"),  # and nothing calls the second
    (["BlockTable"], "continuous"),
    (["paged_gather_np", "match_prefix"], "continuous"),
    (["schedule"], "continuous"),
    (["schedule", "pad_batch"], "continuous"),
])
def test_impl_chooses_the_loop_of_its_chapter(tiny, tmp_path, loops, capsys, names, batching):
    arguments = ["generate", "--model", tiny, "--temperature", "0", "--max-tokens", "8", "Hi"]
    assert main([*arguments, "--backend", "numpy"]) == 0
    wanted = capsys.readouterr().out
    loops.clear()
    assert main([*arguments, "--impl", submission(tmp_path, *names)]) == 0
    out, err = capsys.readouterr()
    assert (out, loops) == (wanted, [batching])
    chapters = {each.name: each.chapter for each in all_exercises()}
    for name in names:
        if chapters[name] == chapters[names[0]]:
            assert re.search(rf"^\[your {name}: \d+ calls\]$", err, re.MULTILINE)
        else:
            assert f"[your {name} was not called on the way to this text]" in err


def test_the_flag_goes_before_the_chapter(tiny, tmp_path, loops, capsys):
    """A block table is needed in one loop only, and it is said that it was not called."""
    path = submission(tmp_path, "BlockTable")
    assert main(["generate", "--model", tiny, "--max-tokens", "2", "--impl", path, "--batching",
                 "none", "Hi"]) == 0
    assert loops == ["none"]
    assert "[your BlockTable was not called on the way to this text]" in capsys.readouterr().err


# ---- wrong arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, reason", [
    ([], "COMMAND"),
    (["sing"], "'sing'"),
    (["generate"], "PROMPT"),
    (["generate", "Hi", "there"], "unrecognized arguments: there"),
    (["generate", "Hi", "--temp", "0"], "unrecognized arguments: --temp"),
    (["generate", "Hi", "--no\nsuch"], "unrecognized arguments"),
    (["chat", "--json"], "unrecognized arguments: --json"),
    (["fetch", "no-such-text"], "no-such-text"),
    (["generate", "Hi", "--model", "no-such-model"], "no-such-model"),
    (["generate", "Hi", "--model", "no\nsuch/model\n"], "no\\nsuch"),
    (["generate", "Hi", "--model", "macbeth"], "is a text, not a model"),
])
def test_a_wrong_command_is_refused(capsys, arguments, reason):
    assert_refused(capsys, arguments, reason)


@pytest.mark.parametrize("flag, value, limit", [
    ("temperature", "-0.1", "at least 0"),
    ("temperature", "inf", "finite"),
    ("temperature", "nan", "finite"),
    ("temperature", "warm", "float"),
    ("top-k", "-2", "at least 1"),
    ("top-k", "1.5", "int"),
    ("top-p", "0", "above 0"),
    ("top-p", "1.1", "at most 1"),
    ("min-p", "-0.1", "from 0 to 1"),
    ("min-p", "2", "from 0 to 1"),
    ("repetition-penalty", "0", "from 0.001"),
    ("repetition-penalty", "inf", "to 1000"),
    ("presence-penalty", "2.1", "from -2 to 2"),
    ("frequency-penalty", "-2.1", "from -2 to 2"),
    ("seed", "-1", "0 to 2**64 - 1"),
    ("seed", str(2**64), "0 to 2**64 - 1"),
    ("max-tokens", "0", "at least 1"),
    ("max-tokens", "1e3", "int"),
    ("min-tokens", "-1", "at least 0"),
    ("min-tokens", "65", "at most max_tokens"),
    ("logprobs", "21", "from 0 to 20"),
    ("n", "0", "from 1 to 64"),
    ("n", "65", "from 1 to 64"),
    ("stop", "", "at least one character"),
])
def test_a_sampling_parameter_out_of_bounds_is_refused(capsys, flag, value, limit):
    assert_refused(capsys, ["generate", "Hi", f"--{flag}={value}"], value, limit)


@pytest.mark.parametrize("arguments, reason", [
    (["--temperature", "0", "--n", "2"], "n is 2, must be 1 at temperature 0"),
    (["--logit-bias", "5"], "TOKEN_ID=BIAS such as 15=-2.5, not '5'"),
    (["--logit-bias", "five=1"], "not 'five=1'"),
    (["--logit-bias", "5=much"], "not '5=much'"),
    (["--logit-bias", "5=nan"], "token 5 is nan, must be a finite number"),
    (["--logit-bias=-5=1"], "token -5, must be a token id of at least 0"),
    (["--logit-bias", "5=1", "--logit-bias", "5=2"], "token 5 twice"),
    (["--stop=x"] * 17, "at most 16"),
    (["--system", "Be brief."], "add --chat"),
    (["--logprobs", "3"], "--json"),
])
def test_parameters_that_make_no_sense_are_refused(tiny, capsys, arguments, reason):
    assert_refused(capsys, ["generate", "Hi", "--model", tiny, *arguments], reason)


@pytest.mark.parametrize("arguments, reason", [
    (["--backend", "jax"], "'jax'"),
    (["--device", "tpu"], "'tpu'"),
    (["--dtype", "int8"], "'int8'"),
    (["--quantize", "int3"], "'int3'"),
    (["--backend", "numpy", "--device", "cuda"], "not for NumPy"),
    (["--logit-bias", "257=1"], "below the vocabulary size 257"),
])
def test_a_model_option_that_is_not_there_is_refused(tiny, capsys, arguments, reason):
    assert_refused(capsys, ["generate", "Hi", "--model", tiny, *arguments], reason)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU here")
def test_cuda_where_there_is_none_is_refused(tiny, capsys):
    assert_refused(capsys, ["generate", "Hi", "--model", tiny, "--device", "cuda"],
                   "device 'cuda' is not there", "'cpu'")


@pytest.mark.parametrize("prompt, reason", [
    ("", "prompt is empty"), ("x" * 40, "has 40 tokens, and this model's context of 40")])
def test_a_prompt_that_cannot_be_answered_is_refused(tiny, capsys, prompt, reason):
    assert_refused(capsys, ["generate", "--model", tiny, prompt], reason)


# ---- wrong models ----------------------------------------------------------------------------


def assert_model_refused(capsys, model, *reasons):
    assert_refused(capsys, ["generate", "--backend", "numpy", "--model", model, "--chat", "Hi"],
                   *reasons)


def test_a_folder_without_a_configuration(tmp_path, capsys):
    assert_model_refused(capsys, tmp_path, "config.json")
    write_checkpoint(tmp_path, "LlamaForCausalLM")
    (tmp_path / "config.json").unlink()
    assert_model_refused(capsys, tmp_path, "has no config.json")


@pytest.mark.parametrize("case", ["empty", "bad magic", "2^64-1 tensors", "2^64-1 keys",
                                  "offset outside", "duplicate tensor", "no data"])
def test_a_damaged_gguf_file(tmp_path, capsys, case):
    path = tmp_path / "damaged.gguf"
    content, _ = MALFORMED[case]
    path.write_bytes(content)
    assert_model_refused(capsys, path, str(path))


@pytest.mark.parametrize("kept_bytes", [10, 5_000, 3_000_000])
def test_a_gguf_file_that_is_cut_short(tmp_path, model_path, capsys, kept_bytes):
    path = tmp_path / "short.gguf"
    with open(model_path, "rb") as file:
        path.write_bytes(file.read(kept_bytes))
    assert_model_refused(capsys, path, str(path), "get it again")


class Payload:
    def __reduce__(self):
        return os._exit, (99,)  # what opening the pickle would do


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl"])
def test_a_pickle_is_refused_and_never_opened(tmp_path, capsys, name):
    write_checkpoint(tmp_path, "LlamaForCausalLM")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(pickle.dumps(Payload()))
    assert_model_refused(capsys, tmp_path, "pickle")
    assert_model_refused(capsys, tmp_path / name, "pickle")


def test_a_tensor_that_is_missing_or_of_another_shape(tmp_path, capsys):
    file = write_chat_model(tmp_path) / "model.safetensors"
    tensors, name = load_file(file), "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].T.copy()}, file)
    assert_model_refused(capsys, tmp_path, name, "shape [48, 84]")
    save_file({key: value for key, value in tensors.items() if key != name}, file)
    assert_model_refused(capsys, tmp_path, "has no tensor", name)


@pytest.mark.parametrize("template, reason", [
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__"),
    ("{{ messages.__init__.__globals__ }}", "__init__"),
    ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loop"),
    ("{{ 'x' * 2 ** 40 }}", "memory"),
    ("{% for", "template"),
    ("{{ raise_exception('no system message, please') }}", "no system message, please"),
])
def test_a_chat_template_that_must_not_run(tmp_path, capsys, template, reason):
    write_chat_model(tmp_path, chat_template=template)
    assert_model_refused(capsys, tmp_path, "chat template", reason)


def test_a_model_without_a_chat_template(tmp_path, capsys):
    write_chat_model(tmp_path, chat_template=None)
    assert_model_refused(capsys, tmp_path, "has no chat template")


# ---- processes, pipes and signals ------------------------------------------------------------


def test_a_mistake_costs_one_line_in_a_real_process(tiny):
    done = run("generate", "--model", tiny, "--backend", "numpy", "")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"minillm generate: the prompt is empty: give at least one token\n"


def test_a_dash_reads_the_prompt_from_standard_input(tiny):
    done = run("generate", "--model", tiny, "--backend", "numpy", "--json", "-",
               stdin=None, input="é\n".encode())
    assert len(json.loads(done.stdout)["prompt_token_ids"]) == 3


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as locales differ
def test_standard_input_that_is_no_text_is_refused(tiny, errors):
    done = run("generate", "--model", tiny, "--backend", "numpy", "-", stdin=None,
               input=b"caf\xe9", env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"})
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"minillm generate: ") and done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_terminal_that_knows_only_ascii_gets_ascii(tiny, options):
    """Token 127 is the byte C3, half a character: the answer is U+FFFD."""
    done = run("generate", "--model", tiny, "--backend", "numpy", "--max-tokens", "1",
               "--temperature", "0", "--logit-bias", "127=100", *options, "Hi",
               env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert not options or json.loads(done.stdout)["text"] == "�"


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_leaves_early_is_no_error(tiny, options):
    """As in `minillm generate ... | head -c 1`."""
    process = subprocess.Popen(
        command("generate", "--model", tiny, "--backend", "numpy", "--ignore-eos", "--logit-bias",
                "65=100", "--max-tokens", "30", *options, "Hi"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


def test_ctrl_c_ends_an_answer_with_130(model_path):
    process = subprocess.Popen(
        command("generate", "--model", str(model_path), "--backend", "numpy", "--max-tokens",
                "5000", "--ignore-eos", "Once upon a time"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in err and err.strip() == b"interrupted"
