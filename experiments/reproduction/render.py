"""Renders comparisons: a table for the terminal, Markdown and LaTeX."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from experiments.reproduction.comparison import Row
from experiments.reproduction.suites import JUDGED, Suite

Cell = Callable[[Row], str]


class Sheet(NamedTuple):
    """A table as text, for every format.

    Attributes:
        columns: the cells of each column, by its name.
        notes: lines below it.
        numeric: columns that are set to the right.
        shared: columns that are told once, outside the table, where all rows have the same; not in LaTeX.
        latex: columns of the LaTeX table.
        group: columns of the LaTeX table, from the first, that tell groups of rows apart.
    """

    title: str
    columns: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    numeric: Sequence[str]
    shared: Sequence[str]
    latex: Sequence[str]
    group: int = 2

    @property
    def common(self) -> dict[str, str]:
        """What all rows share, by the name of its column."""
        return {
            name: self.columns[name][0] for name in self.shared if len(set(self.columns.get(name, []))) == 1
        }

    @property
    def told(self) -> str:
        """The same as a line; empty where rows share nothing."""
        common = "; ".join(f"{name} {value}" for name, value in self.common.items())
        return f"all rows: {common}" if common else ""

    @property
    def differing(self) -> dict[str, Sequence[str]]:
        """The other columns."""
        return {name: cells for name, cells in self.columns.items() if name not in self.common}


def number(value: float, digits: int = 1) -> str:
    """A number with so many decimals; a dash for NaN."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def with_deviation(value: float, deviation: float, digits: int = 1) -> str:
    """`value ± deviation`, without the latter where there is none."""
    return number(value, digits) + ("" if math.isnan(deviation) else f" ± {number(deviation, digits)}")


def interval(low: float, high: float) -> str:
    """Both ends in words: a dash would look like a sign."""
    return "-" if math.isnan(low) else f"{number(low)} to {number(high)}"


COLUMNS: Mapping[str, Cell] = {
    "environment": lambda row: row.env,
    "task": lambda row: row.task,
    "setting": lambda row: row.setting,
    "algorithm": lambda row: row.method,
    "paper": lambda row: row.paper_text,
    "published": lambda row: row.paper_text,
    "ours": lambda row: with_deviation(row.value, row.deviation),
    "ours is": lambda row: row.verdict,
    "95% interval": lambda row: interval(row.low, row.high),
    "IQM": lambda row: number(row.iqm),
    "last 3": lambda row: number(row.late),
    "best": lambda row: number(row.best),
    "seeds x episodes": lambda row: f"{row.seeds} x {row.episodes}",
    "updates": lambda row: row.updates,
    "preset": lambda row: row.preset,
    "data": lambda row: row.data,
    "engine": lambda row: row.engine,
    "changes": lambda row: row.changes,
    "commit": lambda row: row.commit,
}
_NUMERIC = (
    "paper",
    "published",
    "ours",
    "95% interval",
    "IQM",
    "last 3",
    "best",
    "seeds x episodes",
    "updates",
)


def shown(suite: Suite, rows: Sequence[Row]) -> dict[str, list[str]]:
    """The cells of each column; `changes`, `setting` and published numbers only where there are any."""
    found = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    bare = [name for name in ("changes", "setting") if not any(found[name])]
    bare.append("published" if suite.of_paper else "paper")
    if all(math.isnan(row.paper) for row in rows):
        bare += ["paper", "published", "ours is"]
    return {name: cells for name, cells in found.items() if name not in bare}


def sheet(suite: Suite, rows: Sequence[Row], left_out: Sequence[str] = ()) -> Sheet:
    """The table of a suite whose numbers are those of runs; `left_out` are lines on what is missing."""
    columns = shown(suite, rows)
    latex_columns = [name for name in _LATEX_COLUMNS if name in columns]
    lines = [*notes(suite, rows), *left_out]
    return Sheet(f"{suite.name}: {suite.title}", columns, lines, _NUMERIC, _PROVENANCE, latex_columns)


def source_note(suite: Suite) -> str:
    """Line on where published numbers are from, and by which protocol."""
    label = "paper" if suite.of_paper else "source"
    return f"{label}: {'; '.join(filter(None, [suite.source, suite.protocol]))}"


UNKNOWN = "the numbers of the paper's figure are not known to this project: these are ours alone"


def notes(suite: Suite, rows: Sequence[Row]) -> list[str]:
    """Lines below a table: measure, deviations, tests and protocol."""
    unit = "success in percent" if suite.measure == "success" else suite.measure
    found = [
        f"{unit}: mean ± sample standard deviation, at the last evaluation; 95% intervals and IQM of a "
        "bootstrap over seeds, stratified by task; last 3: mean of the last three evaluations; best: that of "
        "the best evaluation, biased upwards",
        source_note(suite),
    ]
    pooled = dict.fromkeys(row.method for row in rows if row.deviation_over != "seeds")
    found += [f"deviations over tasks and seeds, as published: {', '.join(pooled)}"] if pooled else []
    tests = verdict_notes(rows)
    found += tests
    if not tests and suite.of_paper:
        found.append(UNKNOWN)
    if suite.of_paper and any((row.preset, row.data) != ("paper", "official") for row in rows):
        found.append(
            "rows of another preset than `paper`, or on data that are not official, do not repeat the "
            "paper's experiment, so they confirm and refute nothing"
        )
    return [*found, *(f"the publication disagrees with itself: {each}" for each in suite.disagreements)]


def verdict_notes(rows: Sequence[Row]) -> list[str]:
    """Lines on the tests behind `ours is`, and on the rows that each is for, where there are several."""
    judged = [row for row in rows if not math.isnan(row.paper)]
    tests = dict.fromkeys(row.test for row in judged)
    found = []
    for test in tests:
        which = f" of {_which(judged, [row for row in judged if row.test == test])}" if len(tests) > 1 else ""
        found.append(f"`ours is`{which} by this test: {test}")
    for name in list(JUDGED)[1:]:
        late = dict.fromkeys(row.method for row in judged if row.judged == name)
        if late:
            which = f"`ours is` of {', '.join(late)}"
            found.append(f"{which} compares our mean of the {name}, as the published numbers are such means")
    return found


def _which(rows: Sequence[Row], some: Sequence[Row]) -> str:
    """Names of some of the rows: algorithms, with environments where not all of the algorithm's are meant."""
    said = []
    for method in dict.fromkeys(row.method for row in some):
        own = [row.env for row in some if row.method == method]
        if len(own) == sum(row.method == method for row in rows):
            said.append(method)
        else:
            shown = ", ".join(own[:2]) + (f" and {len(own) - 2} more" if len(own) > 2 else "")
            said.append(f"{method} ({shown})")
    return ", ".join(said)


_PROVENANCE = ("seeds x episodes", "updates", "preset", "data", "engine", "changes", "commit")


def terminal_table(sheet: Sheet) -> Table:
    """A table for `print_tables`; provenance that all rows share is told once, below it."""
    caption = "\n".join(filter(None, [sheet.told, *sheet.notes]))
    table = Table(title=sheet.title, caption=caption, title_justify="left", caption_justify="left")
    columns = sheet.differing
    for name in columns:
        table.add_column(name, justify="right" if name in sheet.numeric else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def markdown(sheet: Sheet) -> str:
    """The same as Markdown; provenance that all rows share is told once, above the table."""
    columns = sheet.differing
    rule = [" ---: " if name in sheet.numeric else " --- " for name in columns]
    lines = [
        f"## {sheet.title}",
        "",
        *([sheet.told, ""] if sheet.told else []),
        "| " + " | ".join(columns) + " |",
        f"|{'|'.join(rule)}|",
    ]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in cells) + " |"
        for cells in zip(*columns.values(), strict=True)
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in sheet.notes), ""])


_LATEX_COLUMNS = (
    "environment", "task", "setting", "algorithm", "paper", "published", "ours", "95% interval",
    "preset", "data",
)  # fmt: skip
_LATEX_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\\": r"\textbackslash{}",
    "±": r"$\pm$",
    "é": r"\'e",
}


def latex_text(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(_LATEX_SPECIAL.get(c, c) for c in text)


def latex(sheet: Sheet) -> str:
    """A `tabular` for the package booktabs, below comments with the notes."""
    comments = [f"% {note}" for note in sheet.notes]
    kinds = "".join("r" if name in sheet.numeric else "l" for name in sheet.latex)
    head = " & ".join(map(latex_text, sheet.latex)) + r" \\"
    lines = [*comments, rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule"]
    every = list(zip(*(sheet.columns[name] for name in sheet.latex), strict=True))
    groups = [cells[: sheet.group] for cells in every]
    spaced = len(set(groups)) < len(every)  # groups of one row each need no space
    for i, cells in enumerate(every):
        if spaced and i and groups[i] != groups[i - 1]:
            lines.append(r"\addlinespace")
        lines.append(" & ".join(map(latex_text, cells)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
