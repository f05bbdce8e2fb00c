"""The table and the figure of `bench load`, from its JSON alone.

TTFT counts from the moment at which a request was due. Chapter 10_continuous_batching shows both.
"""

from __future__ import annotations

import numpy as np

from ..metrics import goodput, percentiles, request_metrics, throughput
from . import draw
from .long_prompt import experience, gaps_of
from .timeline import draw_counts, draw_timeline
from .workload import unpack

COLOURS = {"static": draw.ORANGE, "continuous": draw.SKY, "continuous, chunked": draw.BLUE}


def metrics_of(part, run):
    """-> RequestMetrics of every request of a run, submitted when it was due."""
    return [request_metrics(0.0, unpack(times_s).tolist(), num_prompt_tokens)
            for times_s, num_prompt_tokens in zip(run["token_times_s"], part["prompt_tokens"])]


def summarize(part, run):
    """A run in numbers: percentiles {50: ..., 95: ..., 99: ...} in ms, and rates a second."""
    requests, arguments = metrics_of(part, run), part["arguments"]
    duration_s = max(arrival_s + each.e2e_ms / 1000
                     for arrival_s, each in zip(unpack(run["arrivals_s"]), requests))
    done = throughput(requests, duration_s)
    return {
        "ttft_ms": percentiles([each.ttft_ms for each in requests]),
        "tpot_ms": percentiles([each.tpot_ms for each in requests]),
        "itl_ms": percentiles([gap for each in requests for gap in each.itl_ms]),
        "requests_per_s": done.requests_per_s,
        "output_tokens_per_s": done.output_tokens_per_s,
        "goodput": goodput(requests, duration_s, arguments["max_ttft_ms"],
                           arguments["max_tpot_ms"]),
        "preemptions": int(unpack(run["steps"].get("preempted", "0")).sum()),
        "most_waiting": int(unpack(run["steps"]["waiting"]).max()),
    }


def summaries_of(part):
    """-> {(variant, share of the capacity): summary}."""
    return {(run["variant"], run["share"]): summarize(part, run) for run in part["runs"]}


def table(result):
    """Markdown: percentiles at every rate, then what comes of them, then the long prompt."""
    part = result["load"]
    arguments, summaries = part["arguments"], summaries_of(part)
    lines = ["| load, × capacity | batching | TTFT, ms: p50 / p95 / p99 | TPOT, ms | ITL, ms | "
             "output tokens/s | requests/s | goodput | most waiting |", "| --- |" + " --- |" * 8]
    for (variant, share), row in summaries.items():
        cells = [" / ".join(f"{value:.0f}" for value in row[key].values())
                 for key in ("ttft_ms", "tpot_ms", "itl_ms")]
        lines.append(f"| {share:g} | {variant} | {' | '.join(cells)} | "
                     f"{row['output_tokens_per_s']:.0f} | {row['requests_per_s']:.2f} | "
                     f"{row['goodput']:.2f} | {row['most_waiting']} |")
    lines += ["", "| load, × capacity | p95 TTFT, continuous ÷ static | chunked ÷ static | "
              "p99 ITL, chunked ÷ continuous |", "| --- | --- | --- | --- |"]
    for share in arguments["shares"]:
        static, whole, chunked = (summaries[variant, share] for variant in COLOURS)
        lines.append(f"| {share:g} | {whole['ttft_ms'][95] / static['ttft_ms'][95]:.3f} | "
                     f"{chunked['ttft_ms'][95] / static['ttft_ms'][95]:.3f} | "
                     f"{chunked['itl_ms'][99] / whole['itl_ms'][99]:.2f} |")
    whole, cut = (arguments["max_num_batched_tokens"][name]
                  for name in ("continuous", "continuous, chunked"))
    machine = result["machine"]
    lines += [
        "", f"The capacity is {part['capacity']:.2f} requests/s. Goodput: requests/s with TTFT ≤ "
        f"{arguments['max_ttft_ms']} ms and TPOT ≤ {arguments['max_tpot_ms']} ms. "
        f"{arguments['requests']} requests, prompts of {np.mean(part['prompt_tokens']):.0f} tokens "
        f"on average and at most {max(part['prompt_tokens'])}, answers of "
        f"{np.mean(part['answer_tokens']):.0f} and {max(part['answer_tokens'])}; "
        f"{arguments['seats']} seats; up to {whole} tokens a step, chunked {cut}; "
        f"{sum(row['preemptions'] for row in summaries.values())} preemptions.", "",
        *long_prompt_table(result["long_prompt"]), "",
        f"{machine['cores']} cores of {machine['cpu']}; torch {machine['versions']['torch']}; "
        f"{result['model']}, {result['quantize']}; {machine['date']}."]
    return "\n".join(lines)


def long_prompt_table(part):
    """A row a budget; ratios to the first, which takes the prompt whole, within a round."""
    arguments = part["arguments"]
    whole = experience(part, arguments["budgets"][0])
    lines = ["| tokens a step | p99 ITL of those who run, ms | whole prompt ÷ this | "
             "TTFT of the newcomer, ms | this ÷ whole prompt |", "| --- |" + " --- |" * 4]
    for budget in arguments["budgets"]:
        p99_ms, _, ttft_ms = experience(part, budget)
        lines.append(f"| {budget} | {np.median(p99_ms):.0f} | "
                     f"{np.median(np.divide(whole[0], p99_ms)):.1f} | {np.median(ttft_ms):.0f} | "
                     f"{np.median(np.divide(ttft_ms, whole[2])):.2f} |")
    before_ms = np.median([experience(part, budget)[1] for budget in arguments["budgets"]])
    return [*lines, "", f"{arguments['running']} requests decode, {before_ms:.0f} ms a token, when "
            f"a prompt of {arguments['long_prompt_tokens']} tokens comes in; medians of "
            f"{arguments['rounds']} interleaved rounds."]


def figure(result):
    """The timeline; what people wait for at every rate; the long prompt."""
    picture, axes = draw.new_figure(5, 3, height=11.5)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[:3].ravel():
        axis.remove()
    rows, counts = picture.add_subplot(grid[:2, :]), picture.add_subplot(grid[2, :])
    draw_timeline(rows, result["timeline"])
    rows.legend(frameon=False, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=7)
    draw_counts(counts, result["timeline"])
    draw_load(axes[3], result["load"])
    draw_long_prompt(axes[4], result["long_prompt"])
    return picture


def draw_load(axes, part):
    shares, summaries = part["arguments"]["shares"], summaries_of(part)
    for variant, colour in COLOURS.items():
        rows = [summaries[variant, share] for share in shares]
        for axis, key, styles in ((axes[0], "ttft_ms", {50: ":", 95: "-"}),
                                  (axes[1], "itl_ms", {50: ":", 99: "-"})):
            for percent, style in styles.items():
                axis.plot(shares, [row[key][percent] for row in rows], f"{style}o", color=colour,
                          markersize=3, label=f"{variant}, p{percent}")
        axes[2].plot(shares, [row["goodput"] for row in rows], "-o", color=colour, markersize=3,
                     label=variant)
    axes[2].plot(shares, [share * part["capacity"] for share in shares], "--", color=draw.GREY,
                 linewidth=1, label="all that come")
    for axis, label in zip(axes, ("TTFT, ms", "ITL, ms", "requests/s that met both")):
        axis.set_xlabel("load, × capacity")
        axis.set_ylabel(label)
        axis.set_xticks(shares)
        axis.grid(axis="y", color="#eeeeee")
    for axis, percent in ((axes[0], 95), (axes[1], 99)):
        set_log_scale(axis)
        axis.set_title(f"dotted: p50, solid: p{percent}")
    axes[2].set_ylim(bottom=0)
    axes[2].set_title(f"goodput: TTFT ≤ {part['arguments']['max_ttft_ms']} ms, "
                      f"TPOT ≤ {part['arguments']['max_tpot_ms']} ms", fontsize=7.5)
    axes[2].legend(frameon=False, fontsize=7)


def draw_long_prompt(axes, part):
    """The gaps of a running request as they came; their p99 and the newcomer's TTFT by budget."""
    budgets = part["arguments"]["budgets"]
    shown = dict(zip((budgets[0], budgets[len(budgets) // 2], budgets[-1]),
                     (draw.SKY, draw.BLUE, draw.GREEN)))
    for budget, colour in shown.items():
        ends_s, gaps_ms = gaps_of(next(each for each in part["samples"]
                                       if each["budget"] == budget))
        axes[0].plot(ends_s, gaps_ms, ".-", color=colour, markersize=3, linewidth=0.8,
                     label=f"{budget} a step")
    axes[0].set_xlabel("seconds since the long prompt came")
    axes[0].set_ylabel("ITL of those who run, ms")
    axes[0].legend(frameon=False, fontsize=7)
    found = {budget: experience(part, budget) for budget in budgets}
    for axis, index, label in ((axes[1], 0, "p99 ITL of those who run, ms"),
                               (axes[2], 2, "TTFT of the newcomer, ms")):
        axis.plot(budgets, [np.median(found[budget][index]) for budget in budgets], "-",
                  color=draw.BLUE)
        for budget in budgets:
            axis.plot([budget] * len(found[budget][index]), found[budget][index], ".",
                      color=draw.BLUE, markersize=3)
        axis.set_xscale("log", base=2)
        axis.set_xticks(budgets, budgets)
        axis.set_xlabel("budget, tokens a step")
        axis.set_ylabel(label)
        axis.grid(axis="y", color="#eeeeee")
    for axis in axes[:2]:
        set_log_scale(axis)
    axes[2].set_ylim(bottom=0)


def set_log_scale(axis):
    """With plain numbers beside it: 100, 200, 500, 1000 …"""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
