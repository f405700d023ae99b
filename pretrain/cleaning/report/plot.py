"""The report as pictures: funnel.png and limits.png.

funnel.png shows how much each step took of each source, and how similar documents are to their nearest ones.
limits.png shows how many documents other limits of the filters would drop.
"""

from pathlib import Path
from typing import Any

from pretrain.cleaning.step import library
from pretrain.display.plots import families, label

SHOWN = 40  # sources in the picture; the report has all
ROW, COLUMN, BELOW = 0.34, 0.72, 3.0  # inches: height of a row, width of a column, height of a histogram below
LINES = 8  # sources in each panel of limits.png: the largest ones
ACROSS, PANEL = 4, (3.3, 2.3)  # panels in a row of limits.png; inches
Axes = Any  # of matplotlib, which has no types here
TAKEN, STAYED = "#c44e52", "#4c72b0"


def draw(report: dict, path: Path) -> None:
    """Write the picture of the funnel as PNG."""
    several = len(report["sources"]) > 1
    rows = [*([{"name": "all sources", **report["all"]}] if several else []), *report["sources"][:SHOWN]]
    steps = [step["step"] for step in report["all"]["steps"] if any(_lost(row, step["step"]) for row in rows)]
    names = [label(row["name"], f"source {number}") for number, row in enumerate(rows, int(not several))]
    high, wide = 1.9 + ROW * len(rows), max(8.0, 2.6 + COLUMN * len(steps))
    panels = [_draw_similarities] * bool(report["near_duplicates"]) + [_draw_shares] * bool(report["decontamination"])
    heights = [high, *[BELOW] * len(panels)]
    # Figure rather than pyplot, which may open a window and changes global state.
    figure = library("matplotlib.figure").Figure(figsize=(wide, sum(heights)), dpi=130, layout="constrained")
    first, *below = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_losses(first, rows, names, steps)
    for panel, axes in zip(panels, below, strict=True):
        panel(axes, report)
    figure.savefig(path)


def _draw_losses(axes: Axes, rows: list[dict], names: list[str], steps: list[str]) -> None:
    """One row a source, one column a step: the share of its incoming bytes that the step removed."""
    colours = library("matplotlib.colors")
    shares = [[_lost(row, step) for step in steps] for row in rows]
    left = [row["steps"][-1]["bytes_out"] / max(1, row["steps"][0]["bytes_in"]) for row in rows]
    norm = colours.SymLogNorm(linthresh=1e-3, vmin=0, vmax=1)  # 0.1 % must still be visible
    cells = [[*row, 0.0] for row in shares]
    axes.imshow(cells, aspect="auto", cmap="OrRd", norm=norm)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            axes.text(x, y, _percent(share), ha="center", va="center", fontsize=7.5, color="w" if share > 0.3 else "k")
        axes.text(len(steps), y, f"{left[y]:.1%}", ha="center", va="center", fontsize=8, weight="bold")
    axes.set_xticks(range(len(steps) + 1), [*steps, "LEFT OF ALL"], rotation=40, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), names, fontfamily=families("".join(names)))
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5)
    axes.spines[:].set_visible(False)
    axes.set_title("bytes taken by each step, of those that came to it", fontsize=10, loc="left")


def _draw_similarities(axes: Axes, report: dict) -> None:
    """A histogram of the similarity of each document to the nearest document it was compared with."""
    near = report["near_duplicates"]
    chance = 1 - (1 - 0.5 ** near["rows"]) ** near["bands"]
    axes.set_title(
        f"near-duplicates; of pairs at similarity 0.5 about {chance:.0%} were compared, fewer below",
        fontsize=10,
        loc="left",
    )
    axes.set_xlabel(
        "estimated Jaccard similarity to the nearest document (report.json has a pair of each bin)", fontsize=9
    )
    _draw_histogram(axes, near["histogram"], near["threshold"])


def _draw_shares(axes: Axes, report: dict) -> None:
    """A histogram of the share of an evaluation item that documents have."""
    found = report["decontamination"]
    axes.set_title("documents that share n-grams with an evaluation item", fontsize=10, loc="left")
    axes.set_xlabel(
        "share of the item's n-grams that the document has (report.json has an example of each bin)", fontsize=9
    )
    _draw_histogram(axes, found["histogram"], found["share"])


def _draw_histogram(axes: Axes, bins: list[dict], threshold: float) -> None:
    """Bars of staying and of dropped documents, on a logarithmic scale with a zero."""
    width = bins[0]["to"] - bins[0]["from"]
    middles = [entry["from"] + width / 2 for entry in bins]
    dropped = [entry["dropped"] for entry in bins]
    stayed = [entry["documents"] - entry["dropped"] for entry in bins]
    axes.bar(middles, stayed, 0.9 * width, color=STAYED, label="stay")
    axes.bar(middles, dropped, 0.9 * width, bottom=stayed, color=TAKEN, label="dropped")
    axes.axvline(threshold, color="k", linewidth=1, linestyle="--", label=f"threshold {threshold:g}")
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, 8 * max(1, *(entry["documents"] for entry in bins)))  # room for the legend
    axes.set_xlim(0, 1)
    axes.set_xticks([tenth / 10 for tenth in range(11)])
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.set_ylabel("documents", fontsize=9)
    axes.grid(axis="y", alpha=0.3)
    axes.tick_params(labelsize=8.5)
    axes.legend(fontsize=8.5, loc="upper center", ncols=3, frameon=False)


def draw_limits(report: dict, path: Path) -> None:
    """Write a PNG with one panel for each rule of the filters: the share of documents that other limits would drop.

    Nothing is written if no filter was on.
    """
    numbered = [(label(source["name"], f"source {n}"), source) for n, source in enumerate(report["sources"], 1)]
    largest = sorted(numbered, key=lambda pair: -pair[1]["steps"][0]["documents_in"])[:LINES]
    steps = report["all"]["steps"]
    panels: dict[str, list[tuple[int, dict]]] = {_title(step, rule): [] for step in steps for rule in step["rules"]}
    for number, (_, source) in enumerate(largest):
        for step in source["steps"]:
            for rule in step["rules"]:
                panels[_title(step, rule)].append((number, rule))
    if not panels:
        return
    rows = -(-len(panels) // ACROSS)
    size = (PANEL[0] * min(ACROSS, len(panels)), PANEL[1] * rows + 0.6)
    figure = library("matplotlib.figure").Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(rows, min(ACROSS, len(panels)), squeeze=False).ravel()
    names = [name for name, _ in largest]
    for axes, (title, rules) in zip(grid, panels.items(), strict=False):
        _draw_limits(axes, title, rules)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    lines = [library("matplotlib.lines").Line2D([], [], color=f"C{number}", marker=".") for number in range(len(names))]
    font = {"family": families("".join(names)), "size": 8.5}
    figure.legend(lines, names, loc="outside upper left", ncols=4, frameon=False, prop=font)
    figure.supylabel("share of documents dropped", fontsize=9)  # a longer label does not fit beside a single row
    figure.savefig(path)


def _draw_limits(axes: Axes, title: str, rules: list[tuple[int, dict]]) -> None:
    """Draw one line a source: the share of its documents that each limit would drop. The limit in use is dashed.

    If several shares have the same strictest limit, the limit is drawn at the smallest of these shares.
    """
    limits = [limit for _, rule in rules for limit in [*rule["limits"].values(), rule["limit"]] if limit is not None]
    for number, rule in rules:
        points: dict[float, float] = {}
        for share, limit in rule["limits"].items():
            if limit is not None:
                points.setdefault(limit, float(share))
        axes.plot([*points], [*points.values()], color=f"C{number}", marker=".", linewidth=1)
        axes.axvline(rule["limit"], color=f"C{number}", linestyle="--", linewidth=1, alpha=0.7)
    if max(limits) > 100 and min(limits) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.xaxis.set_minor_formatter("")
    axes.set_yscale("log")
    axes.set_ylim(7e-5, 0.7)
    axes.set_yticks([1e-4, 1e-3, 1e-2, 1e-1, 0.5], ["0.01%", "0.1%", "1%", "10%", "50%"])
    axes.set_title(title, fontsize=8, loc="left")
    axes.tick_params(labelsize=7.5)
    axes.grid(alpha=0.3)


def _title(step: dict, rule: dict) -> str:
    return f"{step['step']}\n{rule['rule']} {rule['sign']}"


def _lost(row: dict, name: str) -> float:
    """The share of its incoming bytes that a step removed from a source."""
    step = next((step for step in row["steps"] if step["step"] == name), None)
    return (step["bytes_in"] - step["bytes_out"]) / step["bytes_in"] if step and step["bytes_in"] else 0.0


def _percent(share: float) -> str:
    """A share in few characters: "", "+3%" (a step that adds bytes), "<.01%", "0.15%", "12%"."""
    if share == 0:
        return ""
    if abs(share) < 5e-5:
        return "<.01%"
    sign = "+" if share < 0 else ""
    return f"{sign}{abs(share):.0%}" if abs(share) >= 0.0995 else f"{sign}{abs(share):.2%}"
