"""Why does a second request cost almost nothing, and what does a static batch waste?

Two measurements. Decoding: a step of 1, 2, 4, … 64 sequences in a padded cache, all at the same
length, is timed, on the CPU; beside it stands the least time that this machine allows, which is
reading all weights once and every sequence's cache, or the arithmetic of all sequences, whichever
takes longer. Waste: requests of very different lengths go through static batches, and each row
(a token in a pass) is counted by what it was for. Nothing is timed there: the loop is the real one
(`pad_batch`, `decode_batch`), and the model is left out, since counts do not depend on it.

Caches are filled with random numbers, as time does not depend on their values. Chapter folder:
chapters/08_batching.
"""

from __future__ import annotations

import time

import lazy_loader as lazy
import numpy as np
from tqdm import tqdm

from ..batching import decode_batch, pad_batch
from . import draw, is_fast
from .machine import int8_ops, read_bandwidth
from .peers import arithmetic_limit, measure_limits, token_bytes
from .workload import ANSWER_LENGTHS, PROMPT_LENGTHS, describe_lengths, draw_lengths

torch = lazy.load("torch")

MODEL = "smollm2-135m-instruct"
# name: backend, dtype, quantize; bits a weight of the layers and the head, scales included; colour
VARIANTS = {
    "NumPy fp32": (("numpy", "float32", None), (32, 32), draw.BLUE),
    "torch fp32": (("torch", "float32", None), (32, 32), draw.ORANGE),
    "torch bf16": (("torch", "bfloat16", None), (16, 16), draw.SKY),
    "torch w8a8": (("torch", "auto", "w8a8"), (8.05, 8.5), draw.PINK),
}
PANELS = (("float32", ("NumPy fp32", "torch fp32")),
          ("fewer bits", ("torch bf16", "torch w8a8")))
FAST_VARIANTS = ("torch fp32", "torch w8a8")
BYTES_OF = {"float32": 4, "bfloat16": 2}
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)
PROMPT_TOKENS = 128
UNTIMED_STEPS, TIMED_STEPS = 1, 4

NUM_REQUESTS, STATIC_BATCHES = 256, (8, 16, 32)
KINDS = {"prompt": draw.BLUE, "padding": draw.ORANGE, "answer": draw.GREEN, "finished": draw.RED}
ORDERS = {  # how requests are put into batches: by nothing, or sorted by (prompt, answer) length
    "as they come": lambda pair: 0,
    "by prompt": lambda pair: pair[0],
    "by answer": lambda pair: pair[1],
}


def measure():
    """The result, as JSON wants it."""
    from .. import LLM

    rounds = 2 if is_fast() else 7
    batch_sizes = BATCH_SIZES[:2] if is_fast() else BATCH_SIZES
    num_tokens = 8 if is_fast() else PROMPT_TOKENS
    runners = {}
    for name in FAST_VARIANTS if is_fast() else VARIANTS:
        backend, dtype, quantize = VARIANTS[name][0]
        runners[name] = LLM(MODEL, backend, "cpu", dtype, quantize).runner
    limits = measure_limits()
    limits["flops_per_s"]["int8"] = int8_ops(256 if is_fast() else 2048)
    samples = []
    for number in tqdm(range(rounds), desc="batching", unit="round"):
        for name, runner in runners.items():  # not in turns of a step: their threads would mix
            turn(runner, batch_sizes[0], num_tokens)  # wakes them up
            for batch_size in batch_sizes:
                samples.append({"variant": name, "batch_size": batch_size, "round": number,
                                "step_s": turn(runner, batch_size, num_tokens)})
    lengths = list(zip(*draw_lengths(16 if is_fast() else NUM_REQUESTS, PROMPT_LENGTHS,
                                     ANSWER_LENGTHS)))
    return {
        "arguments": {"model": MODEL, "rounds": rounds, "prompt_tokens": num_tokens,
                      "lengths": describe_lengths(PROMPT_LENGTHS, ANSWER_LENGTHS)},
        "limits": limits,
        "variants": {name: describe(runner, limits, VARIANTS[name][1])
                     for name, runner in runners.items()},
        "samples": samples,
        "lengths": lengths,
        "waste": [{"batch_size": batch_size, "order": order, **count_batches(lengths, batch_size,
                                                                            order)}
                  for batch_size in ((2, 4) if is_fast() else STATIC_BATCHES) for order in ORDERS],
    }


# ── decoding ─────────────────────────────────────────────────────────────────────────────────


def turn(runner, batch_size, num_tokens):
    """Seconds of each of a few decode steps of a batch behind num_tokens tokens a sequence.

    A step is a pass and its greedy tokens, which on their way to Python wait for the pass to end.
    """
    num_steps = UNTIMED_STEPS + TIMED_STEPS
    cache = filled_cache(runner, batch_size, num_tokens, num_tokens + num_steps)
    tokens, step_s = list(range(batch_size)), []
    for position in range(num_tokens, num_tokens + num_steps):
        start_s = time.perf_counter()
        tokens = runner.best_tokens(runner.forward(tokens, [position] * batch_size, cache))
        step_s.append(time.perf_counter() - start_s)
    return step_s[UNTIMED_STEPS:]


def filled_cache(runner, batch_size, num_tokens, capacity):
    """A padded cache without padding: random keys and values, the same in every layer."""
    config = runner.weights.config
    cache = runner.new_padded_cache(np.zeros(batch_size, dtype=np.int64), capacity)
    shape = (batch_size, config.num_key_value_heads, num_tokens, config.head_dim)
    numbers = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    if runner.backend == "torch":
        numbers = torch.from_numpy(numbers).to(runner.torch_device, runner.torch_dtype)
    for layer in range(config.num_hidden_layers):
        cache.append(layer, numbers, numbers)
    return cache


def describe(runner, limits, bits):
    """What a step of this variant needs: bytes and operations, of all and of each sequence."""
    config = runner.weights.config
    (H, K, D), L = config.heads, config.num_hidden_layers
    weight_bytes = token_bytes(limits, bits)
    return {
        "dtype": runner.dtype,
        "weight_bytes": weight_bytes,
        "cache_bytes_a_token": 2 * L * K * D * BYTES_OF[runner.dtype],
        "weight_flops": 2 * (limits["layer_params"] + limits["head_params"]),  # a sequence
        "attention_flops_a_token": 4 * L * H * D,
        # Few bits may fit in the processor's cache, and come faster the second time.
        "read_bytes_per_s": read_bandwidth(weight_bytes, repeats=2 if is_fast() else 20),
        "flops_per_s": arithmetic_limit(limits, bits[0]),
    }


def limit_parts_s(about, num_tokens):
    """(once, more a sequence, arithmetic of a sequence): the seconds of a step's least work."""
    once = about["weight_bytes"] / about["read_bytes_per_s"]
    more = about["cache_bytes_a_token"] * num_tokens / about["read_bytes_per_s"]
    flops = about["weight_flops"] + about["attention_flops_a_token"] * num_tokens
    return once, more, flops / about["flops_per_s"]


def limit_ms(about, num_tokens, batch_size):
    """The least that a step takes: its bytes or its operations, whichever are slower.

    >>> about = {"weight_bytes": 80, "cache_bytes_a_token": 1, "weight_flops": 50,
    ...          "attention_flops_a_token": 1, "read_bytes_per_s": 1e3, "flops_per_s": 1e3}
    >>> [limit_ms(about, 10, batch_size) for batch_size in (1, 2)]   # 80 + 10·B, 60·B
    [90.0, 120.0]
    """
    once, more, arithmetic = limit_parts_s(about, num_tokens)
    return 1000 * max(once + batch_size * more, batch_size * arithmetic)


def knee(about, num_tokens):
    """The batch size from which on arithmetic takes longer than reading; ∞ if it never does."""
    once, more, arithmetic = limit_parts_s(about, num_tokens)
    return once / (arithmetic - more) if arithmetic > more else float("inf")


def medians(result):
    """{variant: {batch size: [a round's median TPOT, in ms, …]}}."""
    rounds = {}
    for sample in result["samples"]:
        by_size = rounds.setdefault(sample["variant"], {})
        by_size.setdefault(sample["batch_size"], []).append(1000 * np.median(sample["step_s"]))
    return rounds


def doubled_at(by_size):
    """The batch size at which a token takes twice as long as alone; None if none was so large."""
    base = by_size[1]
    ratios = {size: float(np.median(np.divide(ms, base))) for size, ms in by_size.items()}
    for (size, ratio), (next_size, next_ratio) in zip(ratios.items(), list(ratios.items())[1:]):
        if ratio < 2 <= next_ratio:
            return size + (next_size - size) * (2 - ratio) / (next_ratio - ratio)
    return None


# ── waste ────────────────────────────────────────────────────────────────────────────────────


def in_batches(lengths, batch_size, order):
    """The requests, pairs of a prompt's and an answer's length, in batches one after the other."""
    lengths = sorted(lengths, key=ORDERS[order])
    return [lengths[start : start + batch_size] for start in range(0, len(lengths), batch_size)]


def count_batches(lengths, batch_size, order):
    """Rows of all batches, by what they were for, and the decode passes of all batches."""
    counts = [count_rows(batch) for batch in in_batches(lengths, batch_size, order)]
    return {key: sum(count[key] for count in counts) for key in counts[0]}


def count_rows(batch):
    """What the rows of one static batch are for, and its decode passes.

    An answer's first token comes from the prompt's last row, so n tokens take n − 1 rows more.

    >>> count_rows([[5, 4], [2, 3]])
    {'prompt': 7, 'padding': 3, 'answer': 5, 'finished': 1, 'passes': 3}
    """
    prompt_lengths, answer_lengths = zip(*batch)
    tokens, _, num_padding = pad_batch([[0] * length for length in prompt_lengths])
    num_picked, rows = [0] * len(batch), {"answer": 0, "finished": 0}
    nothing = np.zeros((len(batch), 1))  # for logits

    def forward(tokens, positions):
        for row in range(len(tokens)):
            rows["answer" if num_picked[row] < answer_lengths[row] else "finished"] += 1
        return nothing

    def pick(row, logits):
        num_picked[row] += 1
        return 0, num_picked[row] == answer_lengths[row]

    passes = decode_batch(forward, nothing, prompt_lengths, pick)
    padding = int(num_padding.sum())
    return {"prompt": tokens.size - padding, "padding": padding, **rows, "passes": passes}


# ── what is published ────────────────────────────────────────────────────────────────────────


def figure(result):
    """Throughput against TPOT; where the rows of a static batch go; one batch, drawn."""
    picture, axes = draw.new_figure(2, 2, height=6.4)
    for axis, (title, names) in zip(axes[0], PANELS):
        draw_speeds(axis, result, names)
        axis.set_title(f"decoding, {title}: numbers are batch sizes")
    axes[0, 0].set_ylabel("output tokens/s, all sequences")
    share_limits(axes[0])
    draw_shares(axes[1, 0], result)
    sizes = sorted({each["batch_size"] for each in result["waste"]})
    draw_one_batch(axes[1, 1], in_batches(result["lengths"], sizes[len(sizes) // 2],
                                          "as they come")[0])
    return picture


def share_limits(axes):
    """The same logarithmic ends and round ticks for all."""
    for ends_of, ticks_of in (("xlim", "xticks"), ("ylim", "yticks")):
        ends = [end for axis in axes for end in getattr(axis, f"get_{ends_of}")()]
        ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)
                 if min(ends) <= digit * 10**power <= max(ends)]
        for axis in axes:
            axis.minorticks_off()
            getattr(axis, f"set_{ends_of}")(min(ends) / 1.1, max(ends) * 1.1)  # for the labels
            getattr(axis, f"set_{ticks_of}")(ticks, ticks)


def draw_speeds(axis, result, names):
    """Lines through the batch sizes, and dashed what the machine allows."""
    times, num_tokens = medians(result), result["arguments"]["prompt_tokens"]
    drawn = set()
    for name in [name for name in names if name in times]:
        by_size, about, colour = times[name], result["variants"][name], VARIANTS[name][2]
        sizes = list(by_size)
        if (needs := (about["weight_bytes"], about["dtype"])) not in drawn:
            drawn.add(needs)
            draw_limit(axis, about, num_tokens, sizes, name)
        tpot_ms = [float(np.median(ms)) for ms in by_size.values()]
        speeds = [1000 * size / ms for size, ms in zip(sizes, tpot_ms)]
        axis.plot(tpot_ms, speeds, "o-", color=colour, markersize=4, linewidth=1.2, label=name)
        for size, ms in by_size.items():
            axis.plot(ms, np.divide(1000 * size, ms), ".", color=colour, markersize=2)
        for size, x, y in zip(sizes, tpot_ms, speeds):
            axis.annotate(f"{size}", (x, y), (5, -8), textcoords="offset points", fontsize=7,
                          color=colour)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("TPOT, ms (dots: rounds)")
    axis.grid(color="#eeeeee")
    axis.legend(frameon=False, fontsize=7, loc="best")


def draw_limit(axis, about, num_tokens, sizes, name):
    """The dashed line of a precision, and the knee on it."""
    fine = np.geomspace(sizes[0], sizes[-1], 100)
    least_ms = [limit_ms(about, num_tokens, size) for size in fine]
    bits = name.split()[-1]
    axis.plot(least_ms, 1000 * fine / least_ms, ":" if bits == "w8a8" else "--", linewidth=1.4,
              color=draw.GREEN, label=f"limit of {bits}")
    size = knee(about, num_tokens)
    if sizes[0] <= size <= sizes[-1]:
        ms = limit_ms(about, num_tokens, size)
        axis.plot(ms, 1000 * size / ms, "D", color=draw.GREY, markersize=5, zorder=3)
        axis.annotate(f"knee: {size:.0f}", (ms, 1000 * size / ms), (-6, 4), fontsize=7, ha="right",
                      textcoords="offset points")


def draw_shares(axis, result):
    """A bar for each batch size and order: rows by what they were for."""
    labels = []
    for y, each in enumerate(result["waste"]):
        total, left = sum(each[kind] for kind in KINDS), 0.0
        for kind, colour in KINDS.items():
            share = 100 * each[kind] / total
            axis.barh(y, share, left=left, color=colour, height=0.7)
            if share >= 6:
                axis.text(left + share / 2, y, f"{share:.0f}", ha="center", va="center",
                          color="white", fontsize=7)
            left += share
        labels.append(f"{each['batch_size']}, {each['order']}")
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("% of the rows computed, counted")
    axis.set_title("static batches: size, how requests are sorted")


def draw_one_batch(axis, batch):
    """Each request a line: its padding, its prompt, its answer, and its seat when it has left."""
    T, end = max(prompt for prompt, _ in batch), max(answer for _, answer in batch)
    for y, (prompt, answer) in enumerate(batch):
        left = 0
        for kind, width in (("padding", T - prompt), ("prompt", prompt), ("answer", answer - 1),
                            ("finished", end - answer)):
            axis.barh(y, width, left=left, color=KINDS[kind], height=0.8,
                      label=kind if y == 0 else None)
            left += width
    axis.axvline(T, color="black", linewidth=1)
    axis.set_yticks([])
    axis.invert_yaxis()
    axis.set_xlabel(f"{T} columns in one pass │ then a pass each")
    axis.set_ylabel(f"{len(batch)} requests")
    axis.set_title(f"the first batch of {len(batch)}, as they come")
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2),
                handlelength=1)


def table(result):
    """Markdown: speed by batch size, what limits it, and where the rows of static batches go."""
    return "\n".join([*speed_table(result), "", *limit_table(result), "", *waste_table(result), "",
                      footnote(result)])


def speed_table(result):
    times = medians(result)
    lines = [f"| sequences | {' | '.join(times)} |", "| --- |" + " --- |" * len(times)]
    for size in next(iter(times.values())):
        cells = []
        for by_size in times.values():
            ms = by_size[size]
            gain = np.median(np.divide(by_size[1], ms)) * size
            cells.append(f"{np.median(ms):.0f} ms ({min(ms):.0f}–{max(ms):.0f}), "
                         f"{1000 * size / np.median(ms):.0f} tok/s · ×{gain:.2f}")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    return [*lines, "", "TPOT, and output tokens/s of all sequences together, × those of one "
            "sequence: medians over the rounds (lowest–highest), ratios taken within a round."]


def limit_table(result):
    times, num_tokens = medians(result), result["arguments"]["prompt_tokens"]
    largest = max(next(iter(times.values())))
    lines = [f"| | weights, MB | cache, MB a sequence | reading, GB/s | products, GFLOP/s | "
             f"knee by the limits | limit of {largest}, tok/s | a second sequence adds to TPOT | "
             "TPOT has doubled at |", "| --- |" + " --- |" * 8]
    for name, by_size in times.items():
        about = result["variants"][name]
        adds = 100 * (np.median(np.divide(by_size[2], by_size[1])) - 1)
        doubled, corner = doubled_at(by_size), knee(about, num_tokens)
        cells = [name, f"{about['weight_bytes'] / 1e6:.0f}",
                 f"{about['cache_bytes_a_token'] * num_tokens / 1e6:.1f}",
                 f"{about['read_bytes_per_s'] / 1e9:.0f}", f"{about['flops_per_s'] / 1e9:.0f}",
                 "none" if corner == float("inf") else f"{corner:.0f}",
                 f"{1000 * largest / limit_ms(about, num_tokens, largest):.0f}", f"{adds:.0f} %",
                 f"more than {largest}" if doubled is None else f"{doubled:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def waste_table(result):
    lines = ["| static batches of | rows | prompt | padding | answer | finished | useful | at work "
             "in a decode pass |", "| --- |" + " --- |" * 7]
    for each in result["waste"]:
        total = sum(each[kind] for kind in KINDS)
        shares = [f"{100 * each[kind] / total:.0f} %" for kind in KINDS]
        useful = 100 * (each["prompt"] + each["answer"]) / total
        at_work = each["answer"] / max(each["passes"], 1)
        lines.append(f"| {each['batch_size']}, {each['order']} | {total} | {' | '.join(shares)} | "
                     f"{useful:.0f} % | {at_work:.1f} of {each['batch_size']} |")
    return lines


def footnote(result):
    machine, arguments = result["machine"], result["arguments"]
    prompt, answer = (arguments["lengths"][what] for what in ("prompt", "answer"))
    return (f"{machine['cores']} cores of {machine['cpu']}; {arguments['model']}, decoding behind "
            f"{arguments['prompt_tokens']} tokens a sequence; {arguments['rounds']} interleaved "
            f"rounds. Waste: {len(result['lengths'])} requests with log-normal lengths, prompts of "
            f"{prompt['median']} tokens in the median (σ {prompt['sigma']:g}), answers of "
            f"{answer['median']} (σ {answer['sigma']:g}). torch {machine['versions']['torch']}, "
            f"NumPy {machine['versions']['numpy']}; {machine['date']}.")
