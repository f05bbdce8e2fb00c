"""python -m minillm eval: perplexity and KL divergence of a model, from the command line.

`evaluation.py` computes them and says what they mean; here are the texts, the reference model and
what is printed. Chapter 11_quantization tells the story.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from .errors import InputError
from .evaluation import WINDOW, check_sizes, evaluate_kld, evaluate_perplexity
from .generate import PREFILL_CHUNK
from .loading.registry import ENTRIES, fetch

PROSE = "prose"
TEXTS = (*(entry.name for entry in ENTRIES if entry.kind == "text"), PROSE)
CHECKOUT = Path(__file__).resolve().parents[1]
NUM_TOKENS = 8192  # in 16 windows of 512: 8176 of them are scored


def add_eval_flags(parser):
    parser.add_argument("metric", choices=("perplexity", "kld"),
                        help="perplexity, or KL divergence from the float32 model")
    parser.add_argument("--text", default="macbeth", metavar="|".join((*TEXTS, "FILE")),
                        help="what to predict; prose is this project's README files; the default "
                        "is macbeth, which nothing here is trained or calibrated on")
    parser.add_argument("--tokens", type=int, default=NUM_TOKENS, metavar="N",
                        help=f"the first N of the text; the default is {NUM_TOKENS}")
    parser.add_argument("--window", type=int, default=WINDOW, metavar="W",
                        help=f"tokens that see each other; the default is {WINDOW}")
    parser.add_argument("--chunk", type=int, default=PREFILL_CHUNK, metavar="N",
                        help=f"tokens a forward pass; {PREFILL_CHUNK}, the default, is how prompts "
                        "are read, and 1 is how answers are written")
    parser.add_argument("--reference", metavar="M",
                        help="kld: the model to compare with; by default the same one, unquantized")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def evaluate(args, open_llm):
    """open_llm: cli.py's, from the flags of the model to an LLM."""
    if args.reference is not None and args.metric != "kld":
        raise InputError("--reference is what kld compares with: leave it out for perplexity")
    if args.tokens < 3:
        raise InputError(f"--tokens is {args.tokens}, must be at least 3")
    text = read_text(args.text)
    llm = open_llm(args)
    check_sizes(llm, args.window, args.chunk)
    token_ids = first_tokens(llm, text, args)
    reference = open_reference(llm, text, token_ids, args) if args.metric == "kld" else None
    try:
        if reference is None:
            result = evaluate_perplexity(llm, token_ids, args.window, True, args.chunk)
        else:
            result = evaluate_kld(llm, reference, token_ids, args.window, True, args.chunk)
    except FloatingPointError as error:
        raise InputError(f"{error}: choose another --dtype, or another --quantize") from None
    if args.json:
        print(json.dumps(describe(llm, reference, args, result)))
    else:
        print("\n".join(summary(llm, reference, args, result)))


def read_text(name):
    """A registered text, the project's prose, or a file."""
    if name == PROSE:
        return read_prose(CHECKOUT)
    path = fetch(name) if name in TEXTS else Path(os.path.expanduser(name))
    if not os.path.isfile(path):
        raise InputError(f"text {name!r} is neither known nor a file: choose {', '.join(TEXTS)}, "
                         "or give a text file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is no UTF-8 text, byte {error.start} does not fit: give a text "
                         "file") from None


def read_prose(folder):
    """README.md, then the chapters' in their order. It changes as the project does."""
    paths = [folder / "README.md", *sorted(folder.glob("chapters/*/README.md"))]
    if len(paths) < 2 or not paths[0].is_file():
        raise InputError(f"--text {PROSE} is the README files of a checkout, and an installed "
                         f"minillm has none: choose another text")
    return "\n\n".join(path.read_text(encoding="utf-8") for path in paths)


def first_tokens(llm, text, args):
    token_ids = llm.encode_prompt(text)
    if len(token_ids) < args.tokens:
        raise InputError(f"{args.text} is too short: it has {len(token_ids)} tokens and --tokens "
                         f"is {args.tokens}: ask for fewer, or give a longer text")
    return token_ids[: args.tokens]


def open_reference(llm, text, token_ids, args):
    """The float32 model in PyTorch, on the device of `llm`."""
    from .llm import LLM

    reference = LLM(args.reference or llm.model, "torch", llm.runner.device, "float32")
    if reference.quantize is not None:
        raise InputError(f"{reference.model} is quantized already, as {reference.quantize}: name "
                         "the model that it was made from with --reference")
    if first_tokens(reference, text, args) != token_ids:
        raise InputError(f"{reference.model} cuts the text into other tokens than {llm.model}: "
                         "compare models that have the same tokenizer")
    return reference


def describe(llm, reference, args, result):
    """What --json prints."""
    return {
        "metric": args.metric,
        **dataclasses.asdict(result),
        "model": llm.model,
        "reference": None if reference is None else reference.model,
        "backend": llm.runner.backend,
        "device": llm.runner.device,
        "dtype": llm.runner.dtype,
        "quantize": llm.quantize,
        "kv_dtype": llm.runner.kv_dtype,
        "text": args.text,
        "tokens": args.tokens,
        "window": args.window,
        "chunk": args.chunk,
    }


def summary(llm, reference, args, result):
    """Lines of text. ± is one standard error."""
    runner = llm.runner
    lines = [f"{llm.model} · {runner.backend} {runner.device} {runner.dtype} · weights "
             f"{llm.quantize or 'as they are'} · cache {runner.kv_dtype} · "
             f"{result.num_scored_tokens} tokens of {args.text} in windows of {args.window}, "
             f"chunks of {args.chunk}"]
    if reference is None:
        lines.append(f"perplexity {result.perplexity:.3f} ± {result.perplexity_se:.3f} · "
                     f"{result.bits_per_token:.3f} bits a token")
        return lines
    lines.append(f"KL divergence {result.mean_kld:.3g} ± {result.mean_kld_se:.1g} nats · "
                 f"median {result.median_kld:.3g} · 99 % below {result.p99_kld:.3g} · "
                 f"largest {result.max_kld:.3g} · same best token "
                 f"{result.same_best:.2%} ± {result.same_best_se:.2%}")
    lines.append(f"perplexity {result.perplexity:.3f} ± {result.perplexity_se:.3f} · reference "
                 f"{result.reference_perplexity:.3f} ± {result.reference_perplexity_se:.3f} · "
                 f"ratio {result.perplexity_ratio:.4f} ± {result.perplexity_ratio_se:.4f}")
    return lines
