"""What every figure shares: its look, its width, its watermark, and the tables beside it.

The module of a measurement has `figure(result)` and `table(result)`, which see the JSON and nothing
else. Colours are those of Okabe and Ito (2008), which the colour-blind can tell apart.
"""

from __future__ import annotations

import json
from pathlib import Path

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#666666"
SKY, RED, PINK = "#56B4E9", "#D55E00", "#CC79A7"
README = Path(__file__).resolve().parents[2] / "README.md"


def publish(folder, name, measurement):
    """From NAME.json: draw NAME.png, and fill the chapter's table, and the README's if it has one.

    measurement: the module that measured, with `figure` and `table`. A table stands between
    <!-- bench:NAME --> and <!-- /bench:NAME -->.
    """
    result = json.loads((folder / f"{name}.json").read_text())
    figure = measurement.figure(result)
    if result["fast"]:
        figure.text(0.5, 0.5, "MINILLM_FAST: no measurement", fontsize=26, color=GREY, alpha=0.4,
                    ha="center", va="center", rotation=15)
    figure.savefig(folder / f"{name}.png", dpi=160)
    if not result["fast"]:
        for path in (folder.parent / "README.md", README):
            if path.is_file() and f"<!-- bench:{name} -->" in path.read_text(encoding="utf-8"):
                fill_markers(path, name, measurement.table(result))


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
