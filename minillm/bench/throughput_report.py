"""The table and the figure of `bench throughput`, from its JSON alone.

Speeds are output tokens/s, {round: speed}; a ratio is taken within a round. Chapter
10_continuous_batching shows both.
"""

from __future__ import annotations

import numpy as np

from . import draw
from .bookkeeping import TENSOR_PARTS, bookkeeping_shares, shares
from .peers import arithmetic_limit, token_bytes
from .quantization import label_points

AIMS = {32: 1.0, 8: 0.8, "mixed": 1.8, "bookkeeping": 0.1}  # what the chapter set out to reach
COLOURS = {"minillm": draw.BLUE, "transformers": draw.ORANGE, "llama.cpp": draw.PINK}
ROWS = {"prompts": (draw.BLUE, "of prompts"), "answers": (draw.SKY, "of answers"),
        "padding": (draw.ORANGE, "padding"), "finished": (draw.RED, "finished already"),
        "again": (draw.GREY, "computed again")}
PARTS = {"schedule": (draw.BLUE, "schedule, lay out"), "step": (draw.SKY, "the cache's indices"),
         "update": (draw.GREEN, "update, text"), "rest": (draw.ORANGE, "rest")}


def speeds(part, name, question, num_tokens):
    """A contestant's in every round, for a question of so many output tokens."""
    return {sample["round"]: num_tokens / sample["seconds"] for sample in part["samples"]
            if sample["contestant"] == name and sample["question"] == question}


def speeds_at_once(result, name, size):
    part = result["at_once"]
    return speeds(part, name, size, size * part["arguments"]["answer_tokens"])


def speeds_mixed(result, name):
    return speeds(result["mixed"], name, "mixed", sum(result["mixed"]["answer_tokens"]))


def best_peers(result, size):
    """The fastest peer's in every round, whichever it was. The speed of one who was asked in the
    first round alone stands for it in the others."""
    peers = [speeds_at_once(result, name, size) for name in result["at_once"]["contestants"]
             if not name.startswith("minillm")]
    return {number: max(each.get(number, median(each)) for each in peers)
            for number in {sample["round"] for sample in result["at_once"]["samples"]} if peers}


def ratios(ours, theirs):
    """In every round that has both."""
    return [ours[number] / theirs[number] for number in ours.keys() & theirs.keys()]


def median(speeds):
    return float(np.median([*speeds.values()]))


def count_rows(part, name):
    """Where the rows of a mixed run went: {"prompts", "answers", "padding", "finished", "again"}.

    The first two are what nobody can save: every token of a prompt, and every token of an answer
    but the last, which is not fed back. A static batch adds padding, of prompts that are shorter
    than others, and rows that have finished, until the last one has. What then is left of the rows
    that went through the model was computed again, after a preemption.
    """
    seats, prompts, answers = (part["arguments"]["seats"], part["prompt_tokens"],
                               part["answer_tokens"])
    counts = {"prompts": sum(prompts), "answers": sum(answers) - len(answers)}
    batches = [slice(first, first + seats) for first in range(0, len(prompts), seats)]
    padding, finished = (sum(len(each[batch]) * max(each[batch]) - sum(each[batch])
                             for batch in batches) for each in (prompts, answers))
    is_static = part["contestants"][name]["is_static"]
    counts |= {"padding": padding * is_static, "finished": finished * is_static}
    return {**counts, "again": rows_of(part, name) - sum(counts.values())}


def rows_of(part, name):
    return next(sample["rows"] for sample in part["samples"] if sample["contestant"] == name)


def goals(result):
    """-> [(what is compared, the ratio in every round or step, what was aimed at), ...]."""
    found = []
    for size in result["at_once"]["arguments"]["sizes"][:0:-1]:
        ours = max((name for name in result["at_once"]["contestants"]
                    if name.startswith("minillm") and "static" not in name),
                   key=lambda name: median(speeds_at_once(result, name, size)))
        found.append((f"{size} at once: {ours} ÷ the fastest peer",
                      ratios(speeds_at_once(result, ours, size), best_peers(result, size)),
                      f"≥ {AIMS[size]}" if size in AIMS else "–"))
    for name in result["mixed"]["contestants"]:
        engine, batching, weights = name.split()
        if batching == "continuous":
            static = speeds_mixed(result, f"{engine} static {weights}")
            found.append((f"mixed lengths, {weights}: continuous ÷ static",
                          ratios(speeds_mixed(result, name), static), f"≥ {AIMS['mixed']}"))
    running = result["bookkeeping"]["steps"][-1]["running"]
    found.append((f"{running} running: bookkeeping ÷ a step",
                  bookkeeping_shares(result["bookkeeping"], running), f"< {AIMS['bookkeeping']}"))
    return found


def table(result):
    """Markdown: the goals, then every contestant's speed."""
    lines = ["| | measured | aim |", "| --- | --- | --- |"]
    lines += [f"| {what} | {spread(values, 3 if 'step' in what else 2)} | {aim} |"
              for what, values, aim in goals(result)]
    part = result["at_once"]
    sizes, arguments = part["arguments"]["sizes"], part["arguments"]
    lines += ["", f"| output tokens/s | {' | '.join(f'{size} at once' for size in sizes)} | "
              f"× the fastest peer, {sizes[-1]} at once |", "| --- |" + " --- |" * (len(sizes) + 1)]
    for name in part["contestants"]:
        cells = [spread(speeds_at_once(result, name, size).values()) for size in sizes]
        ratio = np.median(ratios(speeds_at_once(result, name, sizes[-1]),
                                 best_peers(result, sizes[-1])))
        lines.append(f"| {name} | {' | '.join(cells)} | {ratio:.2f} |")
    lines += ["", same_answers(part), "", *mixed_table(result), ""]
    machine, versions = result["machine"], result["machine"]["versions"]
    named = ", ".join(f"{name} {versions[name]}" for name in (
        "torch", "transformers", "llama-cpp-python") if versions.get(name))
    lines.append(
        f"{machine['cores']} cores of {machine['cpu']}; {named}; {result['model']}; prompts of "
        f"{arguments['prompt_tokens']} tokens and answers of {arguments['answer_tokens']}, greedy; "
        f"{arguments['rounds']} interleaved rounds, median (lowest–highest), and one round where "
        f"no range is given, whose figure then stands for the others; ratios taken within a round; "
        f"{machine['date']}.")
    return "\n".join(lines)


def same_answers(part):
    """How far those who compute in float32 agree; rounding may decide a near tie."""
    answers = {name: each for name, each in part["answers"].items() if name.endswith("fp32")}
    num_same = sum(len(set(each)) == 1 for each in zip(*answers.values()))
    return (f"Of {part['arguments']['sizes'][1]} answers at once, {num_same} are the same to the "
            f"last token in all of {', '.join(answers)}.")


def mixed_table(result):
    part = result["mixed"]
    lines = [f"| {part['arguments']['requests']} requests of mixed lengths, "
             f"{part['arguments']['seats']} seats | output tokens/s | rows | of prompts | "
             "of answers | padding | finished | computed again |", "| --- |" + " --- |" * 7]
    for name in part["contestants"]:
        rows = rows_of(part, name)
        cells = [spread(speeds_mixed(result, name).values()), rows,
                 *(f"{100 * count / rows:.0f} %" for count in count_rows(part, name).values())]
        lines.append(f"| {name} | {' | '.join(map(str, cells))} |")
    prompts, answers = part["prompt_tokens"], part["answer_tokens"]
    lines += ["", f"Prompts have {np.median(prompts):.0f} tokens (median; mean "
              f"{np.mean(prompts):.0f}, longest {max(prompts)}), answers {np.median(answers):.0f} "
              f"(mean {np.mean(answers):.0f}, longest {max(answers)})."]
    return lines


def spread(values, digits=0):
    """"12 (11–14)": the median, the lowest and the highest; "12" where there is one value."""
    mid, low, high = (f"{each:.{digits}f}" for each in (
        np.median([*values]), min(values), max(values)))
    return mid if len(values) == 1 else f"{mid} ({low}–{high})"


def figure(result):
    """Speed by number of requests; mixed lengths and their rows; bookkeeping."""
    picture, axes = draw.new_figure(3, 2, height=9.2)
    grid = axes[0, 0].get_gridspec()
    for axis in axes[0]:
        axis.remove()
    draw_at_once(picture.add_subplot(grid[0, :]), result)
    draw_mixed(axes[1, 0], result)
    draw_rows(axes[1, 1], result["mixed"])
    draw_lengths(axes[2, 0], result["mixed"])
    draw_bookkeeping(axes[2, 1], result["bookkeeping"])
    return picture


def draw_at_once(axis, result):
    part = result["at_once"]
    sizes, last = part["arguments"]["sizes"], []
    limits = [limit_at_once(result, size) for size in sizes]
    axis.plot(sizes, limits, "--", color=draw.GREEN, linewidth=1.2)
    for number, name in enumerate(part["contestants"]):
        rounds = [speeds_at_once(result, name, size) for size in sizes]
        colour, style = COLOURS[name.split()[0]], ("-", "--", ":", "-.")[number % 4]
        axis.plot(sizes, [median(each) for each in rounds], style, color=colour, linewidth=1.3)
        for size, each in zip(sizes, rounds):
            axis.plot([size] * len(each), each.values(), ".", color=colour, markersize=3)
        last.append(median(rounds[-1]))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(sizes, sizes)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.set_xlim(sizes[0] * 0.9, sizes[-1] * 2.1)  # room for the names
    axis.set_ylim(axis.get_ylim())
    names = [*part["contestants"], "limit of this machine"]
    label_points(axis, [sizes[-1]] * len(names), [*last, limits[-1]], names)
    axis.set_title(f"requests that come at once: {part['arguments']['prompt_tokens']} tokens each, "
                   f"and {part['arguments']['answer_tokens']} new ones")
    axis.set_xlabel("requests")
    axis.set_ylabel("output tokens/s (median; dots: rounds)")
    axis.grid(axis="y", color="#eeeeee")


def limit_at_once(result, size):
    """Output tokens/s if prompts cost their products alone, and a step its products or one reading
    of the weights, in the fastest arithmetic and the smallest format of all; attention is free."""
    limits, arguments = result["limits"], result["at_once"]["arguments"]
    smallest = min(about["bits"] for about in result["at_once"]["contestants"].values())
    num_bytes, operations_per_s = token_bytes(limits, smallest), arithmetic_limit(limits, 8)
    bytes_per_s = max(speed for _, speed in limits["read_again"])
    prefill_s = 2 * size * arguments["prompt_tokens"] * limits["layer_params"] / operations_per_s
    products_s = 2 * size * (limits["layer_params"] + limits["head_params"]) / operations_per_s
    step_s = max(num_bytes / bytes_per_s, products_s)
    num_tokens = arguments["answer_tokens"]
    return size * num_tokens / (prefill_s + num_tokens * step_s)


def draw_mixed(axis, result):
    names = list(result["mixed"]["contestants"])
    for y, name in enumerate(names):
        rounds = [*speeds_mixed(result, name).values()]
        axis.barh(y, np.median(rounds), color=COLOURS[name.split()[0]], height=0.62,
                  alpha=0.5 if result["mixed"]["contestants"][name]["is_static"] else 1)
        axis.plot(rounds, [y] * len(rounds), ".", color="black", markersize=3)
        axis.annotate(f"{np.median(rounds):.0f}", (max(rounds), y), (5, 0), va="center",
                      textcoords="offset points")
    axis.set_yticks(range(len(names)), [name.removeprefix("minillm ").replace(" static", "\nstatic")
                                        for name in names])
    axis.invert_yaxis()
    axis.set_xlabel("output tokens/s (median; dots: rounds)")
    axis.set_title(f"{result['mixed']['arguments']['requests']} requests of mixed lengths, "
                   f"{result['mixed']['arguments']['seats']} seats")


def draw_rows(axis, part):
    names = list(part["contestants"])
    for y, name in enumerate(names):
        left = 0
        for kind, count in count_rows(part, name).items():
            colour, label = ROWS[kind]
            axis.barh(y, count, left=left, color=colour, height=0.62,
                      label=label if y == 0 and (count or kind != "again") else None)
            left += count
    axis.set_yticks(range(len(names)), [])
    axis.set_xlabel("rows through the model")
    axis.set_ylim(len(names) - 0.5, -1.3)  # room for the legend
    axis.set_title("the rows that they computed")
    axis.legend(frameon=False, fontsize=7, ncols=4, loc="upper center", handlelength=1,
                columnspacing=1)


def draw_lengths(axis, part):
    """Requests in order of length: how long the tail is."""
    for key, colour, label in (("prompt_tokens", draw.BLUE, "prompts"),
                               ("answer_tokens", draw.SKY, "answers")):
        lengths = sorted(part[key])
        axis.plot(range(1, len(lengths) + 1), lengths, ".", color=colour, markersize=4,
                  label=f"{label}, mean {np.mean(lengths):.0f}")
        axis.axhline(np.mean(lengths), color=colour, linewidth=0.8)
    axis.set_xlabel("requests, from the shortest to the longest")
    axis.set_ylabel("tokens")
    axis.set_title("the mixed lengths")
    axis.legend(frameon=False)


def draw_bookkeeping(axis, part):
    running = list(dict.fromkeys(step["running"] for step in part["steps"]))
    for x, num in enumerate(running):
        found, bottom = shares(part, num), 0
        for name, (colour, label) in PARTS.items():
            axis.bar(x, 100 * found[name], bottom=bottom, color=colour, width=0.6,
                     label=label if x == 0 else None)
            bottom += 100 * found[name]
        step_ms = 1000 * np.median([step["step_s"] for step in part["steps"]
                                    if step["running"] == num])
        axis.annotate(f"{100 * found['bookkeeping']:.1f} % of {step_ms:.0f} ms", (x, bottom),
                      (0, 3), textcoords="offset points", ha="center")
    axis.set_xticks(range(len(running)), running)
    axis.set_ylim(0, 1.6 * axis.get_ylim()[1])  # room for the legend
    axis.set_xlabel("requests that decode")
    axis.set_ylabel("% of a step")
    axis.set_title(f"bookkeeping: all but {' and '.join(TENSOR_PARTS).replace('_', ' ')}")
    axis.legend(frameon=False, fontsize=7, ncols=2, loc="upper center")
