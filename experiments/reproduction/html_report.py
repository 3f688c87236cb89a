"""A report as one HTML file: no network, sortable tables, learning curves as SVG, readable on a phone."""

import base64
import html
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reproduction.across import AcrossRow, across_columns, across_notes, across_title
from experiments.reproduction.cells import Cell, Plan
from experiments.reproduction.comparison import Finished, Row
from experiments.reproduction.figures import line_name, line_places
from experiments.reproduction.render import COLUMNS, Sheet
from experiments.reproduction.suites import Entry, Suite
from mac.run.report.plot import COLOURS
from mac.run.report.score import SUCCESS
from mac.run.report.stats import summarise

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 24
_DASHES = ("", "6 3", "2 3")


class Picture(NamedTuple):
    """A picture that the page holds.

    Attributes:
        kind: `png` or `gif`.
    """

    content: bytes
    kind: str
    caption: str


class Line(NamedTuple):
    """A line in a picture of learning curves; `place` chooses its colour."""

    name: str
    place: int
    run: Finished


class Panel(NamedTuple):
    """A picture of learning curves."""

    title: str
    lines: Sequence[Line]


def curve_panels(
    suite: Suite, entries: Sequence[Entry], finished: Mapping[Cell, Finished], plan: Plan
) -> list[Panel]:
    """Learning curves of finished cells: a picture for each environment and, in a figure, each setting.

    A figure of one line has all its settings in one picture. Lines have the colours that they have in the
    figure.
    """
    places, found = line_places(suite), dict[str, dict[Cell, Line]]()
    values = sorted({each.setting.value for each in suite.entries if each.setting})
    for entry in entries:
        for cell in plan.cells(entry):
            if cell not in finished:
                continue
            title, name = cell.env, line_name(suite, entry)
            line = Line(name, places[name], finished[cell])
            if entry.setting:
                setting = f"{suite.axis}: {entry.setting.value:g}"
                if len(places) > 1:
                    title = f"{title}, {setting}"
                else:
                    line = Line(setting, values.index(entry.setting.value), finished[cell])
            found.setdefault(title, {}).setdefault(cell, line)
    return [Panel(title, list(lines.values())) for title, lines in found.items()]


class Section(NamedTuple):
    """One table or figure of a report, with the runs behind it.

    Attributes:
        keys: by which a column is sorted, where the cells' texts do not do; empty texts come last.
        details: what the pointer shows over each row.
        csv: the rows as the text of a CSV file, offered as a download.
        panels: learning curves.
        across: statistics across tasks; may be empty.
        pictures: figures, drawn elsewhere.
    """

    suite: Suite
    sheet: Sheet
    keys: Mapping[str, Sequence[str]]
    details: Sequence[str]
    csv: str
    panels: Sequence[Panel] = ()
    across: Sequence[AcrossRow] = ()
    pictures: Sequence[Picture] = ()


def runs_section(suite: Suite, text: Sheet, rows: Sequence[Row], csv: str, **more: Any) -> Section:
    """The section of a suite whose numbers are those of runs; `more` are further fields."""
    return Section(
        suite=suite,
        sheet=text,
        keys={name: [str(key(row)) for row in rows] for name, key in _KEYS.items()},
        details=[f"{row.hardware}; {row.seconds:.0f} s; commit {row.commit}" for row in rows],
        csv=csv,
        **more,
    )


def page(sections: Sequence[Section], title: str, films: Sequence[Picture] = ()) -> str:
    """The whole file."""
    body = "\n".join(_section(each) for each in sections)
    if films:
        shown = "\n".join(_picture(film, "film") for film in films)
        body += f'\n<section>\n<h2>Films</h2>\n<div class="pictures">\n{shown}\n</div>\n</section>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f"{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _note(line: str) -> str:
    """A line of notes; what is between backticks is code."""
    return re.sub("`([^`]*)`", r"<code>\1</code>", _text(line))


def _list(notes: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{_note(note)}</li>' for note in notes)}</ul>\n"


def _section(section: Section) -> str:
    suite, text = section.suite, section.sheet
    href = "data:text/csv;charset=utf-8," + _percent(section.csv)
    drawn = "\n".join(_picture(each, "drawn") for each in section.pictures)
    pictures = "\n".join(map(_figure, section.panels))
    table = _table(text.differing, text.numeric, section.keys, section.details)
    return (
        f"<section>\n<h2>{_text(text.title)}</h2>\n"
        f'<p><a download="{_text(suite.name)}.csv" href="{href}">CSV, with hardware and time</a></p>\n{drawn}'
        f"<p>{_note(text.told)}</p>\n{table}{_list(text.notes)}{_across(section)}"
        f'<div class="pictures">\n{pictures}\n</div>\n</section>'
    )


def _table(
    columns: Mapping[str, Sequence[str]],
    numeric: Sequence[str],
    keys: Mapping[str, Sequence[str]],
    details: Sequence[str] = (),
) -> str:
    """A table that a click sorts.

    Args:
        numeric: columns that are set to the right.
        keys: by which columns are sorted, as in `Section`.
        details: what the pointer shows over each row.
    """
    tasks = columns.get("task", ())
    told = {name: cells for name, cells in columns.items() if name != "task" or "environment" not in columns}
    marks = {name: ' class="number"' * (name in numeric) for name in told} | {"changes": ' class="long"'}
    head = "".join(f'<th{marks[name]}><button type="button">{_text(name)}</button></th>' for name in told)
    lines = []
    for i, cells in enumerate(zip(*told.values(), strict=True)):
        line = ""
        for name, cell in zip(told, cells, strict=True):
            key = keys[name][i] if name in keys else cell.removeprefix("-")
            shown, mark = _text(cell), marks[name]
            if name == "ours is":
                mark = f' class="{cell if cell in ("inside", "below", "above") else "other"}"'
            elif name == "environment" and tasks:
                key += f" {tasks[i]}"
                shown += _task(cell, tasks[i])
            line += f'<td data-key="{_text(key)}"{mark}>{shown}</td>'
        title = f' title="{_text(details[i])}"' if details else ""
        lines.append(f"<tr{title}>{line}</tr>\n")
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        "</table></div>\n"
    )


def _task(env: str, task: str) -> str:
    """What a cell has after an environment's name: the task, unless the name says it."""
    if f"-task{task}-" in env:
        return ""
    return f' <span class="task">{"all tasks" if task == "all" else f"task {_text(task)}"}</span>'


def _picture(picture: Picture, kind: str) -> str:
    """A picture with its caption; `kind` is its class."""
    source = f"data:image/{picture.kind};base64,{base64.b64encode(picture.content).decode()}"
    image = f'<img src="{source}" alt="{_text(picture.caption)}">'
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>"
    return f'<figure class="{kind}"><div class="wide">{image}</div>{caption}</figure>\n'


def _across(section: Section) -> str:
    """The table across tasks; empty without one."""
    if not section.across:
        return ""
    columns = across_columns(section.suite, section.across)
    numeric = [name for name in columns if name not in ("algorithm", "data")]
    keys = {name: [cell.partition(" ")[0].removeprefix("-") for cell in columns[name]] for name in numeric}
    return (
        f"<h3>{_text(across_title(section.suite, section.across))}</h3>\n"
        f"{_table(columns, numeric, keys)}{_list(across_notes(section.across))}"
    )


_KEYS = {
    "paper": lambda row: _key(row.paper),
    "published": lambda row: _key(row.paper),
    "ours": lambda row: _key(row.value),
    "95% interval": lambda row: _key(row.low),
    "IQM": lambda row: _key(row.iqm),
    "last 3": lambda row: _key(row.late),
    "best": lambda row: _key(row.best),
    "seeds x episodes": lambda row: row.seeds * row.episodes,
    "updates": lambda row: row.updates.partition(" ")[0],
}
"""Numbers by which a column is sorted; others are sorted as text."""
assert set(_KEYS) < set(COLUMNS)


def _key(value: float) -> str:
    return "" if math.isnan(value) else repr(value)


def _percent(text: str) -> str:
    """A text within a data address."""
    plain = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.~,")
    return "".join(chr(byte) if chr(byte) in plain else f"%{byte:02X}" for byte in text.encode())


# Learning curves.


class _Axes(NamedTuple):
    """Ranges of a picture: updates from 0, scores between two ends."""

    steps: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * step / self.steps

    def y(self, score: float) -> float:
        return _TOP + (HEIGHT - _TOP - _BOTTOM) * (self.high - score) / (self.high - self.low)


def _figure(panel: Panel) -> str:
    """Learning curves of one environment: means over seeds and tasks with 95% intervals."""
    runs = [run for *_, run in panel.lines]
    drawn, scale = [], 100.0 if runs[0].curve.measure is SUCCESS else 1.0
    for line in panel.lines:
        run = line.run
        summaries = [summarise(scale * table, reps=1000).mean for table in run.curve.scores]
        ends = [(x.value, x.value) if math.isnan(x.low) else (x.low, x.high) for x in summaries]
        drawn.append((line, [x.value for x in summaries], ends))
    every = [end for *_, ends in drawn for pair in ends for end in pair]
    span = (0.0, 100.0) if scale == 100.0 else (min(0.0, *every), max(*every, 1.0))
    axes = _Axes(float(max(run.curve.steps[-1] for run in runs)), *span)
    parts, legend = list(_frame(axes)), []
    for (name, at, run), means, ends in drawn:
        colour, dash = COLOURS[at % len(COLOURS)], _DASHES[at // len(COLOURS) % len(_DASHES)]
        steps = run.curve.steps
        upper = [(step, high) for step, (_, high) in zip(steps, ends, strict=True)]
        lower = [(step, low) for step, (low, _) in zip(steps, ends, strict=True)]
        band = _points(axes, [*upper, *reversed(lower)])
        parts.append(f'<polygon points="{band}" fill="{colour}" fill-opacity="0.13"/>')
        line = _points(axes, zip(steps, means, strict=True))
        dots = "".join(
            f'<circle cx="{axes.x(step):.1f}" cy="{axes.y(mean):.1f}" r="2.4" fill="{colour}">'
            f"<title>{_text(name)}: {mean:.1f} at {step:,}</title></circle>"
            for step, mean in zip(steps, means, strict=True)
        )
        style = f'fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{line}" {style}/>{dots}')
        sample = f'<svg class="sample" viewBox="0 0 24 8"><path d="M0 4H24" {style}/></svg>'
        legend.append(f'<span style="color:{colour}">{sample} {_text(name)}</span>')
    unit = "success in percent" if scale == 100.0 else runs[0].curve.measure.axis
    kinds = ", ".join(dict.fromkeys(kind for run in runs for kind in run.kinds))
    caption = (
        f"{_text(panel.title)}: {unit} by updates; {_text(kinds)} data, preset {_text(runs[0].cell.preset)}"
    )
    label = _text(f"learning curves on {panel.title}")
    return (
        f'<figure><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        f"<figcaption>{caption}<br>{' '.join(legend)}</figcaption></figure>"
    )


def _points(axes: _Axes, pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{axes.x(step):.1f},{axes.y(score):.1f}" for step, score in pairs)


def _frame(axes: _Axes) -> Iterable[str]:
    """Grid lines and the numbers at both axes."""
    for score in np.linspace(axes.low, axes.high, 5):
        y = axes.y(float(score))
        yield f'<line x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        yield f'<text x="{_LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{score:.0f}</text>'
    anchors = ("start", "middle", "end")
    for step, anchor in zip((0.0, axes.steps / 2, axes.steps), anchors, strict=True):
        yield f'<text x="{axes.x(step):.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">{step:,.0f}</text>'


_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1320px; padding: 12px; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 9px; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap; }
.number { text-align: right; } .task { opacity: 0.7; } td.long { white-space: normal; min-width: 11em; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.inside { color: #2e8b57; font-weight: 600; } .below, .above { color: #c2571a; }
ul { font-size: 13px; padding-left: 1.2rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); }
.pictures { gap: 14px; margin-top: 1.5rem; }
.sample { width: 24px; height: 8px; }
@media (max-width: 600px) {
  th, td { padding: 3px 5px; }
  td:not(.number) { white-space: normal; overflow-wrap: anywhere; min-width: 4.5em; }
  td:first-child { font-size: 11px; line-height: 1.25; min-width: 8.5em; }
}
figure { margin: 0; } figcaption { font-size: 12.5px; overflow-wrap: anywhere; }
figcaption span { white-space: nowrap; margin-right: 8px; }
figure > svg { width: 100%; height: auto; } svg text { font: 10px sans-serif; fill: currentColor; }
.drawn img { max-width: 100%; height: auto; background: white; } .film img { width: 100%; height: auto; }
@media (max-width: 600px) { .drawn img { max-width: none; width: 640px; } }
.grid { stroke: currentColor; stroke-opacity: 0.18; }
"""

_SCRIPT = """
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0];
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = (row) => row.cells[head.cellIndex].dataset.key;
    const compare = (a, b) => {
      const x = key(a), y = key(b);
      if (x === "" || y === "") return (x === "") - (y === "");
      const difference = Number(x) - Number(y);
      const order = Number.isNaN(difference) ? x.localeCompare(y, "en", { numeric: true }) : difference;
      return up ? order : -order;
    };
    body.append(...[...body.rows].sort(compare));
  });
}
"""
