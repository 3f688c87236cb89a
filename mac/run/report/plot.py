"""The learning curve of a run as a picture, drawn without a display."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mac.atomic_files import replace_file
from mac.formatting import counted
from mac.run.report.score import SUCCESS
from mac.run.report.stats import Curve, ScoreSummary, learning_curve, summarise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE = "#1f5fa8"
GREY = "#5f6b7a"
COLOURS = (BLUE, "#c2571a", "#2e8b57", "#8a4fa3", "#b8912b", "#c23b5e", "#3aa0a8", GREY)


def plot_learning_curve(rows: Iterable[Mapping[str, Any]], path: Path, *, title: str) -> None:
    """Draws scores against gradient updates: each seed, their mean, and its 95% bootstrap interval; below,
    where the data come from, if the rows say so.

    Args:
        rows: rows of `eval.jsonl`; a seed's score is the mean over its tasks.
        path: the PNG to write, replaced if it exists.
        title: what was run, for instance `MAC on cube-single-play-singletask-task2-v0`.
    Raises:
        UserError: there is no complete evaluation, or `path` cannot be written.
    """
    curve = learning_curve(rows)
    _picture(path, title, curve.data, lambda axes: _draw(axes, curve))


def plot_comparison(curves: Mapping[str, Curve], path: Path, *, title: str) -> None:
    """Draws runs over one another, by name: the mean over seeds and tasks, and its 95% bootstrap interval.

    Raises:
        UserError: `path` cannot be written.
    """

    def draw(axes: "Axes") -> None:
        for i, (name, curve) in enumerate(curves.items()):
            colour, dashes = COLOURS[i % len(COLOURS)], ("-", "--", ":")[i // len(COLOURS) % 3]
            summaries = [summarise(table, reps=2000).mean for table in curve.scores]
            if curve.steps == [0]:  # of what learns nothing
                axes.axhline(summaries[0].value, color=colour, ls=dashes, lw=1.2, label=name)
                continue
            if len(curve.seeds) > 1:
                low, high = [s.low for s in summaries], [s.high for s in summaries]
                axes.fill_between(curve.steps, low, high, color=colour, alpha=0.12, lw=0)
            means = [s.value for s in summaries]
            axes.plot(curve.steps, means, color=colour, ls=dashes, lw=1.8, marker="o", ms=3, label=name)
        _dress(axes, max(curves.values(), key=lambda curve: curve.steps[-1]))

    data = "; ".join(dict.fromkeys(curve.data for curve in curves.values() if curve.data))
    _picture(path, title, data, draw)


def _picture(path: Path, title: str, data: str, draw: Callable[["Axes"], None]) -> None:
    """One pair of axes with a title, and below it where the data come from."""
    # Imported here because it takes 0.3 s, and a figure made without pyplot keeps no global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    draw(axes)
    axes.set_title(title, fontsize=10, loc="left", color="#222222")
    if data:
        figure.supxlabel(f"data: {data}", fontsize=8, color=GREY)
    replace_file(path, lambda file: figure.savefig(file, format="png"))


def _draw(axes: "Axes", curve: Curve) -> None:
    per_seed = curve.scores.mean(axis=2)
    summaries = [summarise(table, reps=2000) for table in curve.scores]
    mean = [s.mean.value for s in summaries]
    marker = "o" if len(curve.steps) <= 40 else None
    seeds = len(curve.seeds)
    if seeds > 1:
        low, high = [s.mean.low for s in summaries], [s.mean.high for s in summaries]
        axes.fill_between(
            curve.steps, low, high, color=BLUE, alpha=0.18, lw=0, label="95% interval over seeds"
        )
        lines = axes.plot(curve.steps, per_seed, color=GREY, lw=0.8, alpha=0.6, zorder=2)
        lines[0].set_label("one seed")
    label = f"mean of {seeds} seeds" if seeds > 1 else f"seed {curve.seeds[0]}"
    axes.plot(
        curve.steps, mean, color=BLUE, lw=2.2, marker=marker, ms=4, label=label, zorder=3, clip_on=False
    )
    _mark_last(axes, curve.steps[-1], summaries[-1], curve.measure.short)
    _dress(axes, curve)


def _mark_last(axes: "Axes", step: int, last: ScoreSummary, form: str) -> None:
    axes.annotate(
        f"{last.mean.value:{form}}",
        (step, last.mean.value),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=BLUE,
        fontweight="bold",
        annotation_clip=False,
    )


def _dress(axes: "Axes", curve: Curve) -> None:
    from matplotlib.ticker import EngFormatter, PercentFormatter

    first, last = curve.steps[0], curve.steps[-1]
    axes.set_xlim(min(first, 0), max(last, first + 1))
    if curve.measure is SUCCESS:
        axes.set_ylim(-0.02, 1.02)
        axes.set_yticks(np.linspace(0, 1, 6))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    tasks = f"{len(curve.tasks)} tasks × " if len(curve.tasks) > 1 else ""
    axes.set_xlabel("gradient updates")
    axes.set_ylabel(f"{curve.measure.axis}\n({tasks}{counted(curve.episodes, 'episode')} per seed)")
    axes.grid(True, color="#dddddd", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(color="#888888", labelsize=9)
    axes.legend(loc="best", fontsize=8.5, frameon=True, framealpha=0.9, edgecolor="none")
