"""How fast is minillm beside other engines, on the same machine, in the same run?

Every contestant answers in a process of its own; the processes take turns, A B C A B C …, so that a
noisy minute hits all of them. One turn is a greedy answer of 128 tokens to a prompt of 41, and a
first token after a prompt of 512. Everybody reads the same GGUF file; llama.cpp also gets what it
makes of it itself, in its formats Q4_0 and Q8_0. Chapter folder: chapters/peers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ..loading.registry import fetch, resolve
from . import draw, is_fast
from .engines import Minillm, Transformers, in_process, open_workers, speeds_of, take_turns
from .llamacpp import LLAMA_CPP, LlamaCpp, has_llama_cpp, requantize
from .machine import flops, flops_numpy, int8_ops, read_bandwidth

MODEL = "smollm2-135m-instruct"
DECODE_PROMPT_TOKENS, DECODE_TOKENS, PREFILL_TOKENS = 41, 128, 512
REQUIRED_TO_PUBLISH = {"llama_cpp": LLAMA_CPP}
COLOURS = {"minillm": draw.BLUE, "transformers": draw.ORANGE, "llama.cpp": draw.PINK}

# name: (class, its arguments after the model, bits a weight in the layers and in the head, scales
# included). The scale and the minimum of a group or a block are 16 bits each and serve 32 weights;
# a row's scale is 32 bits for hundreds.
CONTESTANTS = {
    "minillm native": (Minillm, ("torch", "auto", "native"), (5.0, 8.5)),
    "minillm int4": (Minillm, ("torch", "auto", "int4"), (5.0, 8.5)),
    "llama.cpp Q4_1": (LlamaCpp, (), (5.0, 8.5)),
    "llama.cpp Q4_0": (LlamaCpp, (), (4.5, 8.5)),
    "minillm int8": (Minillm, ("torch", "auto", "int8"), (8.05, 8.5)),
    "minillm w8a8": (Minillm, ("torch", "auto", "w8a8"), (8.05, 8.5)),
    "llama.cpp Q8_0": (LlamaCpp, (), (8.5, 8.5)),
    "minillm torch bf16": (Minillm, ("torch", "bfloat16"), (16, 16)),
    "transformers bf16": (Transformers, ("bfloat16",), (16, 16)),
    "minillm torch fp32": (Minillm, ("torch", "float32"), (32, 32)),
    "minillm NumPy fp32": (Minillm, ("numpy", "float32"), (32, 32)),
    "transformers fp32": (Transformers, ("float32",), (32, 32)),
}
REQUANTIZED = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q8_0": "Q8_0"}  # by llama.cpp


def measure():
    """The result, as JSON wants it."""
    rounds = 2 if is_fast() else 7
    num_tokens = 4 if is_fast() else DECODE_TOKENS
    text_token_ids = read_prompt()
    decode_prompt = text_token_ids[:DECODE_PROMPT_TOKENS]
    prefill_prompt = text_token_ids[: 64 if is_fast() else PREFILL_TOKENS]

    is_complete = has_llama_cpp()
    contestants = {name: entry for name, entry in CONTESTANTS.items()
                   if entry[0] is not LlamaCpp or is_complete}
    limits = in_process(measure_peer_limits)
    with tempfile.TemporaryDirectory() as folder:
        files = make_files(contestants, Path(folder))
        entries = {name: (engine, files[name], *arguments)
                   for name, (engine, arguments, _) in contestants.items()}
        with open_workers(entries) as workers:
            samples, answers = take_turns(workers, rounds, decode_prompt, num_tokens,
                                          prefill_prompt)
            memory = {name: worker.peak_memory_bytes() for name, worker in workers.items()}
    return {
        "arguments": {"model": MODEL, "rounds": rounds,
                      "decode_prompt_tokens": len(decode_prompt), "decode_tokens": num_tokens,
                      "prefill_tokens": len(prefill_prompt)},
        "limits": limits,
        "contestants": {
            name: {"bits": bits, "load_s": workers[name].load_s,
                   "memory_before_bytes": workers[name].memory_before_bytes,
                   "peak_memory_bytes": memory[name]}
            for name, (_, _, bits) in contestants.items()},
        "answers": answers,
        "samples": samples,
    }


def make_files(contestants, folder):
    """-> {contestant: the model that it loads}, after making those that llama.cpp has to make."""
    files = dict.fromkeys(contestants, MODEL)
    for name in tqdm(REQUANTIZED.keys() & contestants.keys(), desc="requantize", leave=False):
        files[name] = folder / f"{REQUANTIZED[name]}.gguf"
        requantize(MODEL, files[name], REQUANTIZED[name])
    return files


def read_prompt():
    """The beginning of Macbeth, in the model's tokens."""
    from ..loading import open_checkpoint

    tokenizer = open_checkpoint(resolve(MODEL)).tokenizer()
    text = fetch("macbeth").read_text(encoding="utf-8")
    return tokenizer.encode(text[: 8 * PREFILL_TOKENS])


def measure_limits():
    """Bandwidth and arithmetic of this machine, and what a token of this model needs of them."""
    from ..loading import open_checkpoint

    config = open_checkpoint(resolve(MODEL)).config
    (H, K, D), C = config.heads, config.hidden_size
    layer_params = C * (H + 2 * K) * D + H * D * C + 3 * C * config.intermediate_size
    return {
        "read_bytes_per_s": read_bandwidth(),
        "flops_per_s": {"float32": max(flops("float32"), flops_numpy()),
                        "bfloat16": flops("bfloat16")},
        # Norms are left out (a ten-thousandth). The tied embedding is read once, as the head.
        "layer_params": config.num_hidden_layers * layer_params,
        "head_params": config.vocab_size * C,
    }


def measure_peer_limits():
    """The same, with what few bits change: int8 products, and weights that fit in a cache."""
    limits = measure_limits()
    limits["flops_per_s"]["int8"] = int8_ops(256 if is_fast() else 2048)
    sizes = {token_bytes(limits, bits) for _, _, bits in CONTESTANTS.values()}
    limits["read_again"] = [[size, read_bandwidth(size, repeats=20)] for size in sorted(sizes)]
    return limits


def token_bytes(limits, bits):
    """Bytes of weights that a decoded token reads.   bits: a weight, of the layers and the head."""
    return round((limits["layer_params"] * bits[0] + limits["head_params"] * bits[1]) / 8)


def figure(result):
    """Decode and prefill speed of every contestant, with the machine's limits."""
    rows = rows_of(result)
    picture, axes = draw.new_figure(1, 2, height=0.9 + 0.28 * len(rows))
    prefill_title = f"prefill of {result['arguments']['prefill_tokens']}"
    for axis, key, title in zip(axes, ("decode", "prefill"), ("decode, 1 sequence", prefill_title)):
        for y, row in enumerate(rows):
            axis.barh(y, row[key], color=COLOURS[row["engine"]], height=0.62)
            axis.plot(row[f"{key}_samples"], [y] * len(row[f"{key}_samples"]), ".", color="black",
                      markersize=3)
            axis.plot([row[f"{key}_limit"]] * 2, [y - 0.4, y + 0.4], color=draw.GREEN, linewidth=2)
            axis.annotate(f"{row[key]:.0f}", (max(row[f"{key}_samples"]), y), (7, 0), va="center",
                          textcoords="offset points",  # on white, for the limit may be near
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6})
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s (median; dots: rounds; green: limit)")
        axis.set_title(title)
    axes[1].set_yticklabels([])
    return picture


def rows_of(result):
    """One row a contestant: medians, samples and limits, in tokens/s."""
    limits, prefill_tokens = result["limits"], result["arguments"]["prefill_tokens"]
    read_again = dict(limits["read_again"])
    rows = []
    for name, about in result["contestants"].items():
        samples = [sample for sample in result["samples"] if sample["contestant"] == name]
        decode, prefill = speeds_of(samples, prefill_tokens)
        prefill_flops = 2 * (limits["layer_params"] * prefill_tokens + limits["head_params"])
        size = token_bytes(limits, about["bits"])
        rows.append({
            **about, "name": name, "engine": name.partition(" ")[0], "token_bytes": size,
            "decode": float(np.median(decode)), "decode_samples": decode,
            "decode_limit": read_again[size] / size,
            "prefill": float(np.median(prefill)), "prefill_samples": prefill,
            "prefill_limit": (prefill_tokens * arithmetic_limit(limits, about["bits"][0])
                              / prefill_flops),
        })
    return rows


def arithmetic_limit(limits, bits):
    """Operations/s; with few bits an engine may choose the numbers that it multiplies."""
    flops_per_s = limits["flops_per_s"]
    names = {32: ("float32",), 16: ("float32", "bfloat16")}.get(bits, flops_per_s)
    return max(flops_per_s[name] for name in names)


def table(result):
    """Markdown, decoding and the rest; every ratio is the median over the rounds of the ratio
    within a round."""
    rows = {row["name"]: row for row in rows_of(result)}
    lines = ["| decode, 1 sequence | MB a token | tokens/s | limit | × transformers | "
             "× llama.cpp |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows.values():
        bases = (rows.get(transformers_peer(row)), rows.get(llama_cpp_peer(row)))
        lines.append(f"| {row['name']} | {row['token_bytes'] / 1e6:.0f} | {speed(row, 'decode')} | "
                     f"{row['decode_limit']:.0f} | {ratios(row, bases, 'decode')} |")
    fastest = max((row for row in rows.values() if row["engine"] == "llama.cpp"),
                  key=lambda row: row["prefill"], default=None)
    lines += ["", f"| prefill of {result['arguments']['prefill_tokens']}, and loading | tokens/s | "
              "limit | × transformers | × llama.cpp's fastest | load, s | peak memory, MB |",
              "| --- | --- | --- | --- | --- | --- | --- |"]
    for row in rows.values():
        bases = rows.get(transformers_peer(row)), fastest
        lines.append(
            f"| {row['name']} | {speed(row, 'prefill')} | {row['prefill_limit']:.0f} | "
            f"{ratios(row, bases, 'prefill')} | {row['load_s']:.1f} | "
            f"{row['peak_memory_bytes'] / 1e6:.0f} ({row['memory_before_bytes'] / 1e6:.0f}) |")
    machine, arguments = result["machine"], result["arguments"]
    versions = ", ".join(f"{name} {machine['versions'][name]}" for name in (
        "torch", "transformers", "llama-cpp-python") if machine["versions"].get(name))
    lines += ["", f"{machine['cores']} cores of {machine['cpu']}, "
              f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s; {versions}; "
              f"{arguments['rounds']} interleaved rounds, median (lowest–highest); "
              f"{arguments['decode_prompt_tokens']}-token prompt, {arguments['decode_tokens']} new "
              f"tokens; one load each; in brackets behind the peak: the libraries alone; "
              f"{machine['date']}."]
    return "\n".join(lines)


def transformers_peer(row):
    """Which row of transformers it is compared with: the same dtype, bf16 for fewer bits."""
    return "transformers fp32" if row["bits"][0] == 32 else "transformers bf16"


def llama_cpp_peer(row):
    """Which row of llama.cpp it is compared with: of like bits in the layers, or none."""
    bits = row["bits"][0]
    return "llama.cpp Q4_1" if bits < 8 else "llama.cpp Q8_0" if bits < 16 else None


def speed(row, key):
    low, high = min(row[f"{key}_samples"]), max(row[f"{key}_samples"])
    return f"{row[key]:.0f} ({low:.0f}–{high:.0f})"


def ratios(row, bases, key):
    """A cell for each base: 1 for itself, – where there is none."""
    return " | ".join(
        "–" if base is None else "1" if base is row else
        f"{np.median(np.divide(row[f'{key}_samples'], base[f'{key}_samples'])):.2f}"
        for base in bases)
