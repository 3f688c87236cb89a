"""A report as one HTML file: no network, sortable tables, learning curves as SVG, readable on a phone."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.reproduction.across import CAPTION, AcrossRow, across_columns, across_title
from experiments.reproduction.comparison import Finished, Row
from experiments.reproduction.render import COLUMNS, notes, shown
from experiments.reproduction.suites import Suite
from mac.run.report.plot import COLOURS
from mac.run.report.score import SUCCESS
from mac.run.report.stats import summarise

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 8, 8, 24
_DASHES = ("", "6 3", "2 3")


class Section(NamedTuple):
    """One table of a report, with the runs behind it.

    Attributes:
        missing: entries whose runs are not finished.
        runs: finished cells, drawn as one picture for each environment.
        csv: the rows as the text of a CSV file, offered as a download.
        across: statistics across tasks; may be empty.
    """

    suite: Suite
    rows: Sequence[Row]
    missing: int
    runs: Sequence[Finished]
    csv: str
    across: Sequence[AcrossRow]


def page(sections: Sequence[Section], title: str) -> str:
    """The whole file."""
    body = "\n".join(_section(each) for each in sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{_text(title)}</h1>\n"
        f"{body}\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _text(value: str) -> str:
    return html.escape(value, quote=True)


def _section(section: Section) -> str:
    suite = section.suite
    columns = shown(section.rows)
    head = "".join(f'<th><button type="button">{_text(name)}</button></th>' for name in columns)
    lines = [_line(row, columns, i) for i, row in enumerate(section.rows)]
    listed = "".join(f"<li>{_text(note)}</li>" for note in notes(suite, section.rows, section.missing))
    href = "data:text/csv;charset=utf-8," + _percent(section.csv)
    pictures = "\n".join(_pictures(section))
    return (
        f"<section>\n<h2>{_text(suite.name)}: {_text(suite.title)}</h2>\n"
        f'<p><a download="{_text(suite.name)}.csv" href="{href}">CSV, with hardware and time</a></p>\n'
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{"".join(lines)}</tbody>\n'
        f"</table></div>\n<ul>{listed}</ul>\n{_across(section)}"
        f'<div class="pictures">\n{pictures}\n</div>\n</section>'
    )


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


def _line(row: Row, columns: Mapping[str, Sequence[str]], index: int) -> str:
    """A line of the table; its title tells the rest of the provenance."""
    where = f"{row.hardware}; {row.seconds:.0f} s; commit {row.commit}"
    kind = row.verdict.partition(",")[0] if row.verdict in ("inside", "below", "above") else "other"
    cells = []
    for name, texts in columns.items():
        value = _KEYS[name](row) if name in _KEYS else texts[index]
        mark = f' class="{kind}"' if name == "ours is" else ""
        cells.append(f'<td data-key="{_text(str(value))}"{mark}>{_text(texts[index])}</td>')
    return f'<tr title="{_text(where)}">{"".join(cells)}</tr>\n'


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
    by_env: dict[str, list[Finished]] = {}
    for run in section.runs:
        by_env.setdefault(run.cell.env, []).append(run)
    colours = {algo: i for i, algo in enumerate(dict.fromkeys(run.cell.algo for run in section.runs))}
    for env, runs in by_env.items():
        yield _figure(env, runs, section.suite, colours)


def _figure(env: str, runs: Sequence[Finished], suite: Suite, colours: Mapping[str, int]) -> str:
    """Learning curves of one environment: means over seeds and tasks with 95% intervals."""
    drawn, scale = [], 100.0 if runs[0].curve.measure is SUCCESS else 1.0
    for run in runs:
        summaries = [summarise(scale * table, reps=1000).mean for table in run.curve.scores]
        ends = [(x.value, x.value) if math.isnan(x.low) else (x.low, x.high) for x in summaries]
        drawn.append((run, [x.value for x in summaries], ends))
    every = [end for _, _, ends in drawn for pair in ends for end in pair]
    span = (0.0, 100.0) if scale == 100.0 else (min(0.0, *every), max(*every, 1.0))
    axes = _Axes(float(max(run.curve.steps[-1] for run in runs)), *span)
    parts, legend = list(_frame(axes)), []
    for run, means, ends in drawn:
        at = colours[run.cell.algo]
        colour, dash = COLOURS[at % len(COLOURS)], _DASHES[at // len(COLOURS) % len(_DASHES)]
        steps, name = run.curve.steps, suite.methods[run.cell.algo]
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
