"""A conversation in the terminal: through a pipe, and through a real pseudo-terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_llm import write_chat_model

from minillm import SamplingParams
from minillm.chat_session import HELP, answer, chat_session, read_message

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60  # only a test that fails waits this long


def greedy(max_tokens):
    return SamplingParams(temperature=0, max_tokens=max_tokens)


@pytest.fixture
def fresh_llm(llm_numpy):
    """The model behind an engine whose cache knows no prompt of another test."""
    llm_numpy.__dict__.pop("engine", None)  # the next request makes a new one
    return llm_numpy


def type_lines(monkeypatch, *lines):
    """What input() will read; no terminal, so there is no prompt."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


# ---- through a pipe --------------------------------------------------------------------------


def test_an_answer_to_each_line_and_metrics_on_standard_error(fresh_llm, monkeypatch, capsys):
    type_lines(monkeypatch, "What is the capital of France?", "And of Italy?")
    chat_session(fresh_llm, greedy(12))
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == "The capital of France is Paris."
    assert "Rome" in out.splitlines()[1]
    first, second = err.splitlines()
    assert first.startswith("[0 of 37 prompt tokens cached")
    assert int(re.match(r"\[(\d+) of", second)[1]) >= 32  # the full blocks of those 37


def test_commands_are_not_messages(llm_numpy, monkeypatch, capsys):
    type_lines(monkeypatch, "/help", "", "   ", "/nonsense", "/exit", "Hi")
    chat_session(llm_numpy, greedy(3))
    out, err = capsys.readouterr()
    assert out.splitlines() == [HELP, f"(/nonsense is no command) {HELP}"]
    assert err == ""


def test_reset_forgets_the_conversation_but_not_the_system_message(fresh_llm, monkeypatch, capsys):
    type_lines(monkeypatch, "Hi", "/reset", "Hi")
    chat_session(fresh_llm, greedy(3), system="Be brief.")
    out, err = capsys.readouterr()
    first, forgotten, second = out.splitlines()[:3]
    assert (first, forgotten) == (second, "(forgotten)")
    counts = [re.match(r"\[(\d+) of (\d+) prompt", line).groups() for line in err.splitlines()]
    assert counts == [("0", "18"), ("16", "18")]  # the same prompt, whose first block is known


def test_a_refused_message_costs_one_line_and_the_conversation_goes_on(fresh_llm, monkeypatch,
                                                                       capsys):
    type_lines(monkeypatch, "long " * 9000, "Hi")
    chat_session(fresh_llm, greedy(3))
    out, err = capsys.readouterr()
    refusal, metrics = err.splitlines()
    assert "context of 8192" in refusal and metrics.startswith("[0 of")
    assert len(out.splitlines()) == 2  # the answer, and the end of the input


def test_ctrl_c_at_the_prompt_explains_how_to_leave(monkeypatch, capsys):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert read_message() == ""
    assert capsys.readouterr().out == f"\n({HELP})\n"


def test_an_answer_that_is_broken_off_says_so(capsys):
    class Conversation:
        def say(self, text, params):
            yield "half"
            raise KeyboardInterrupt

    answer(Conversation(), "Hi", None)
    assert capsys.readouterr().out == "half (broken off)\n"


# ---- through a terminal ----------------------------------------------------------------------


class Terminal:
    """`minillm chat` as a user sees it: `type` keys, and wait until a text is on the screen."""

    def __init__(self, *arguments):
        self.screen = ""
        self.child, self.terminal = pty.fork()
        if self.child == 0:
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "-m", "minillm", "chat", *arguments])

    def type(self, keys):
        os.write(self.terminal, keys.encode())

    def read_until(self, text):
        """-> what came on the screen, up to and with `text`."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.screen:
            ready, _, _ = select.select([self.terminal], [], [], deadline - time.monotonic())
            assert ready, f"{text!r} did not come, but {self.screen!r}"
            try:
                self.screen += os.read(self.terminal, 4096).decode()
            except OSError:  # how Linux says that the other end has gone
                raise AssertionError(f"it ended without {text!r}: {self.screen!r}") from None
        before, _, self.screen = self.screen.partition(text)
        return before + text

    def answer_prompt(self, keys):
        """Type when the program waits, so that it is the program that shows what is typed."""
        self.read_until("\n> ")
        self.type(keys)
        if keys != CTRL_D:
            self.read_until(keys.strip())
        if keys.endswith("\n"):
            self.read_until("\n")

    def exit_code(self):
        while True:
            try:
                if not os.read(self.terminal, 4096):
                    break
            except OSError:
                break
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        os.close(self.terminal)  # hangs up, which ends a child that is still there


CTRL_C, CTRL_D = "\x03", "\x04"


def test_a_conversation_in_a_terminal(model_path):
    with Terminal("--model", str(model_path), "--backend", "numpy", "--temperature", "0",
                  "--max-tokens", "200") as terminal:
        terminal.answer_prompt("What is the capital of France?\n")
        assert "The capital of France is Paris." in terminal.read_until("tokens/s]")

        terminal.answer_prompt("Tell me a long story about the sea.\n")
        terminal.read_until(" ")  # the first word has come
        terminal.type(CTRL_C)
        terminal.read_until("(broken off)")

        terminal.answer_prompt("What is the capital of Italy?\n")
        reply = terminal.read_until("tokens/s]")
        assert "Rome" in reply
        num_cached, num_prompt = re.search(r"\[(\d+) of (\d+) prompt tokens", reply).groups()
        assert int(num_cached) > 60  # also what was said before it was broken off

        terminal.answer_prompt("/nonsense\n")
        terminal.read_until("(/nonsense is no command)")
        terminal.answer_prompt("/help\n")
        terminal.read_until(HELP)
        terminal.answer_prompt("/reset\n")
        terminal.read_until("(forgotten)")
        terminal.answer_prompt("Hi\n")
        after_reset = re.search(r"of (\d+) prompt tokens", terminal.read_until("tokens/s]"))
        assert int(after_reset[1]) < 40 < int(num_prompt)  # nothing of all that is in the prompt
        terminal.answer_prompt(CTRL_D)
        assert terminal.exit_code() == 0


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a tiny model that says A for ever; see FLAGS."""
    return str(write_chat_model(tmp_path_factory.mktemp("tiny")))


FLAGS = ("--backend", "numpy", "--logit-bias", "32=100", "--max-tokens", "3")


def test_piped_messages_are_answered_and_the_end_of_input_is_the_end(tiny):
    done = subprocess.run([sys.executable, "-m", "minillm", "chat", "--model", tiny, *FLAGS],
                          cwd=ROOT, input="Hi\nHo", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "AAA\nAAA\n\n")
    assert done.stderr.count("prompt tokens cached") == 2


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as locales differ
def test_a_message_that_is_no_text_costs_one_line(tiny, errors):
    done = subprocess.run([sys.executable, "-m", "minillm", "chat", "--model", tiny, *FLAGS],
                          cwd=ROOT, input=b"caf\xe9\nHi\n", capture_output=True,
                          env={**os.environ, "PYTHONIOENCODING": f"utf-8:{errors}"})
    assert b"Traceback" not in done.stderr
    assert (done.returncode, done.stdout) == (0, b"AAA\n\n")
