"""What does a format cost in quality, and what does it buy in speed?

Every format is written to a file once, and then judged three ways: by the bits that a weight takes
in that file; by how far the model's distributions are from those of the float32 model, on a text
that nothing was calibrated on; and by its speed, in a process of its own, in turns with the others.
llama.cpp's Q4_0, which it makes of the same GGUF file, stands beside ours. What an int8 cache costs
is measured where it matters, behind a long context. Chapter folder: 11_quantization.
"""

from __future__ import annotations

import dataclasses
import tempfile
from math import prod
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..loading.registry import fetch, resolve
from . import draw, is_fast
from .engines import Minillm, open_workers, speeds_of, take_turns
from .llamacpp import LLAMA_CPP, LlamaCpp, has_llama_cpp, requantize

MODEL = "smollm2-135m-instruct"
REQUIRED_TO_PUBLISH = {"llama_cpp": LLAMA_CPP}
PEER = "llama.cpp Q4_0"
INT8_CACHE = "native, int8 cache"
FORMATS = ("bf16", "int8", "w8a8", "w8a8-smooth", "native", INT8_CACHE, "int4", "int4-sym",
           "int4-g64", "int4-g64-sym", "int4-g64-gptq")
FAST_FORMATS = ("bf16", "native", INT8_CACHE, "int4-g64")
NUM_TOKENS, WINDOW, LONG_WINDOW = 8192, 512, 4096
LEAST_KLD = 1e-5  # what is drawn for anything below: a logarithm has no end
DECODE_PROMPT_TOKENS, DECODE_TOKENS, PREFILL_TOKENS = 41, 128, 512


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    rounds, names = (2, FAST_FORMATS) if is_fast() else (7, FORMATS)
    num_tokens, window, long_window = (64, 32, 64) if is_fast() else (
        NUM_TOKENS, WINDOW, LONG_WINDOW)
    decode_tokens, prefill_tokens = (4, 32) if is_fast() else (DECODE_TOKENS, PREFILL_TOKENS)
    reference = LLM(MODEL, device="cpu", dtype="float32")
    text = fetch("macbeth").read_text(encoding="utf-8")
    token_ids = reference.encode_prompt(text)[:num_tokens]
    with tempfile.TemporaryDirectory() as folder:
        formats = {name: write_format(name, Path(folder))
                   for name in tqdm(names, desc="write", unit="format")}
        if has_llama_cpp():
            formats[PEER] = write_peer(Path(folder))
        for about in tqdm(formats.values(), desc="judge", unit="format"):
            about["quality"] = judge(about, reference, token_ids, window)
        long_context = judge_cache(token_ids, long_window)
        del reference
        engines = {name: about.pop("engine") for name, about in formats.items()}
        with open_workers(engines) as workers:
            samples, _ = take_turns(workers, rounds, token_ids[:DECODE_PROMPT_TOKENS],
                                    decode_tokens, token_ids[:prefill_tokens])
    return {
        "arguments": {"model": MODEL, "rounds": rounds, "text": "macbeth",
                      "tokens": len(token_ids), "window": window,
                      "decode_prompt_tokens": DECODE_PROMPT_TOKENS, "decode_tokens": decode_tokens,
                      "prefill_tokens": prefill_tokens},
        "num_weights": count_weights(),
        "formats": formats,
        "long_context": {"window": long_window, **long_context},
        "samples": samples,
    }


def count_weights():
    """All numbers of the model; a tied head is the embedding, and counts once."""
    from ..loading import open_checkpoint
    from ..loading.quantized_file import Inventory

    inventory = Inventory(open_checkpoint(resolve(MODEL)).config)
    return sum(prod(shape) for _, shape in inventory.tensors) + sum(
        in_size * sum(size for _, size in parts) for _, parts, in_size, _ in inventory.matrices)


def write_format(name, folder):
    """-> how many bits a weight takes in a format, and the engine that runs it: (class, its
    arguments ...)."""
    from ..loading import open_checkpoint
    from ..loading.quantized_writer import write_quantized_file
    from ..quantize_model import quantize_checkpoint

    if name == "bf16":
        return {"bits": 16.0, "engine": (Minillm, MODEL, "torch", "bfloat16")}
    quantize, _, cache = name.partition(", ")
    path = folder / f"{quantize}.safetensors"
    written = write_quantized_file(
        quantize_checkpoint(open_checkpoint(resolve(MODEL)), quantize), path)
    return {"bits": written.bits_a_weight,
            "engine": (Minillm, str(path), "torch", "auto", None, "int8" if cache else "auto")}


def write_peer(folder):
    """The same of llama.cpp's Q4_0."""
    from ..loading.gguf_container import GGUFContainer

    path = folder / "Q4_0.gguf"
    requantize(MODEL, path, "Q4_0")
    tensors = GGUFContainer(path).tensors.values()
    bits = 8 * sum(each.size_bytes for each in tensors) / sum(prod(each.shape) for each in tensors)
    return {"bits": bits, "engine": (LlamaCpp, str(path))}


def judge(about, reference, token_ids, window):
    """KL divergence, top token and perplexity of a format, as `evaluate_kld` reports them."""
    from ..evaluation import evaluate_kld

    engine, *arguments = about["engine"]
    if engine is LlamaCpp:
        llm = LlamaCppLLM(reference, *arguments)
    else:
        llm = engine(*arguments).llm
    return dataclasses.asdict(evaluate_kld(llm, reference, token_ids, window))


def judge_cache(token_ids, window):
    """The same of an int8 cache beside the bfloat16 one, both with bfloat16 weights."""
    from .. import LLM
    from ..evaluation import evaluate_kld

    plain = LLM(MODEL, device="cpu", dtype="bfloat16")
    int8 = LLM(MODEL, device="cpu", dtype="bfloat16", kv_dtype="int8")
    caches = {"bfloat16": plain.runner.new_cache(window), "int8": int8.runner.new_cache(window)}
    return {"quality": dataclasses.asdict(evaluate_kld(int8, plain, token_ids, window)),
            "cache_bytes": {name: cache_bytes(cache) for name, cache in caches.items()}}


def cache_bytes(cache):
    """Bytes of all arrays that a cache keeps."""
    arrays = [each for each in vars(cache).values() if hasattr(each, "element_size")]
    return sum(each.numel() * each.element_size() for each in arrays)


class LlamaCppLLM:
    """As much of an LLM as `evaluate_kld` asks for, with llama.cpp behind it.

    It is its own runner, and its own cache.   like: an LLM of the same model, whose tokenizer and
    context are also this one's.
    """

    backend, device, dtype = "llama.cpp", "cpu", "its own"

    def __init__(self, like, path):
        self.model, self.tokenizer, self.encode_prompt = path, like.tokenizer, like.encode_prompt
        self.vocab_size, self.context_len = like.vocab_size, like.context_len
        self.runner = self
        self.engine = LlamaCpp(path)

    def new_cache(self, capacity):
        return self

    def truncate(self, length):
        if length:
            raise ValueError(f"length is {length}, must be 0: all is forgotten, or nothing")
        self.engine.clear()

    def forward(self, tokens, positions, cache):
        """Same contract as NumpyRunner.forward, of all rows."""
        return self.engine.forward(tokens, positions[0], all_rows=True).copy()


def rows_of(result):
    """One row a format: size, quality, and speed in every round."""
    rows = []
    for name, about in result["formats"].items():
        samples = [sample for sample in result["samples"] if sample["contestant"] == name]
        decode, prefill = speeds_of(samples, result["arguments"]["prefill_tokens"])
        rows.append({**about, "name": name, "decode": float(np.median(decode)),
                     "tpot_ms": [1000 / each for each in decode], "prefill": prefill})
    return rows


def figure(result):
    """Quality against size, coloured by speed, and quality against speed."""
    rows = rows_of(result)
    picture, axes = draw.new_figure(1, 2, height=4.4)
    klds = [max(row["quality"]["mean_kld"], LEAST_KLD) for row in rows]
    speeds = [row["decode"] for row in rows]
    for axis, xs, label in zip(
            axes, ([row["bits"] for row in rows], [np.median(row["tpot_ms"]) for row in rows]),
            ("bits a weight, scales included", "TPOT, ms a token (median; lines: all rounds)")):
        axis.set_yscale("log")
        axis.set_xlim(min(xs) - 0.04 * max(xs), 1.3 * max(xs))  # room for the labels
        axis.set_ylim(min(klds) / 2, 4 * max(klds))
        axis.set_xlabel(label)
        axis.grid(axis="y", color="#eeeeee")
        dots = axis.scatter(xs, klds, c=speeds, cmap="viridis_r", s=36, edgecolors="black",
                            linewidths=0.5, zorder=3)
        label_points(axis, xs, klds, [row["name"] for row in rows])
    for row, kld in zip(rows, klds):
        axes[1].plot([min(row["tpot_ms"]), max(row["tpot_ms"])], [kld, kld], color=draw.GREY,
                     linewidth=1)
    axes[0].set_ylabel(f"mean KL divergence from float32, nats\n"
                       f"(drawn at {LEAST_KLD:g} where it is less)")
    axes[0].set_title("size and quality")
    axes[1].set_title("speed and quality")
    picture.colorbar(dots, ax=axes[1], label="decode, tokens/s", pad=0.02)
    return picture


def label_points(axis, xs, ys, names, gap=0.052):
    """A name to the right of every point, moved up or down so that no two are closer than `gap`,
    in heights of the axis; a line leads from a name to its point."""
    low, high = np.log(axis.get_ylim())
    heights = (np.log(ys) - low) / (high - low)
    order = np.argsort(heights)
    places = heights[order].copy()
    for _ in range(200):
        for i in range(len(places) - 1):
            overlap = gap - (places[i + 1] - places[i])
            if overlap > 0:
                places[i], places[i + 1] = places[i] - overlap / 2, places[i + 1] + overlap / 2
        places = places.clip(0.02, 0.98)
    width = np.ptp(axis.get_xlim())
    for i, place in zip(order, places):
        axis.annotate(names[i], (xs[i], ys[i]), (xs[i] + 0.06 * width, np.exp(
            low + place * (high - low))), fontsize=7, va="center",
            arrowprops={"arrowstyle": "-", "color": draw.GREY, "linewidth": 0.5, "shrinkA": 0,
                        "relpos": (0, 0.5)})


def table(result):
    """Markdown: a row a format."""
    lines = ["| format | bits a weight | MB | mean KLD, 10⁻³ nats | same best token | perplexity | "
             "× float32's | TPOT, ms | prefill, tok/s |", "| --- |" + " --- |" * 8]
    for row in rows_of(result):
        quality, megabytes = row["quality"], row["bits"] * result["num_weights"] / 8e6
        lines.append(
            f"| {row['name']} | {row['bits']:.2f} | {megabytes:.0f} | "
            f"{1000 * quality['mean_kld']:.2f} ± {1000 * quality['mean_kld_se']:.2f} | "
            f"{100 * quality['same_best']:.1f} % | "
            f"{quality['perplexity']:.2f} ± {quality['perplexity_se']:.2f} | "
            f"{quality['perplexity_ratio']:.4f} ± {quality['perplexity_ratio_se']:.4f} | "
            f"{spread(row['tpot_ms'], 1)} | {spread(row['prefill'])} |")
    arguments, machine = result["arguments"], result["machine"]
    quality = next(iter(result["formats"].values()))["quality"]
    long = result["long_context"]
    plain, int8 = (long["cache_bytes"][name] for name in ("bfloat16", "int8"))
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in (
        "torch", "llama-cpp-python") if machine["versions"].get(name))
    lines += [
        "", f"The float32 model's perplexity is {quality['reference_perplexity']:.2f} ± "
        f"{quality['reference_perplexity_se']:.2f}, on {quality['num_scored_tokens']} tokens of "
        f"{arguments['text']} in windows of {arguments['window']}.", "",
        f"An int8 cache, in windows of {long['window']} with bfloat16 weights: perplexity × "
        f"{long['quality']['perplexity_ratio']:.4f} ± {long['quality']['perplexity_ratio_se']:.4f} "
        f"of that with a bfloat16 cache, mean KLD {1000 * long['quality']['mean_kld']:.2f} · 10⁻³, "
        f"and {100 * int8 / plain:.0f} % of its bytes.", "",
        f"{machine['cores']} cores of {machine['cpu']}; {versions}; {arguments['model']}; "
        f"{arguments['rounds']} interleaved rounds, median (lowest–highest); "
        f"{arguments['decode_prompt_tokens']}-token prompt, {arguments['decode_tokens']} new "
        f"tokens; prefill of {arguments['prefill_tokens']}; {machine['date']}."]
    return "\n".join(lines)


def spread(values, digits=0):
    median, low, high = (f"{each:.{digits}f}" for each in (
        np.median(values), min(values), max(values)))
    return f"{median} ({low}–{high})"
