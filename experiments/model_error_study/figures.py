"""Figures of the errors of dynamics models: by horizon and chunk length, and against success."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from experiments.model_error_study.rows import ChunkRow, PolicyRow
from mac.atomic_files import replace_file
from mac.run.report.plot import GREY
from mac.run.report.stats import Interval, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

COLOURS = ("#8c2d04", "#e08214", "#4a9c8e", "#1f5fa8", "#5e3c99", "#333333")


def draw_chunks(rows: Sequence[ChunkRow], path: Path, *, title: str, data: str = "") -> None:
    """Draws error against horizon, one line per chunk length, and against chunk length at the end.

    Args:
        rows: all horizons of every chunk length, in their order.
        path: the PNG to write, replaced if it exists.
        data: origin of the data, shown below.
    Raises:
        UserError: `path` cannot be written.
    """
    figure = new_figure(wide=9.0)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2), sharey=True)
    groups: dict[int, list[ChunkRow]] = defaultdict(list)
    for row in rows:
        groups[row.chunk].append(row)
    lines: list[Line2D] = []
    for place, group in enumerate(groups.values()):
        colour = COLOURS[place % len(COLOURS)]
        lines.append(_curve(left, group, colour))
        _summit(right, place, group[-1], colour)
    finest = max(groups.values(), key=len)
    x = [row.horizon for row in finest]
    lines += left.plot(x, [row.still for row in finest], color=GREY, ls="--", lw=1.2)
    right.axhline(finest[-1].still, color=GREY, ls="--", lw=1.2)
    left.set_yscale("log")
    left.set_xlim(0, x[-1])
    left.set_xlabel("open-loop horizon (environment steps)\n(bands: 95% over seeds)")
    left.set_ylabel("mean squared error, held-out data\n(normalised state)")
    names = [*(f"{chunk} per chunk" for chunk in groups), "constant state"]
    left.legend(lines, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, fontsize=8.5, frameon=False)
    right.set_xticks(range(len(groups)), [str(chunk) for chunk in groups])
    right.set_xlim(-0.5, len(groups) - 0.2)
    right.set_xlabel(
        f"actions per chunk; error after {x[-1]} steps\n(95%: thick over seeds, thin over episodes)"
    )
    right.tick_params(labelleft=False)
    dress(figure, (left, right), title, data)
    save(figure, path)


def _curve(axes: "Axes", group: list[ChunkRow], colour: str) -> "Line2D":
    x = [row.horizon for row in group]
    if group[0].seeds > 1:
        low, high = [row.seed_low for row in group], [row.seed_high for row in group]
        axes.fill_between(x, low, high, color=colour, alpha=0.25, lw=0)
    marker = "o" if len(x) <= 25 else None
    return axes.plot(x, [row.error for row in group], color=colour, lw=1.8, marker=marker, ms=3.5)[0]


def _summit(axes: "Axes", place: int, row: ChunkRow, colour: str) -> None:
    """Draws the error at the last horizon: intervals over seeds (thick) and over held-out episodes (thin)."""
    axes.vlines(place, row.data_low, row.data_high, color=colour, lw=1.2)
    axes.vlines(place, row.seed_low, row.seed_high, color=colour, lw=5, alpha=0.45)
    axes.plot([place], [row.error], "o", color=colour, ms=5)
    axes.annotate(
        f"{row.error:.2g}", (place, row.error), xytext=(9, 0), textcoords="offset points", va="center",
        fontsize=9, color=colour, bbox={"fc": "white", "ec": "none", "pad": 1, "alpha": 0.8},
    )  # fmt: skip


def draw_policies(rows: Sequence[PolicyRow], path: Path, *, title: str, data: str = "") -> None:
    """Draws success against the model's error: each seed of each run, and each run's mean with intervals.

    Args:
        path: the PNG to write, replaced if it exists.
        data: origin of the data, shown below.
    Raises:
        UserError: `path` cannot be written.
    """
    from matplotlib.ticker import PercentFormatter

    figure = new_figure(wide=6.4)
    axes = figure.subplots()
    for place, run in enumerate(dict.fromkeys(row.run for row in rows)):
        group = [row for row in rows if row.run == run]
        colour = COLOURS[place % len(COLOURS)]
        error, success = (np.asarray([getattr(row, name) for row in group]) for name in ("error", "success"))
        axes.plot(error, success, "o", color=colour, ms=4, alpha=0.45, mew=0, clip_on=False)
        x, y = _interval(error), _interval(success)
        axes.errorbar(
            [x.value], [y.value], xerr=_arms(x), yerr=_arms(y), fmt="D", color=colour, ms=6, lw=1.4,
            label=f"{Path(run).name}, {group[0].chunk} actions per chunk",
        )  # fmt: skip
    every = [row.error for row in rows]
    if max(every) > 5 * min(every):  # a log axis of less than a decade crowds its labels
        axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(f"mean squared error after {rows[0].horizon} steps, held-out data (normalised state)")
    axes.set_ylabel("success rate\n(dots: seeds; bars: 95% over seeds)")
    axes.legend(fontsize=8.5, frameon=False, loc="best")
    dress(figure, (axes,), title, data)
    save(figure, path)


def _interval(values: np.ndarray) -> Interval:
    return summarise(values[:, None], reps=2000).mean


def _arms(interval: Interval) -> np.ndarray:
    """Returns the lengths of an error bar's two arms, 0 without an interval."""
    ends = np.asarray([interval.value - interval.low, interval.high - interval.value])
    return np.nan_to_num(np.maximum(ends, 0))[:, None]


def new_figure(wide: float) -> "Figure":
    """An empty figure, `wide` inches wide."""
    # Imported here because it takes 0.3 s, and a figure made without pyplot keeps no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes a figure as PNG, in one go.

    Raises:
        UserError: `path` cannot be written.
    """
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def dress(figure: "Figure", every: Sequence["Axes"], title: str, data: str) -> None:
    """Gives a figure its title, the origin of the data below, and every pair of axes the same looks."""
    figure.suptitle(title, fontsize=10, x=0.01, ha="left", color="#222222")
    if data:
        figure.supxlabel(f"data: {data}", fontsize=8, color=GREY)
    for axes in every:
        axes.grid(True, color="#dddddd", lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(color="#888888", labelsize=9)
