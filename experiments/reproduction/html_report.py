"""A report as one HTML file: no network, sortable tables, learning curves as SVG, readable on a phone."""

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.reproduction.across import CAPTION, AcrossRow, across_columns, across_title
from experiments.reproduction.cells import Cell
from experiments.reproduction.comparison import Finished, Row
from experiments.reproduction.render import COLUMNS, Sheet, sheet
from experiments.reproduction.suites import Suite
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


class Section(NamedTuple):
    """One table or figure of a report, with the runs behind it.

    Attributes:
        keys: by which a column is sorted, where the cells' texts do not do; empty texts come last.
        details: what the pointer shows over each row.
        csv: the rows as the text of a CSV file, offered as a download.
        runs: finished cells with the names of their lines, drawn as one picture for each environment.
        across: statistics across tasks; may be empty.
        pictures: figures, drawn elsewhere.
    """

    suite: Suite
    sheet: Sheet
    keys: Mapping[str, Sequence[str]]
    details: Sequence[str]
    csv: str
    runs: Sequence[tuple[str, Finished]] = ()
    across: Sequence[AcrossRow] = ()
    pictures: Sequence[Picture] = ()


def runs_section(
    suite: Suite, rows: Sequence[Row], missing: int, runs: Sequence[Finished], csv: str, **more: Any
) -> Section:
    """The section of a suite whose numbers are those of runs; `more` are further fields."""
    names: Mapping[Cell, str] = more.pop("names", {})
    return Section(
        suite=suite,
        sheet=sheet(suite, rows, missing),
        keys={name: [str(key(row)) for row in rows] for name, key in _KEYS.items()},
        details=[f"{row.hardware}; {row.seconds:.0f} s; commit {row.commit}" for row in rows],
        csv=csv,
        runs=[(names.get(run.cell, suite.methods[run.cell.algo]), run) for run in runs],
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


def _section(section: Section) -> str:
    suite, columns = section.suite, section.sheet.columns
    head = "".join(f'<th><button type="button">{_text(name)}</button></th>' for name in columns)
    lines = [_line(section, i) for i in range(len(section.details))]
    listed = "".join(f"<li>{_text(note)}</li>" for note in section.sheet.notes)
    href = "data:text/csv;charset=utf-8," + _percent(section.csv)
    drawn = "\n".join(_picture(each, "drawn") for each in section.pictures)
    pictures = "\n".join(_pictures(section))
    return (
        f"<section>\n<h2>{_text(suite.name)}: {_text(suite.title)}</h2>\n"
        f'<p><a download="{_text(suite.name)}.csv" href="{href}">CSV, with hardware and time</a></p>\n{drawn}'
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        f"</table></div>\n<ul>{listed}</ul>\n{_across(section)}"
        f'<div class="pictures">\n{pictures}\n</div>\n</section>'
    )


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
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    lines = (
        "".join(f"<td>{_text(cell)}</td>" for cell in row) for row in zip(*columns.values(), strict=True)
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return (
        f"<h3>{_text(across_title(section.suite, section.across))}</h3>\n<p>{_text(CAPTION)}</p>\n"
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>\n'
    )


def _line(section: Section, index: int) -> str:
    """A line of the table; its title tells the rest of the provenance."""
    cells = []
    for name, texts in section.sheet.columns.items():
        text = texts[index]
        key = section.keys[name][index] if name in section.keys else text.removeprefix("-")
        mark = ""
        if name == "ours is":
            mark = f' class="{text if text in ("inside", "below", "above") else "other"}"'
        cells.append(f'<td data-key="{_text(key)}"{mark}>{_text(text)}</td>')
    return f'<tr title="{_text(section.details[index])}">{"".join(cells)}</tr>\n'


_KEYS = {
    "paper": lambda row: _key(row.paper),
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


def _pictures(section: Section) -> Iterable[str]:
    by_env: dict[str, list[tuple[str, Finished]]] = {}
    for name, run in section.runs:
        by_env.setdefault(run.cell.env, []).append((name, run))
    places = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in section.runs))}
    for env, named in by_env.items():
        yield _figure(env, named, places)


def _figure(env: str, named: Sequence[tuple[str, Finished]], places: Mapping[str, int]) -> str:
    """Learning curves of one environment: means over seeds and tasks with 95% intervals."""
    runs = [run for _, run in named]
    drawn, scale = [], 100.0 if runs[0].curve.measure is SUCCESS else 1.0
    for name, run in named:
        summaries = [summarise(scale * table, reps=1000).mean for table in run.curve.scores]
        ends = [(x.value, x.value) if math.isnan(x.low) else (x.low, x.high) for x in summaries]
        drawn.append((name, run, [x.value for x in summaries], ends))
    every = [end for *_, ends in drawn for pair in ends for end in pair]
    span = (0.0, 100.0) if scale == 100.0 else (min(0.0, *every), max(*every, 1.0))
    axes = _Axes(float(max(run.curve.steps[-1] for run in runs)), *span)
    parts, legend = list(_frame(axes)), []
    for name, run, means, ends in drawn:
        at = places[name]
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
    caption = f"{_text(env)}: {unit} by updates; {_text(kinds)} data, preset {_text(runs[0].cell.preset)}"
    label = _text(f"learning curves on {env}")
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
  td:first-child { white-space: normal; min-width: 8.5em; overflow-wrap: anywhere; }
  th, td { padding: 3px 6px; }
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
