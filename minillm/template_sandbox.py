"""How is code that came with a model run, when nobody has read it?

A chat template is a program: Jinja has loops, macros and string arithmetic, so a template can ask
for 2^100 bytes in one line, and Jinja's sandbox, which keeps templates away from Python's
internals, has been escaped before (CVE-2024-34359, CVE-2024-56326). Listing all that is harmful
is a race; so this file is the main program of a child process in which little can be harmed: the
operating system bounds its memory and its processor time, and lets it open no file, no socket and
no pipe to another program. `chat_template.py` starts it, chapter 02_tokenizer tells the story.

It answers lines of JSON: {"template": ..., "variables": ...} in, {"text": ...} or {"error": ...}
out. The environment is the one that transformers gives its templates. Left out on purpose:
Windows, which has no such limits; and the memory bound on macOS, which does not enforce it (the
processor time that filling memory takes bounds it there).

This file is run by its path, and so imports nothing of minillm.
"""

from __future__ import annotations

import json
import pprint  # noqa: F401 - see below
import resource
import signal
import sys
import textwrap  # noqa: F401 - see below
from datetime import datetime
from functools import lru_cache

import jinja2
import jinja2.constants
import jinja2.debug
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# Jinja imports pprint, textwrap, its constants and debug at their first use: too late here, where
# by then no file opens any more.

MEMORY_LIMIT_BYTES = 512 * 2**20
MAX_EXTRA_CHARS = 2**20  # what a template may write beyond twice what it was given
MAX_ERROR_CHARS = 500


class Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which would print an empty text for a forbidden attribute; this refuses."""

    def unsafe_undefined(self, obj, attribute):
        raise SecurityError(f"it reaches for {attribute!r} of a {type(obj).__name__}")


class Namespace(jinja2.utils.Namespace):
    """`namespace()` without names such as __call__, which Jinja would take for the object's own."""

    def __init__(self, *args, **kwargs):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if name.startswith("_"):
            raise SecurityError(f"it stores {name!r} in a namespace")
        super().__setitem__(name, value)


class GenerationTag(Extension):
    """{% generation %}…{% endgeneration %} marks text to train on; rendering ignores the marks."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON for a model, which wants < and not \\u003c; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def raise_exception(message):
    """What a template calls when it cannot render these messages."""
    raise jinja2.TemplateError(message)


def strftime_now(pattern):
    """The date, which some templates tell the model."""
    return datetime.now().strftime(pattern)


@lru_cache(maxsize=1)
def compiled(template: str) -> jinja2.Template:
    environment = Environment(trim_blocks=True, lstrip_blocks=True,
                              extensions=[GenerationTag, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now,
                               namespace=Namespace)
    return environment.from_string(template)


def answer(template: str, variables: dict, max_output_chars: int) -> dict:
    """Render, or say in one line why not."""
    try:
        text = compiled(template).render(**variables)
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_LIMIT_BYTES} bytes of memory"}
    except jinja2.TemplateError as error:
        return {"error": str(error.message)[:MAX_ERROR_CHARS]}
    except Exception as error:  # a stranger's code may raise anything
        return {"error": f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]}
    if len(text) > max_output_chars:
        return {"error": f"it writes {len(text)} characters, at most {max_output_chars} allowed"}
    return {"text": text}


def close_the_doors():
    """From here on this process can compute, and do nothing else."""
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_CORE):
        resource.setrlimit(kind, (0, 0))


def main(cpu_limit_s: float):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; its end is ours too
    answer("{{ strftime_now('%c') | tojson }}", {}, 100)  # loads the time zone, with doors open
    close_the_doors()
    for line in sys.stdin:
        # Counts processor time, so a busy machine cannot make a good template late; when it runs
        # out the kernel ends this process, even in the middle of one long C function.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        max_output_chars = MAX_EXTRA_CHARS + 2 * len(line)
        reply = json.dumps(answer(**json.loads(line), max_output_chars=max_output_chars))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(reply, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
