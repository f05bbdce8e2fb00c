"""How does a conversation become the one text, and the one list of tokens, that a model reads?

Every family of chat models was trained on its own layout of roles and turns, and ships it as a
Jinja template. `render` runs it on messages; `encode_chat` goes on to token ids, and makes sure
that a user who types `<|im_end|>` writes these ten characters, and does not end their turn.
Chapter 02_tokenizer tells the story.

A template is a stranger's program, so `TemplateSandbox` runs it in a child process that can do
nothing but compute, and that not for long (`template_sandbox.py`). Starting the child takes
about a tenth of a second, a render in a running one about a millisecond.

Left out on purpose: images, audio and tool calls inside messages.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
from itertools import chain
from pathlib import Path

from .errors import InputError

MAX_TEMPLATE_BYTES = 64 * 2**10
MAX_INPUT_BYTES = 16 * 2**20  # messages and variables, as JSON

# Code points that Unicode leaves to private agreements: no text that means anything has them.
PRIVATE_USE = range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)


class TemplateSandbox:
    """A child process that renders templates. It starts when first used, and again after an attack.

    Whoever renders often keeps one, and closes it; threads may share it.
    """

    def __init__(self, cpu_limit_s: float = 2.0):
        self.cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._child = None

    def render(self, template: str, variables: dict) -> str:
        """The text that `template` makes of `variables` (anything that JSON can say)."""
        template_bytes = len(template.encode("utf-8", "replace"))
        if template_bytes > MAX_TEMPLATE_BYTES:
            raise InputError(f"the chat template has {template_bytes} bytes, at most "
                             f"{MAX_TEMPLATE_BYTES} allowed: no real one is that long")
        try:
            question = json.dumps({"template": template, "variables": variables})
        except (TypeError, ValueError) as error:
            raise InputError(f"a chat template's variables must be plain JSON: {error}") from error
        if len(question) > MAX_INPUT_BYTES:
            raise InputError(f"the messages take {len(question)} bytes, at most {MAX_INPUT_BYTES} "
                             "allowed: shorten them")
        with self._lock:
            reply = json.loads(self._ask(question))
        if "error" in reply:
            raise InputError("the model's chat template cannot be used here: "
                             + " ".join(reply["error"].split()))
        return reply["text"]

    def _ask(self, question: str) -> str:
        if self._child is None:
            # -P: the folder of the script holds our own modules, which must not shadow others
            command = [sys.executable, "-P", str(Path(__file__).with_name("template_sandbox.py")),
                       str(self.cpu_limit_s)]
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                           stderr=subprocess.PIPE, encoding="ascii",
                                           errors="replace")
        try:
            self._child.stdin.write(question + "\n")
            self._child.stdin.flush()
            reply = self._child.stdout.readline()
        except BrokenPipeError:
            reply = ""
        except BaseException:  # an interrupt: the reply would be taken for the next question's
            self.close()
            raise
        return reply or self._explain_death()

    def _explain_death(self) -> str:
        returncode = self._child.wait()
        last_words = self.close().strip().rpartition("\n")[2]
        if returncode == -signal.SIGPROF:
            last_words = (f"it ran for more than {self.cpu_limit_s} s of processor time "
                          "(a loop without end?)")
        return json.dumps({"error": last_words or f"it crashed its process ({returncode})"})

    def close(self) -> str:
        """End the child; returns what it wrote on standard error."""
        child, self._child = self._child, None
        if child is None:
            return ""
        child.kill()
        return child.communicate()[1]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def __del__(self):
        if hasattr(self, "_child"):  # not in a copy that was never set up
            self.close()


def render(template: str, messages: list[dict], *, bos_token: str = "", eos_token: str = "",
           add_generation_prompt: bool = True, sandbox: TemplateSandbox | None = None,
           **extra) -> str:
    """The prompt that `template` makes of `messages`, as transformers' apply_chat_template does.

    messages: [{"role": str, "content": str}, ...]. add_generation_prompt ends the prompt where
    the assistant's answer begins. `extra` are further variables of the template, for example
    enable_thinking=False for Qwen3. Without a sandbox to share, a child is started for this call.

    Raises InputError for bad messages, and for a template that refuses them, does not parse,
    reaches for Python's internals, or needs too much time, memory or room.
    """
    _check_messages(messages)
    variables = {"messages": messages, "bos_token": bos_token, "eos_token": eos_token,
                 "add_generation_prompt": add_generation_prompt,
                 "tools": None, "documents": None} | extra
    if sandbox is not None:
        return sandbox.render(template, variables)
    with TemplateSandbox() as own_sandbox:
        return own_sandbox.render(template, variables)


def encode_chat(tokenizer, template: str, messages: list[dict], *,
                add_generation_prompt: bool = True, sandbox: TemplateSandbox | None = None,
                **extra) -> list[int]:
    """The token ids of a conversation; special tokens come from the template alone.

    What stands in a message is text, even where it spells a special token. So before rendering,
    each such spelling in a message is replaced by a private-use character that occurs nowhere
    else; the prompt is cut at the special tokens that are then left, the template's own; and
    only in the pieces between them are the spellings put back. A template that looks for a
    special token inside a message (to cut old reasoning out, say) does not find it.
    """
    _check_messages(messages)
    special_tokens = tokenizer.special_tokens
    further = json.dumps(extra, ensure_ascii=False, default=str)
    taken = set("".join(chain([template, further], special_tokens,
                              *(message.values() for message in messages))))
    unused = (chr(code) for code in chain(*PRIVATE_USE) if chr(code) not in taken)
    stand_in_of = dict(zip(special_tokens, unused))
    longest_first = sorted(stand_in_of, key=len, reverse=True)
    spelling = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    masked = [{key: spelling.sub(lambda match: stand_in_of[match[0]], text)
               for key, text in message.items()} for message in messages]
    text_of_id = {token_id: text for text, token_id in special_tokens.items()}
    prompt = render(template, masked, bos_token=text_of_id.get(tokenizer.bos_token_id, ""),
                    eos_token=text_of_id.get(tokenizer.eos_token_id, ""),
                    add_generation_prompt=add_generation_prompt, sandbox=sandbox, **extra)

    put_back = {ord(stand_in): text for text, stand_in in stand_in_of.items()}
    token_ids = []
    for piece in tokenizer.split_special(prompt):
        if isinstance(piece, int):
            token_ids.append(piece)
        else:
            token_ids += tokenizer.encode(piece.translate(put_back))
    return token_ids


def _check_messages(messages):
    if not isinstance(messages, list) or not messages:
        raise InputError('messages must be a list of at least one {"role": ..., "content": ...}, '
                         f"not {messages!r:.80}")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            found = list(message) if isinstance(message, dict) else type(message).__name__
            raise InputError(f'messages[{index}] must have the keys "role" and "content" and no '
                             f"other, not {found!s:.80}")
        for key, text in message.items():
            if not isinstance(text, str):
                raise InputError(f"messages[{index}][{key!r}] is of type {type(text).__name__}, "
                                 "must be a str: minillm reads text only")
