"""python -m minillm: fetch, generate, chat, bench, eval, quantize, grade, course.

A user's mistake costs one line on standard error and exit code 2. With --json, standard output
holds one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

from . import __version__
from .course.commands import add_commands as add_course_commands
from .course.commands import plugged_in
from .course.exercises import all_exercises
from .errors import InputError
from .evaluation_command import add_eval_flags, evaluate
from .loading.registry import ENTRIES, fetch, resolve
from .quantize_model import FORMATS
from .sampling_params import SamplingParams

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_INTERRUPTED = 130
CHAT_MAX_TOKENS = 512  # an answer in a conversation should end where the model ends it


def main(argv=None):
    """Run one command; -> the exit code."""
    take_any_text()
    args = build_parser().parse_args(argv)
    try:
        exit_code = args.run(args) or 0
        print(end="", flush=True)
        return exit_code
    except InputError as error:
        print(f"minillm {args.command}: {error}", file=sys.stderr)
        return EXIT_USER_MISTAKE
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone (`| head`): nobody is left to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:  # a full disk, a closed output
        print(f"minillm {args.command}: {error}", file=sys.stderr)
        return EXIT_FAILURE
    return 0


def take_any_text():
    """No text may end the program: not bytes that are no UTF-8, nor a terminal that knows ASCII."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace"),
                           (sys.stderr, "replace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def run_fetch(args):
    for name in args.names or [entry.name for entry in ENTRIES]:
        print(fetch(name))


def run_generate(args):
    if args.backend is None:  # what a student writes first is the NumPy function
        args.backend = "numpy" if args.impl else "torch"
    with plugged_in(args.impl, args.backend) as names:
        if args.batching is None:
            args.batching = batching_of(names)
        answer(args)


def batching_of(names):
    """The kind of batching in which a student's functions are called: that of their chapter."""
    chapters = {each.chapter[:2] for each in all_exercises()
                if {each.name, each.twin_name} & set(names)}
    if not names or chapters & {"09", "10"}:
        return "continuous"
    return "static" if "08" in chapters else "none"


def answer(args):
    prompt = read_stdin() if args.prompt == "-" else args.prompt
    params = read_sampling_params(args)
    if params.logprobs is not None and not args.json:
        raise InputError("--logprobs belongs to a JSON object: add --json")
    if not prompt:
        raise InputError("the prompt is empty: give at least one token")
    if args.system is not None and not args.chat:
        raise InputError("--system belongs to a conversation: add --chat")
    llm = open_llm(args)
    if args.chat:
        prompt = [{"role": "user", "content": prompt}]
        if args.system is not None:
            prompt.insert(0, {"role": "system", "content": args.system})
    if args.json or params.n > 1 or args.batching == "static":  # which has no stream to show
        output = llm.chat(prompt, params) if args.chat else llm.generate([prompt], params)[0]
        print(json.dumps(describe(llm, output)) if args.json
              else "\n---\n".join(completion.text for completion in output.outputs))
    else:
        stream = llm.stream(prompt, params)
        output = stream.output
        for piece in stream:
            print(piece, end="", flush=True)
        print()
    if args.stats:
        print(summary(llm, output), file=sys.stderr)


def read_stdin():
    if sys.stdin is None:
        raise InputError("there is no standard input to read the prompt from: give it as text")
    return sys.stdin.read()


def run_chat(args):
    from .chat_session import chat_session

    for name in ("n", "logprobs"):
        if getattr(args, name) is not None:
            raise InputError(f"--{name} is for generate: a conversation shows one answer as text")
    if args.max_tokens is None:
        args.max_tokens = CHAT_MAX_TOKENS
    chat_session(open_llm(args), read_sampling_params(args), args.system)


def run_bench(args):
    from .bench import run_benchmark

    run_benchmark(args.name, args.out)


def run_eval(args):
    evaluate(args, open_llm)


def run_quantize(args):
    """Write a model's weights in fewer bits to a file that can be loaded like any other."""
    from .loading import open_checkpoint
    from .loading.gguf_writer import check_gguf_format, write_gguf
    from .loading.quantized_writer import check_output, write_quantized_file
    from .quantize_model import parse_format, quantize_checkpoint

    suffix = Path(args.out).suffix.lower()
    if suffix not in (".safetensors", ".gguf"):
        raise InputError(f"--out is {args.out!r}, must end in .safetensors (for minillm) or .gguf "
                         "(for llama.cpp as well)")
    check_format = check_gguf_format if suffix == ".gguf" else parse_format
    check_format(args.quantize)
    check_output(args.out, args.force)
    source = resolve(args.model)
    if Path(args.out).resolve() == source.resolve() or Path(args.out).resolve().parent == \
            source.resolve():
        raise InputError(f"--out {args.out} is a file of the model that is read: give another path")
    checkpoint = open_checkpoint(source)
    if suffix == ".gguf":
        written = write_gguf(checkpoint, args.quantize, args.out)
    else:
        written = write_quantized_file(quantize_checkpoint(checkpoint, args.quantize), args.out)
    print(f"{written.path}: {written.size_bytes / 1e6:.1f} MB, "
          f"{written.bits_a_weight:.2f} bits a weight")


def open_llm(args):
    from .llm import LLM

    return LLM(args.model, args.backend or "torch", args.device, args.dtype, args.quantize,
               args.kv_dtype, getattr(args, "batching", "continuous"))


def describe(llm, output):
    """What --json prints: the first completion's fields on top, all of them under "outputs"."""
    completions = [dataclasses.asdict(completion) for completion in output.outputs]
    return {
        **completions[0],
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": completions,
        "model": llm.model,
        "backend": llm.runner.backend,
        "device": llm.runner.device,
        "dtype": llm.runner.dtype,
        "quantize": llm.quantize,
        "kv_dtype": llm.runner.kv_dtype,
    }


def summary(llm, output):
    """One line of metrics."""
    metrics = output.metrics
    parts = [f"{metrics.num_prompt_tokens} prompt tokens", f"TTFT {metrics.ttft_ms:.0f} ms"]
    if metrics.num_cached_tokens:
        parts[0] += f" ({metrics.num_cached_tokens} cached)"
    parts.append(f"{metrics.num_output_tokens} output tokens")
    if metrics.tpot_ms:
        parts.append(f"TPOT {metrics.tpot_ms:.1f} ms, {metrics.decode_tokens_per_s:.0f} tokens/s")
    where = f"{llm.runner.backend} {llm.runner.device} {llm.runner.dtype}"
    where += f" {llm.quantize}" if llm.quantize else ""
    return f"[{' · '.join(parts)} · {where}]"


def read_sampling_params(args):
    """SamplingParams from the flags that were given; the others keep their defaults."""
    values = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    given = {name: value for name, value in values.items() if value is not None}
    bias = given.pop("logit_bias", None)
    if bias is not None:
        pairs = [entry.partition("=") for entry in bias]
        try:
            given["logit_bias"] = {int(token): float(value) for token, _, value in pairs}
        except ValueError:
            raise InputError(f"--logit-bias takes TOKEN_ID=BIAS such as 15=-2.5, not "
                             f"{' '.join(bias)!r}") from None
        tokens = [int(token) for token, _, _ in pairs]
        if len(given["logit_bias"]) < len(tokens):
            twice = next(token for token in tokens if tokens.count(token) > 1)
            raise InputError(f"--logit-bias names token {twice} twice, must name it once")
    return SamplingParams(**given)


SAMPLING_FLAGS = {
    "temperature": (float, "0 takes the best token; the default is 1"),
    "top_k": (int, "keep the K best tokens"),
    "top_p": (float, "keep the fewest tokens that have this probability together"),
    "min_p": (float, "keep tokens at least this likely, relative to the best"),
    "repetition_penalty": (float, "above 1: less of what was there before"),
    "presence_penalty": (float, "subtracted once from what the answer has"),
    "frequency_penalty": (float, "subtracted for each time that the answer has it"),
    "logit_bias": (str, "TOKEN_ID=BIAS, may be repeated"),
    "stop": (str, "a text that ends the answer, may be repeated"),
    "seed": (int, "same seed, same text"),
    "max_tokens": (int, "tokens of answer at most; the default is 64"),
    "min_tokens": (int, "tokens of answer at least"),
    "ignore_eos": (bool, "go on where the model would end"),
    "logprobs": (int, "with --json: log-probabilities of this many best tokens"),
    "n": (int, "answers to the same prompt"),
}


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line."""

    def error(self, message):
        line = f"{self.prog}: {message}; {self.prog} --help shows all"
        self.exit(EXIT_USER_MISTAKE, line.replace("\n", "\\n") + "\n")


def build_parser():
    parser = Parser(prog="minillm", description="LLM inference from scratch.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, run, text):
        child = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        child.set_defaults(run=run)
        return child

    fetch_command = command("fetch", run_fetch, "bring weights and texts to weights/, checked")
    fetch_command.add_argument("names", nargs="*", metavar="NAME",
                               help="; ".join(f"{entry.name} ({entry.kind})" for entry in ENTRIES)
                               + '; or "org/name" on the hub; all registered ones if none is given')

    generate_command = command("generate", run_generate, "continue a prompt, or answer it")
    generate_command.add_argument("prompt", metavar="PROMPT", help="a text; - reads standard input")
    generate_command.add_argument("--chat", action="store_true", help="as a message to the model")
    generate_command.add_argument("--json", action="store_true", help="print one JSON object")
    generate_command.add_argument("--stats", action="store_true",
                                  help="print a line of metrics on standard error")
    generate_command.add_argument("--impl", metavar="FILE",
                                  help="use your functions in this file; backend numpy by default")
    generate_command.add_argument("--batching", metavar="continuous|static|none",
                                  help="which loop answers; the texts are the same")
    chat_command = command("chat", run_chat, "a conversation in the terminal")
    for child in (generate_command, chat_command):
        child.add_argument("--system", metavar="TEXT", help="how the model is to behave")
        add_model_flags(child)
        add_sampling_flags(child)

    bench_command = command("bench", run_bench, "measure, write JSON, draw the figure")
    bench_command.add_argument("name", metavar="NAME|all")
    bench_command.add_argument("--out", metavar="FOLDER", help="instead of the chapter's results/")

    eval_command = command("eval", run_eval, "what a compression costs in quality")
    add_eval_flags(eval_command)
    add_model_flags(eval_command)

    quantize_command = command("quantize", run_quantize, "write a model in fewer bits to a file")
    quantize_command.add_argument("model", metavar="MODEL",
                                  help="a name, a .gguf file, a Hugging Face folder or hub id")
    quantize_command.add_argument("--quantize", required=True, metavar="FORMAT",
                                  help=f"into .safetensors: {FORMATS}; into .gguf: q8_0, q4_0")
    quantize_command.add_argument("--out", required=True, metavar="FILE",
                                  help="a .safetensors file, or a .gguf file for llama.cpp")
    quantize_command.add_argument("--force", action="store_true", help="replace the file")
    add_course_commands(command)
    return parser


def add_model_flags(parser):
    parser.add_argument("--model", default="smollm2-135m-instruct", metavar="M",
                        help="a registered name, a .gguf file, a .safetensors file of minillm "
                        "quantize, a Hugging Face folder or hub id")
    parser.add_argument("--backend", metavar="numpy|torch")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda|cuda:N")
    parser.add_argument("--dtype", default="auto", metavar="auto|float32|bfloat16|float16")
    parser.add_argument("--quantize", metavar="Q", help=f"how to store the weights: {FORMATS}")
    parser.add_argument("--kv-dtype", default="auto", metavar="auto|int8",
                        help="how to store keys and values")


def add_sampling_flags(parser):
    for name, (kind, text) in SAMPLING_FLAGS.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            parser.add_argument(flag, action="store_true", default=None, help=text)
        elif name in ("stop", "logit_bias"):
            parser.add_argument(flag, action="append", metavar="TEXT", help=text)
        else:
            parser.add_argument(flag, type=kind, metavar="N", help=text)
