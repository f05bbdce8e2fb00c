"""Is this machine bound by compute or by memory?

The same model, in both twins, answers passes of 1 to 512 tokens, and decodes one token behind 512.
Each pass is a point: how many operations it needs for each byte that it needs (x), and how many
operations a second it came to (y). The roof over the points is measured in the same run: no pass
can be faster than the arithmetic of the cores, nor than the memory delivers the bytes for it.
With a CUDA GPU the torch twin runs there, under that GPU's own roof. Chapter folder: 05_model.
"""

from __future__ import annotations

import time

import numpy as np
from tqdm import tqdm

from ..loading import open_checkpoint
from ..loading.registry import resolve
from ..model_runner import make_runner
from . import draw, is_fast
from .machine import flops, flops_numpy, read_bandwidth, seconds

MODEL = "smollm2-135m-instruct"
VARIANTS = {  # name: backend, dtype
    "NumPy fp32": ("numpy", "float32"),
    "torch fp32": ("torch", "float32"),
    "torch bf16": ("torch", "bfloat16"),
}
BYTES_OF = {"float32": 4, "bfloat16": 2}
NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
NUM_CACHED = 512  # the context behind which decoding is measured
SHORT = 16  # a pass of up to so many tokens is timed several times a round


def count_parameters(config):
    """{part of the model: numbers in it}. A tied head is the embedding, and counts once."""
    (H, K, D), C, F = config.heads, config.hidden_size, config.intermediate_size
    L, table = config.num_hidden_layers, config.vocab_size * C
    qkv_biases = (H + 2 * K) * D * config.attention_bias + C * config.attention_out_bias
    return {
        "embedding": table,
        "attention": L * (C * (H + 2 * K) * D + H * D * C + qkv_biases),
        "feed-forward": L * (3 * C * F + (2 * F + C) * config.mlp_bias),
        "norms": (2 * L + 1) * C + L * 2 * D * config.qk_norm,
        "head": 0 if config.tie_word_embeddings else table,
    }


def count_pass(config, num_tokens, num_cached=0, number_bytes=4):
    """What one pass needs: -> FLOPs, bytes.

    num_tokens: new tokens of one sequence; logits are wanted of the last one only.
    num_cached: tokens whose keys and values are in the cache.   number_bytes: 4 in float32.

    FLOPs: 2 for each token and weight of the layers (a multiplication and an addition), 2 for each
    weight of the head, and 4·H·D in each layer for each pair of a query and a key that it may see.
    Pairs behind the mask are not counted, although the plain form computes them: they are no use
    to anybody. Norms, rotations, softmax and SiLU are left out: together less than a hundredth.

    Bytes: every weight of the layers, the last norm and the head once, however many tokens there
    are, and every visible key and value once. Activations are ignored, as if they never left the
    processor's caches. That is nearly true of a short pass and kind to a long one, and to NumPy,
    which writes each intermediate result to memory: a point far below the roof may owe it to that.
    """
    (H, K, D), L = config.heads, config.num_hidden_layers
    parameters = count_parameters(config)
    layers = parameters["attention"] + parameters["feed-forward"]
    head = config.vocab_size * config.hidden_size
    pairs = num_tokens * num_cached + num_tokens * (num_tokens + 1) // 2
    flops = 2 * (num_tokens * layers + head) + 4 * L * H * D * pairs
    keys_and_values = 2 * L * K * D * (num_cached + num_tokens)
    return flops, number_bytes * (layers + parameters["norms"] + head + keys_and_values)


def attainable(flops_per_byte, bytes_per_s, flops_per_s):
    """The roof: FLOP/s that a machine allows (Williams, Waterman and Patterson 2009)."""
    return np.minimum(flops_per_byte * bytes_per_s, flops_per_s)


def measure():
    """The result, as JSON wants it."""
    rounds = 2 if is_fast() else 5
    lengths = NUM_TOKENS[:4] if is_fast() else NUM_TOKENS
    context = lengths[-1] if is_fast() else NUM_CACHED
    checkpoint = open_checkpoint(resolve(MODEL))
    contestants = {name: Contestant(make_runner(checkpoint, backend, "auto", dtype), context)
                   for name, (backend, dtype) in VARIANTS.items()}
    devices = sorted({each.device for each in contestants.values()})
    points = [(num_tokens, 0) for num_tokens in lengths] + [(1, context)]
    roof_samples, samples = [], []
    for number in tqdm(range(rounds), desc="roofline", unit="round"):
        for device in devices:
            roof_samples += [{"round": number, "device": device, **sample}
                             for sample in measure_roofs(device)]
        for num_tokens, num_cached in points:
            for name, contestant in contestants.items():
                dtype = VARIANTS[name][1]
                needed = count_pass(checkpoint.config, num_tokens, num_cached, BYTES_OF[dtype])
                samples.append({
                    "variant": name, "device": contestant.device, "dtype": dtype, "round": number,
                    "num_tokens": num_tokens, "num_cached": num_cached,
                    "flops": needed[0], "bytes": needed[1],
                    "seconds": contestant.pass_seconds(num_tokens, num_cached)})
    return {
        "arguments": {"model": MODEL, "rounds": rounds, "num_tokens": list(lengths),
                      "num_cached": context},
        "parameters": count_parameters(checkpoint.config),
        "roof_samples": roof_samples,
        "samples": samples,
    }


class Contestant:
    """One twin in one dtype: passes into an empty cache, and behind a filled one."""

    def __init__(self, runner, num_cached):
        self.runner = runner
        self.device = runner.device.partition(":")[0]
        longest = max(*NUM_TOKENS, num_cached + 1)
        self.caches = {0: runner.new_cache(longest), num_cached: runner.new_cache(longest)}
        self._run(num_cached, self.caches[num_cached])
        self._run(num_cached, self.caches[0])  # the warm-up: pages, threads, first-call set-up
        self.caches[0].truncate(0)

    def pass_seconds(self, num_tokens, num_cached):
        """Seconds of each of a few passes.

        One more goes before them uncounted: the other library's threads were awake until now, and
        its weights are what the processor's caches hold.
        """
        cache = self.caches[num_cached]
        self._timed(min(num_tokens, SHORT), cache)
        return [self._timed(num_tokens, cache) for _ in range(4 if num_tokens <= SHORT else 1)]

    def _timed(self, num_tokens, cache):
        length = cache.length
        start_s = time.perf_counter()
        self._run(num_tokens, cache)
        elapsed_s = time.perf_counter() - start_s
        cache.truncate(length)
        return elapsed_s

    def _run(self, num_tokens, cache):
        # Which tokens does not matter: they all take the same work.
        token_ids = list(range(num_tokens))
        positions = list(range(cache.length, cache.length + num_tokens))
        logits = self.runner.forward(token_ids, positions, cache, rows=[num_tokens - 1])
        self.runner.to_numpy(logits)  # which waits for a GPU to finish


def measure_roofs(device):
    """-> samples: what of ("bytes" or a dtype), by which library, how much of it a second."""
    if device == "cuda":
        return measure_cuda_roofs()
    size = 256 if is_fast() else 2048
    per_s = {
        ("bytes", "torch"): read_bandwidth(2**26 if is_fast() else 2**30, repeats=2),
        ("float32", "NumPy"): flops_numpy(size, repeats=2),
        ("float32", "torch"): flops("float32", size, repeats=2),
        ("bfloat16", "torch"): flops("bfloat16", size, repeats=2),
    }
    return [{"what": what, "library": library, "per_s": value}
            for (what, library), value in per_s.items()]


def measure_cuda_roofs():
    """The same of a GPU, which works on while Python goes on: each clock waits for it."""
    import torch

    def best_of_a_few(function):
        def to_the_end():
            function()
            torch.cuda.synchronize()

        return min(seconds(to_the_end) for _ in range(4))

    array = torch.ones(2**28, device="cuda")
    samples = [{"what": "bytes", "library": "torch",
                "per_s": 4 * array.numel() / best_of_a_few(array.sum)}]
    for dtype in BYTES_OF:
        a = torch.ones(8192, 8192, dtype=getattr(torch, dtype), device="cuda")
        samples.append({"what": dtype, "library": "torch",
                        "per_s": 2 * 8192**3 / best_of_a_few(lambda: a @ a)})  # noqa: B023
    return samples


def roofs_of(result):
    """{(device, dtype): (bytes/s, FLOP/s)} for whatever ran, each the best that was seen."""
    def best(device, what):
        return max(sample["per_s"] for sample in result["roof_samples"]
                   if sample["device"] == device and sample["what"] == what)

    return {key: (best(key[0], "bytes"), best(*key))
            for key in dict.fromkeys((each["device"], each["dtype"]) for each in result["samples"])}


def rows_of(result):
    """One row a variant and point: what it needs, what it came to, and the roof above it."""
    roofs, seconds_of, rows = roofs_of(result), {}, {}
    for sample in result["samples"]:
        key = sample["variant"], sample["num_tokens"], sample["num_cached"]
        seconds_of.setdefault(key, []).extend(sample["seconds"])
        rows[key] = {name: sample[name] for name in (
            "variant", "device", "dtype", "num_tokens", "num_cached", "flops", "bytes")}
    for key, row in rows.items():
        row["samples"] = [row["flops"] / elapsed_s for elapsed_s in seconds_of[key]]
        row["flops_per_s"] = row["flops"] / float(np.median(seconds_of[key]))
        row["ms"] = 1000 * float(np.median(seconds_of[key]))
        row["flops_per_byte"] = row["flops"] / row["bytes"]
        row["roof"] = float(attainable(row["flops_per_byte"], *roofs[row["device"], row["dtype"]]))
    return list(rows.values())


def figure(result):
    """A roof for each device and dtype, and under it the passes that were measured."""
    roofs, rows = roofs_of(result), rows_of(result)
    picture, axes = draw.new_figure(1, len(roofs), height=3.7)
    x = np.geomspace(0.25, 1.5 * max(row["flops_per_byte"] for row in rows), 200)
    for axis, ((device, dtype), roof) in zip(np.atleast_1d(axes), roofs.items()):
        for other in roofs.values():
            axis.loglog(x, attainable(x, *other) / 1e9, ":", color=draw.GREY, linewidth=0.7)
        axis.loglog(x, attainable(x, *roof) / 1e9, color=draw.GREEN, linewidth=2,
                    label=f"roof: {roof[0] / 1e9:.0f} GB/s, {roof[1] / 1e9:.0f} GFLOP/s")
        for name, colour in (("NumPy", draw.BLUE), ("torch", draw.ORANGE)):
            mine = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)
                    and row["variant"].startswith(name)]
            if mine:
                draw_passes(axis, mine, colour, labelled=name == "torch" or len(roofs) > 2)
        axis.set_title(f"{dtype} on {device}")
        axis.set_xlabel("FLOPs a byte")
        axis.legend(loc="lower right", fontsize=7, frameon=False)
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("GFLOP/s (line: median; dots: samples)")
    lowest = min(min(row["samples"]) for row in rows) / 1e9
    highest = max(*(roof[1] for roof in roofs.values()), *(row["flops_per_s"] for row in rows))
    for axis in np.atleast_1d(axes):
        axis.set_ylim(lowest / 2, 2 * highest / 1e9)
    return picture


def draw_passes(axis, rows, colour, labelled):
    """The passes of one variant; their numbers of tokens beside some of them."""
    prefill = [row for row in rows if row["num_cached"] == 0]
    axis.loglog([row["flops_per_byte"] for row in prefill],
                [row["flops_per_s"] / 1e9 for row in prefill], "o-", color=colour, markersize=4,
                linewidth=1, label=f"{rows[0]['variant']}: one pass")
    for row in rows:
        axis.loglog([row["flops_per_byte"]] * len(row["samples"]),
                    [sample / 1e9 for sample in row["samples"]], ".", color=colour, markersize=2)
    for row in prefill[::3] if labelled else []:
        axis.annotate(f"{row['num_tokens']} token{'s' * (row['num_tokens'] > 1)}",
                      (row["flops_per_byte"], row["flops_per_s"] / 1e9), xytext=(5, -9),
                      textcoords="offset points", fontsize=7)
    for row in rows:
        if row["num_cached"]:
            axis.loglog(row["flops_per_byte"], row["flops_per_s"] / 1e9, "*", color="black",
                        markerfacecolor=colour, markersize=9, zorder=3,
                        label=f"decode behind {row['num_cached']} tokens")


def table(result):
    """Markdown: the roofs, then every pass under them."""
    machine, arguments = result["machine"], result["arguments"]
    rows = rows_of(result)
    lines = ["| roof of | reading, GB/s | products, GFLOP/s | corner, FLOPs a byte | corner at |",
             "| --- | --- | --- | --- | --- |"]
    for (device, dtype), (bytes_per_s, _) in roofs_of(result).items():
        passes = [row for row in rows if (row["device"], row["dtype"]) == (device, dtype)
                  and not row["num_cached"]]
        for library in ("torch", "NumPy"):
            values = [sample["per_s"] for sample in result["roof_samples"] if (
                sample["device"], sample["what"], sample["library"]) == (device, dtype, library)]
            if values:
                corner = max(values) / bytes_per_s
                lines.append(f"| {dtype} in {library} on {device} | {bytes_per_s / 1e9:.0f} | "
                             f"{max(values) / 1e9:.0f} | {corner:.1f} | "
                             f"{tokens_at(corner, passes)} |")
    names = list(dict.fromkeys(row["variant"] for row in rows))
    lines += ["", "| one pass of | FLOPs a byte, fp32 / bf16 | "
              + " | ".join(f"{name}, GFLOP/s" for name in names) + " |",
              "| --- |" + " --- |" * (1 + len(names))]
    by_point = {}
    for row in rows:
        by_point.setdefault((row["num_tokens"], row["num_cached"]), []).append(row)
    for (num_tokens, num_cached), same in by_point.items():
        what = f"1 token, decoded behind {num_cached}" if num_cached else (
            f"{num_tokens} token{'s' * (num_tokens > 1)}")
        intensity = {row["dtype"]: f"{row['flops_per_byte']:.1f}" for row in same}
        cells = [what, " / ".join(intensity.values()), *(cell(row) for row in same)]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", f"GFLOP/s of the median (lowest–highest) pass, its time in ms, and its share of "
              f"the roof of its dtype. {machine['cores']} cores of {machine['cpu']}; torch "
              f"{machine['versions']['torch']}, NumPy {machine['versions']['numpy']}; "
              f"{arguments['model']}; {arguments['rounds']} interleaved rounds; "
              f"{machine['date']}."]
    return "\n".join(lines)


def cell(row):
    speeds = (row["flops_per_s"], min(row["samples"]), max(row["samples"]))
    median, low, high = (f"{speed / 1e9:.{int(speed < 2e10)}f}" for speed in speeds)
    return (f"{median} ({low}–{high}), {row['ms']:.0f} ms, "
            f"{100 * row['flops_per_s'] / row['roof']:.0f} %")


def tokens_at(corner, passes):
    """How many tokens a pass must have to do `corner` FLOPs a byte, in words."""
    intensities = [row["flops_per_byte"] for row in passes]
    if corner > max(intensities):
        return f"more than {passes[-1]['num_tokens']} tokens"
    num_tokens = np.interp(corner, intensities, [row["num_tokens"] for row in passes])
    return f"about {max(1, round(num_tokens))} tokens in a pass"
