"""From a result's JSON to the figure and the table that are published. Nothing else draws.

Colours are those of Okabe and Ito (2008), told apart by the colour-blind; a hatch or a label never
depends on colour alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
README = Path(__file__).resolve().parents[2] / "README.md"


def peers(folder):
    """peers.png, and the table of chapters/peers/README.md and README.md, from peers.json."""
    result = json.loads((folder / "peers.json").read_text())
    figure, axes = new_figure(1, 2, height=3.0)
    rows = peers_rows(result)
    prefill_title = f"prefill of {result['arguments']['prefill_tokens']}"
    for axis, key, title in zip(axes, ("decode", "prefill"), ("decode, 1 sequence", prefill_title)):
        for y, row in enumerate(rows):
            colour = BLUE if row["name"].startswith("minillm") else ORANGE
            axis.barh(y, row[key], color=colour, height=0.62)
            axis.plot(row[f"{key}_samples"], [y] * len(row[f"{key}_samples"]), ".", color="black",
                      markersize=3)
            axis.plot([row[f"{key}_limit"]] * 2, [y - 0.4, y + 0.4], color=GREEN, linewidth=2)
            axis.text(row[key], y, f" {row[key]:.0f}", va="center", fontsize=8)
        axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
        axis.invert_yaxis()
        axis.set_xlabel("tokens/s (median; dots: every round; green: the machine's limit)")
        axis.set_title(title)
    axes[1].set_yticklabels([])
    finish(figure, folder / "peers.png", result)
    if not result["arguments"]["fast"]:
        fill_markers(README, "peers", peers_table(result))
        fill_markers(folder.parent / "README.md", "peers", peers_table(result))


def peers_rows(result):
    """One row a contestant: medians, samples and limits, in tokens/s."""
    limits, prefill_tokens = result["limits"], result["arguments"]["prefill_tokens"]
    rows = []
    for name, dtype in result["dtypes"].items():
        samples = [sample for sample in result["samples"] if sample["contestant"] == name]
        decode = [(len(times) - 1) / (times[-1] - times[0])
                  for times in (sample["token_times_s"] for sample in samples)]
        prefill = [prefill_tokens / sample["prefill_s"] for sample in samples]
        layers, head = limits["layer_params"], limits["head_params"]
        token_bytes = (layers + head) * (2 if dtype == "bfloat16" else 4)
        prefill_flops = 2 * (layers * prefill_tokens + head)
        rows.append({
            "name": name, "dtype": dtype,
            "decode": float(np.median(decode)), "decode_samples": decode,
            "decode_limit": limits["read_bytes_per_s"] / token_bytes,
            "prefill": float(np.median(prefill)), "prefill_samples": prefill,
            "prefill_limit": prefill_tokens * limits["flops_per_s"][dtype] / prefill_flops,
        })
    return rows


def peers_table(result):
    """Markdown; every ratio is the median over the rounds of the ratio within a round."""
    rows = {row["name"]: row for row in peers_rows(result)}
    lines = ["| | decode, tok/s | × transformers | prefill, tok/s | × transformers |",
             "| --- | --- | --- | --- | --- |"]
    for name, row in rows.items():
        base = rows["transformers bf16" if row["dtype"] == "bfloat16" else "transformers fp32"]
        cells = [name]
        for key in ("decode", "prefill"):
            low, high = min(row[f"{key}_samples"]), max(row[f"{key}_samples"])
            cells.append(f"{row[key]:.0f} ({low:.0f}–{high:.0f})")
            ratios = np.divide(row[f"{key}_samples"], base[f"{key}_samples"])
            cells.append("1" if row is base else f"{np.median(ratios):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    machine, arguments = result["machine"], result["arguments"]
    versions = machine["versions"]
    lines += ["", f"{machine['cores']} cores of {machine['cpu']}, "
              f"{result['limits']['read_bytes_per_s'] / 1e9:.0f} GB/s; torch {versions['torch']}, "
              f"transformers {versions['transformers']}; {arguments['rounds']} interleaved rounds, "
              f"median (lowest–highest); {arguments['decode_prompt_tokens']}-token prompt, "
              f"{arguments['decode_tokens']} new tokens; {machine['date']}."]
    return "\n".join(lines)


def fill_markers(path, name, text):
    """Replace what stands between <!-- bench:NAME --> and <!-- /bench:NAME --> in a file."""
    content = path.read_text(encoding="utf-8")
    path.write_text(with_markers_filled(content, name, text), encoding="utf-8")


def with_markers_filled(content, name, text):
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    before, found, rest = content.partition(start)
    _, found_end, after = rest.partition(end)
    if not found or not found_end:
        raise ValueError(f"no {start} … {end} to fill")
    return f"{before}{start}\n{text}\n{end}{after}"


def new_figure(num_rows, num_columns, height):
    """As wide as a README."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    return pyplot.subplots(num_rows, num_columns, figsize=(8.6, height), layout="constrained")


def finish(figure, path, result):
    """Save it; a figure of shrunken sizes says so across its face."""
    if result["arguments"]["fast"]:
        figure.text(0.5, 0.5, "MINILLM_FAST: no measurement", fontsize=26, color=GREY, alpha=0.4,
                    ha="center", va="center", rotation=15)
    figure.savefig(path, dpi=160)
