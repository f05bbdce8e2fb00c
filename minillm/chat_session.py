"""python -m minillm chat: a conversation in the terminal.

The conversation and its cache live in `llm.Conversation`; here are the keys. Ctrl-C breaks off an
answer, and the conversation goes on from there; at the prompt it asks to be meant: Ctrl-D ends.
"""

from __future__ import annotations

import sys

from .errors import InputError

HELP = "/reset forgets the conversation · /exit or Ctrl-D ends · Ctrl-C breaks off an answer"


def chat_session(llm, params, system=None):
    """Read a line, stream the answer, print its metrics; until the input ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401  input() then has a history and editable lines

        print(f"{llm.model} · {llm.runner.backend} {llm.runner.device} {llm.runner.dtype}")
        print(HELP)
    conversation = llm.conversation(system)
    while (text := read_message()) is not None:
        if text == "/exit":
            break
        if text == "/help":
            print(HELP)
        elif text == "/reset":
            conversation = llm.conversation(system)
            print("(forgotten)")
        elif text.startswith("/"):
            print(f"({text} is no command) {HELP}")
        elif text:
            answer(conversation, text, params)


def read_message():
    """The next line, stripped; None at the end of the input."""
    try:
        return input("\n> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print(f"\n({HELP})")
        return ""


def answer(conversation, text, params):
    """Stream one answer. Being interrupted or refused ends the answer, not the conversation."""
    try:
        output = print_all(conversation.say(text, params))
    except KeyboardInterrupt:
        print(" (broken off)")
    except InputError as error:
        print(f"({error}; /reset forgets the conversation)", file=sys.stderr)
    else:
        metrics = output.metrics
        parts = [f"{metrics.num_cached_tokens} of {metrics.num_prompt_tokens} prompt tokens cached",
                 f"TTFT {metrics.ttft_ms:.0f} ms"]
        if metrics.tpot_ms:
            parts.append(f"{metrics.decode_tokens_per_s:.0f} tokens/s")
        if output.finish_reason == "length":
            parts.append(f"cut off after {metrics.num_output_tokens} tokens")
        print(f"[{' · '.join(parts)}]", file=sys.stderr)


def print_all(pieces):
    """Print a generator's text as it comes; -> what the generator returns."""
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            print()
            return end.value
