"""Figures of reports: success by a setting, and tables as bars, ours beside the paper's."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.model_error_study.figures import dress, new_figure, save
from experiments.reproduction.comparison import Row
from experiments.reproduction.suites import Entry, Suite
from mac.run.report.plot import COLOURS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL = 4.6
"""Width of a panel in inches."""


def line_name(suite: Suite, entry: Entry) -> str:
    """Name of the line that a number is on, in a figure and in learning curves."""
    line = entry.setting.line if entry.setting else ""
    if not line:
        return entry.method
    return line if len(suite.methods) == 1 else f"{entry.method}, {line}"


def line_places(suite: Suite) -> dict[str, int]:
    """Places of all lines by name, in the suite's order; each chooses a colour for all pictures."""
    ordered = (each for algo in suite.methods for each in suite.entries if each.algo == algo)
    return {name: i for i, name in enumerate(dict.fromkeys(line_name(suite, each) for each in ordered))}


def draw_settings(suite: Suite, pairs: Sequence[tuple[Entry, Row]], path: Path) -> None:
    """Draws numbers by a setting, a panel for each environment; bars are 95% intervals over seeds.

    Settings are evenly spaced, as most of them grow by factors.

    Raises:
        UserError: `path` cannot be written.
    """
    envs = list(dict.fromkeys(entry.env for entry, _ in pairs))
    figure = new_figure(wide=max(6.4, PANEL * len(envs)))
    panels = figure.subplots(1, len(envs), squeeze=False)[0]
    for axes, env in zip(panels, envs, strict=True):
        here = [(entry, row) for entry, row in pairs if entry.env == env]
        _lines(axes, suite, here)
        axes.set_title(env, fontsize=9, loc="left")
        axes.set_xlabel(suite.axis)
    panels[0].set_ylabel(_unit(suite))
    _legend(figure, panels, list(line_places(suite)))
    dress(figure, panels, _title(suite, [row for _, row in pairs]), _data(pairs[0][1]))
    save(figure, path)


def _legend(figure: "Figure", panels: Iterable["Axes"], names: Sequence[str]) -> None:
    """Names the lines of all panels beside them, where there is more than one name."""
    handles = dict[str, Any]()
    for axes in panels:
        lines, labels = axes.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    shown = [name for name in names if name in handles]
    if len(names) > 1:
        lines = [handles[name] for name in shown]
        figure.legend(lines, shown, loc="outside right upper", fontsize=8.5, frameon=False)


def _lines(axes: "Axes", suite: Suite, pairs: Sequence[tuple[Entry, Row]]) -> None:
    values = sorted({entry.setting.value for entry in suite.entries if entry.setting is not None})
    by_line: dict[str, list[tuple[int, Row]]] = {}
    for entry, row in pairs:
        assert entry.setting is not None
        place = values.index(entry.setting.value)
        by_line.setdefault(line_name(suite, entry), []).append((place, row))
    places = line_places(suite)
    for name, points in by_line.items():
        i = places[name]
        points.sort(key=lambda point: point[0])
        rows = [row for _, row in points]
        x, y = [place + 0.04 * i for place, _ in points], [row.value for row in rows]
        colour = COLOURS[i % len(COLOURS)]
        axes.errorbar(x, y, yerr=_arms(rows), fmt="o-", color=colour, ms=5, lw=1.6, capsize=3, label=name)
    axes.set_xticks(range(len(values)), [f"{value:g}" for value in values])
    axes.set_xlim(-0.4, len(values) - 0.6)
    if suite.measure == "success":
        axes.set_ylim(-3, 103)


def draw_bars(suite: Suite, rows: Sequence[Row], path: Path) -> None:
    """Draws a table as bars: ours with 95% intervals over seeds, the paper's as marks with its deviations.

    Raises:
        UserError: `path` cannot be written.
    """
    groups = list(dict.fromkeys((row.env, row.task) for row in rows))
    methods = [name for name in suite.methods.values() if any(row.method == name for row in rows)]
    figure = new_figure(wide=max(6.4, 2.0 * len(groups)))
    axes, width = figure.subplots(), 0.8 / len(methods)
    places = line_places(suite)
    for i, method in enumerate(methods):
        own = [row for row in rows if row.method == method]
        x = [groups.index((row.env, row.task)) + (i - (len(methods) - 1) / 2) * width for row in own]
        colour = COLOURS[places[method] % len(COLOURS)]
        axes.bar(x, [row.value for row in own], 0.92 * width, color=colour, alpha=0.75, label=method)
        axes.errorbar(x, [row.value for row in own], yerr=_arms(own), fmt="none", ecolor="#222222", lw=1.4)
        at = [place + 0.22 * width for place in x]
        spread = [0.0 if math.isnan(row.paper_deviation) else row.paper_deviation for row in own]
        axes.errorbar(
            at, [row.paper for row in own], yerr=spread, fmt="D", ms=5, mfc="white", color=GREY, lw=1,
            label="published, with deviation" if method == methods[-1] else None,
        )  # fmt: skip
    if suite.measure == "success":
        axes.set_ylim(0, 103)
    labels = [f"{_family(env)}\ntask {task}" for env, task in groups]
    axes.set_xticks(range(len(groups)), labels)
    axes.set_ylabel(_unit(suite))
    axes.legend(fontsize=8.5, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=4)
    dress(figure, (axes,), _title(suite, rows), _data(rows[0]))
    save(figure, path)


def _family(env: str) -> str:
    return env.partition("-play")[0].partition("-navigate")[0]


def _arms(rows: Sequence[Row]) -> list[list[float]]:
    """Lengths of the arms of error bars, 0 without an interval."""
    low = [0.0 if math.isnan(row.low) else max(0.0, row.value - row.low) for row in rows]
    high = [0.0 if math.isnan(row.high) else max(0.0, row.high - row.value) for row in rows]
    return [low, high]


def _unit(suite: Suite) -> str:
    unit = "success in percent" if suite.measure == "success" else suite.measure
    return f"{unit}\n(bars: 95% over seeds)"


def _title(suite: Suite, rows: Sequence[Row]) -> str:
    seeds = sorted({row.seeds for row in rows})
    told = " to ".join(str(each) for each in dict.fromkeys((seeds[0], seeds[-1])))
    return f"{suite.name}: {suite.title} ({rows[0].preset}, {told} seeds)"


def _data(row: Row) -> str:
    return f"{row.data}, engine {row.engine}"
