"""What does one layer compute, and where does its time go? Not where its arithmetic is.

Every part of a forward pass of the real model is timed in both twins, for a prompt of 512 tokens
and for one more token behind it, and stands beside its counted share of the arithmetic and of the
bytes. The parts are timed from outside: the functions that the pass calls are wrapped for a while.
Passes with and without the wrapping take turns, so that its own cost is known.

Each twin runs in a process of its own, because NumPy's threads and torch's would spin on each
other's cores. Both compute in float32. Chapter folder: chapters/03_transformer_block.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from unittest.mock import patch

import numpy as np
from tqdm import tqdm

from . import draw, is_fast
from .peers import MODEL, in_process, measure_limits, read_prompt

BACKENDS = ("numpy", "torch")
PROMPT_TOKENS = 512
# part: the colour of its bar. Matrix products are blue; what works number by number is not.
PARTS = {
    "qkv projection": draw.BLUE, "output projection": draw.BLUE,
    "gate, up, down projections": draw.BLUE, "head": draw.BLUE, "attention": draw.ORANGE,
    "norms": draw.RED, "rope": draw.PINK, "silu and gating": draw.GREEN,
    "residuals and the rest": draw.GREY,
}
MATRICES = tuple(part for part, colour in PARTS.items() if colour == draw.BLUE)
FUNCTIONS = {"rms_norm": "norms", "rope_angles": "rope", "rope": "rope",
             "swiglu": "silu and gating"}  # what is left of swiglu without its products
FUSED = {"rms_norm_torch": "rms_norm_fused", "rope_torch": "rope_fused"}
LETTERS = {"qkv projection": "qkv", "output projection": "o", "head": "head",
           "gate, up, down projections": "gate, up, down", "attention": "attn"}
NUMBER_BYTES = 4  # float32


# ── Measuring ────────────────────────────────────────────────────────────────────────────────


def measure():
    """The result, as JSON wants it."""
    rounds, steps = (2, 2) if is_fast() else (7, 8)
    prompt = read_prompt()[: 32 if is_fast() else PROMPT_TOKENS]
    limits, samples = in_process(measure_limits), []
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {backend: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn))
                 for backend in BACKENDS}
        abouts = {backend: pool.submit(about, backend).result() for backend, pool in pools.items()}
        for backend, pool in pools.items():  # warm-up: allocators, thread pools, first calls
            pool.submit(run_turn, backend, prompt, 1).result()
        turns = [(number, backend) for number in range(rounds) for backend in BACKENDS]
        for number, backend in tqdm(turns, desc="block", unit="turn"):
            for sample in pools[backend].submit(run_turn, backend, prompt, steps).result():
                samples.append({"backend": backend, "round": number, **sample})
    config = abouts["numpy"]["config"]
    return {
        "arguments": {"model": MODEL, "dtype": "float32", "rounds": rounds, "steps": steps,
                      "prompt_tokens": len(prompt)},
        "limits": limits,
        "devices": {backend: facts["device"] for backend, facts in abouts.items()},
        "counted": {"prefill": count(config, len(prompt), len(prompt)),
                    "decode": count(config, 1, len(prompt) + 1)},
        "samples": samples,
    }


@functools.cache
def runner_and_cache(backend):
    """The real model, and a cache whose memory is touched once; one of each in a process."""
    from .. import LLM

    runner = LLM(MODEL, backend=backend, dtype="float32").runner
    return runner, runner.new_cache(PROMPT_TOKENS + 1)


def about(backend):
    runner, _ = runner_and_cache(backend)
    return {"device": runner.device, "config": runner.weights.config}


def run_turn(backend, prompt, steps):
    """A prefill without and with timers, then `steps` decode steps of each kind in turns.

    Every step is of the same token at the same position: the cache is cut back after it.
    """
    runner, cache = runner_and_cache(backend)
    samples = []
    for phase, start, tokens in (("prefill", 0, prompt), *[("decode", len(prompt), [0])] * steps):
        cache.truncate(start)
        untimed_s = run_pass(runner, cache, tokens)
        cache.truncate(start)
        parts_s = timed_pass(runner, cache, tokens)
        samples.append({"phase": phase, "untimed_s": untimed_s, "parts_s": parts_s})
    return samples


def run_pass(runner, cache, tokens):
    """One forward pass behind what the cache holds, as the engine does it; -> seconds."""
    clock = clock_of(runner)
    start_s = clock()
    runner.forward(tokens, list(range(cache.length, cache.length + len(tokens))), cache, rows=[-1])
    return clock() - start_s


def timed_pass(runner, cache, tokens):
    """The same pass; -> {part: its seconds}."""
    watch = Stopwatch(clock_of(runner), first_part="residuals and the rest")
    with timers_inside(runner, cache, watch):
        watch.switch_to(watch.part)
        run_pass(runner, cache, tokens)
        watch.switch_to(watch.part)
    return watch.seconds()


def clock_of(runner):
    """The time; on a GPU, the time at which it has done all that it was told."""
    if not runner.device.startswith("cuda"):
        return time.perf_counter
    import torch

    def synchronized():
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronized


class Stopwatch:
    """One part runs at any moment: whatever starts stops the part that it was called from.

    So no second counts twice, none is lost, and the parts add up to the whole.
    """

    def __init__(self, clock, first_part):
        self.clock, self.part = clock, first_part
        self.marks = []  # (time, the part that runs from then on)

    def switch_to(self, part):
        self.part = part
        self.marks.append((self.clock(), part))

    def timed(self, function, part_of):
        """`function`, whose calls belong to the part that part_of(its arguments) names."""
        def timed(*args):
            caller = self.part
            self.switch_to(part_of(*args))
            result = function(*args)
            self.switch_to(caller)
            return result

        return timed

    def seconds(self):
        totals = dict.fromkeys(PARTS, 0.0)
        for (start_s, part), (end_s, _) in zip(self.marks, self.marks[1:]):
            totals[part] += end_s - start_s
        return totals


def timers_inside(runner, cache, watch):
    """A context in which every function that the pass calls by name tells the watch."""
    from .. import mlp, model

    twin = "np" if runner.backend == "numpy" else "torch"
    products = parts_of_matrices(runner.weights)
    names = {f"{name}_{twin}": part for name, part in FUNCTIONS.items()}
    if twin == "torch":  # which the pass calls in their faster forms
        names = {FUSED.get(name, name): part for name, part in names.items()}
    wrapped = [(model, name, lambda *args, part=part: part) for name, part in names.items()]
    wrapped += [(module, f"linear_{twin}", lambda x, weight: products[id(weight)])
                for module in (model, mlp)]
    wrapped.append((cache, "attend", lambda *args: "attention"))
    stack = ExitStack()
    for owner, name, part_of in wrapped:
        timed = watch.timed(getattr(owner, name), part_of)
        stack.enter_context(patch.object(owner, name, timed))
    return stack


def parts_of_matrices(weights):
    """{id of a weight matrix: the part that its products belong to}"""
    parts = {id(weights.lm_head): "head"}
    for layer in weights.layers:
        parts[id(layer.qkv_proj)] = "qkv projection"
        parts[id(layer.o_proj)] = "output projection"
        for matrix in (layer.gate_proj, layer.up_proj, layer.down_proj):
            parts[id(matrix)] = "gate, up, down projections"
    return parts


# ── Counting ─────────────────────────────────────────────────────────────────────────────────


def count(config, N, S):
    """Of a pass of N tokens that ends at position S; -> {part: {"flops", "bytes"}}.

    Bytes: each part reads its inputs and its weights and writes its result, once each. The FLOPs
    of attention are those of the whole rectangle of scores, masked half included, as they are
    computed. exp, tanh, √ and a division count as one each. Only one row goes through the head.
    """
    (H, K, D), C, F = config.heads, config.hidden_size, config.intermediate_size
    L, V = config.num_hidden_layers, config.vocab_size

    def product(num_in, num_out, rows=N):
        return 2 * rows * num_in * num_out, num_in * num_out + rows * (num_in + num_out)

    def sum_of(*parts):
        return tuple(map(sum, zip(*parts)))

    in_a_layer = {  # FLOPs, numbers moved
        "qkv projection": product(C, (H + 2 * K) * D),
        "output projection": product(H * D, C),
        "gate, up, down projections": sum_of(product(C, F), product(C, F), product(F, C)),
        "attention": (4 * H * N * S * D + 5 * H * N * S,  # queries and result; new and all k, v
                      2 * N * H * D + 4 * N * K * D + 2 * S * K * D),
        "norms": (2 * 4 * N * C, 2 * 2 * N * C),  # two of them: square, add up, divide, weigh
        "rope": (3 * N * (H + K) * D, 2 * N * (H + K) * D),
        "silu and gating": (6 * N * F, 3 * N * F),
        "residuals and the rest": (2 * N * C, 2 * 3 * N * C),
    }
    at_the_end = {"head": product(C, V, rows=1), "norms": (4 * C, 2 * C),
                  "residuals and the rest": (0, 2 * N * C)}  # the embedding's rows, looked up
    total = {}
    for part in PARTS:
        per_layer, once = in_a_layer.get(part, (0, 0)), at_the_end.get(part, (0, 0))
        total[part] = {"flops": L * per_layer[0] + once[0],
                       "bytes": NUMBER_BYTES * (L * per_layer[1] + once[1])}
    return total


# ── Publishing ───────────────────────────────────────────────────────────────────────────────


def rows_of(result, phase):
    """{name of a bar: {part: its amount}}, counted and measured (medians), in one phase."""
    counted = result["counted"][phase]
    rows = {f"{key}, counted": {part: counted[part][unit] for part in PARTS}
            for key, unit in (("FLOPs", "flops"), ("bytes", "bytes"))}
    for backend, name in zip(BACKENDS, ("NumPy", "torch")):
        samples = samples_of(result, phase, backend)
        rows[f"time, {name}"] = {
            part: float(np.median([sample["parts_s"][part] for sample in samples]))
            for part in PARTS}
    return rows


def samples_of(result, phase, backend):
    return [sample for sample in result["samples"]
            if sample["phase"] == phase and sample["backend"] == backend]


def limit_s(result, phase, name):
    """What a pass takes if each part runs as fast as this CPU computes, or moves bytes.

    None for what is not a CPU's time: a GPU's limits are not measured here.
    """
    if not name.startswith("time") or "torch" in name and result["devices"]["torch"] != "cpu":
        return None
    limits = result["limits"]
    return sum(max(part["flops"] / limits["flops_per_s"]["float32"],
                   part["bytes"] / limits["read_bytes_per_s"])
               for part in result["counted"][phase].values())


def amount(name, value):
    """
    >>> amount("FLOPs, counted", 2.5e9), amount("bytes, counted", 4e8), amount("time, torch", 0.02)
    ('2.5 GFLOP', '0.40 GB', '20 ms')
    """
    if name.startswith("FLOPs"):
        return f"{value / 1e9:.3g} GFLOP"
    return f"{value / 1e9:.2f} GB" if name.startswith("bytes") else f"{value * 1e3:.0f} ms"


def title_of(result, phase):
    num_tokens = result["arguments"]["prompt_tokens"]
    return f"prefill of {num_tokens}" if phase == "prefill" else f"decode, token {num_tokens + 1}"


def figure(result):
    """One bar of shares for each thing counted or measured; the phases below each other."""
    picture, axes = draw.new_figure(2, 1, height=4.6)
    for axis, phase in zip(axes, ("prefill", "decode")):
        rows = rows_of(result, phase)
        for y, (name, amounts) in enumerate(rows.items()):
            whole, left = sum(amounts.values()), 0.0
            for part, colour in PARTS.items():
                share = 100 * amounts[part] / whole
                axis.barh(y, share, left=left, color=colour, height=0.7, edgecolor="white",
                          linewidth=0.5)
                label_bar(axis, part, share, left + share / 2, y)
                left += share
            axis.text(101, y, amount(name, whole), va="center")
            limit = limit_s(result, phase, name)
            if limit is not None:
                for edge in (y - 0.35, y + 0.35):  # a line, broken where the labels are
                    axis.plot([100 * limit / whole] * 2, [edge - 0.12, edge + 0.12],
                              color="black", linewidth=2)
        axis.set_yticks(range(len(rows)), rows)
        axis.invert_yaxis()
        axis.set_xlim(0, 100)
        axis.set_title(title_of(result, phase), loc="left")
    axes[1].set_xlabel("share of the whole pass, % (medians; black line: the time of the whole "
                       "pass at this machine's limits)")
    names = {"matrix products": draw.BLUE,
             **{part: PARTS[part] for part in PARTS if part not in MATRICES}}
    handles = [axes[0].barh(0, 0, color=colour) for colour in names.values()]
    picture.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False,
                   columnspacing=1.2, handlelength=1.2)
    return picture


def label_bar(axis, part, share, x, y):
    """Name and size of a piece of a bar, as far as there is room for them."""
    name = LETTERS.get(part, "")
    room = share * 0.85  # in letters of this size, across a figure as wide as a README
    for text in (f"{name} {share:.0f}", f"{share:.0f}"):
        if len(text.strip()) + 1 <= room:
            axis.text(x, y, text.strip(), ha="center", va="center", color="white", fontsize=7)
            return


def table(result):
    """Markdown: every part's share, in %, of what is counted and of what is measured."""
    columns = [(phase, name, amounts) for phase in ("prefill", "decode")
               for name, amounts in rows_of(result, phase).items()]

    def line(title, cells):
        return f"| {title} | {' | '.join(cells)} |"

    heads = [f"{title_of(result, phase)}: FLOPs" if name.startswith("FLOPs") else
             name.removesuffix(", counted") for phase, name, _ in columns]
    lines = [line("share in %", heads), line("---", ["---:"] * len(columns))]
    for part in PARTS:
        lines.append(line(part, (f"{100 * amounts[part] / sum(amounts.values()):.2g}"
                                 for _, _, amounts in columns)))
    lines.append(line("the whole pass", (amount(name, sum(amounts.values()))
                                         for _, name, amounts in columns)))
    limits = [(name, limit_s(result, phase, name)) for phase, name, _ in columns]
    lines.append(line("at the machine's limits", (
        "" if limit is None else amount(name, limit) for name, limit in limits)))
    return "\n".join([*lines, "", footnote(result)])


def footnote(result):
    machine, arguments, limits = result["machine"], result["arguments"], result["limits"]
    costs = []
    for phase in ("prefill", "decode"):
        for backend, name in zip(BACKENDS, ("NumPy", "torch")):
            ratios = [sum(sample["parts_s"].values()) / sample["untimed_s"]
                      for sample in samples_of(result, phase, backend)]
            costs.append(f"{phase} in {name} {np.median(ratios):.2f} "
                         f"({min(ratios):.2f}–{max(ratios):.2f})")
    return (f"{machine['cores']} cores of {machine['cpu']}, "
            f"{limits['read_bytes_per_s'] / 1e9:.0f} GB/s, "
            f"{limits['flops_per_s']['float32'] / 1e9:.0f} GFLOP/s; torch on "
            f"{result['devices']['torch']}; {arguments['dtype']}; {arguments['rounds']} "
            f"interleaved rounds, medians; {machine['date']}. A pass with timers took, of one "
            f"without, median (lowest–highest): {', '.join(costs)}.")
