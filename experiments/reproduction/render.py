"""Renders comparisons: a table for the terminal, Markdown and LaTeX."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rich.table import Table

from experiments.reproduction.comparison import Row
from experiments.reproduction.suites import Suite

Cell = Callable[[Row], str]


class Sheet(NamedTuple):
    """A table as text, for every format.

    Attributes:
        columns: the cells of each column, by its name.
        notes: lines below it.
        numeric: columns that are set to the right.
        shared: columns that the terminal tells once below the table where all rows have the same.
        latex: columns of the LaTeX table; the first two tell groups of rows apart.
    """

    title: str
    columns: Mapping[str, Sequence[str]]
    notes: Sequence[str]
    numeric: Sequence[str]
    shared: Sequence[str]
    latex: Sequence[str]


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
    "paper": lambda row: with_deviation(row.paper, row.paper_deviation, 0),
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
_NUMERIC = ("paper", "ours", "95% interval", "IQM", "last 3", "best", "seeds x episodes", "updates")


def shown(rows: Sequence[Row]) -> dict[str, list[str]]:
    """The cells of each column; `changes` and `setting` only where there are any, and the paper's numbers."""
    found = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    bare = [name for name in ("changes", "setting") if not any(found[name])]
    if all(math.isnan(row.paper) for row in rows):
        bare += ["paper", "ours is"]
    return {name: cells for name, cells in found.items() if name not in bare}


def sheet(suite: Suite, rows: Sequence[Row], missing: int) -> Sheet:
    """The table of a suite whose numbers are those of runs."""
    columns = shown(rows)
    latex_columns = [name for name in _LATEX_COLUMNS if name in columns]
    lines = notes(suite, rows, missing)
    return Sheet(f"{suite.name}: {suite.title}", columns, lines, _NUMERIC, _PROVENANCE, latex_columns)


def notes(suite: Suite, rows: Sequence[Row], missing: int) -> list[str]:
    """Lines below a table: measure, deviations, tests, protocol, and what is not in it."""
    unit = "success in percent" if suite.measure == "success" else suite.measure
    found = [
        f"{unit}: mean ± sample standard deviation, at the last evaluation; 95% intervals and IQM of a "
        "bootstrap over seeds, stratified by task; last 3: mean of the last three evaluations; best: that of "
        "the best evaluation, biased upwards",
        f"paper: {suite.source}; {suite.protocol}",
    ]
    pooled = dict.fromkeys(row.method for row in rows if row.deviation_over != "seeds")
    found += [f"deviations over tasks and seeds, as in the paper: {', '.join(pooled)}"] if pooled else []
    tests = dict.fromkeys(row.test for row in rows if not math.isnan(row.paper))
    found += [f"`ours is` by this test: {test}" for test in tests]
    if not tests:
        found.append("the numbers of the paper's figure are not known to this project: these are ours alone")
    if any((row.preset, row.data) != ("paper", "official") for row in rows):
        found.append(
            "rows of another preset than `paper`, or on data that are not official, do not repeat the "
            "paper's experiment, so they confirm and refute nothing"
        )
    found += [f"the publication disagrees with itself: {each}" for each in suite.disagreements]
    found += [f"not in this table, because runs are not finished: {missing}"] if missing else []
    return found


_PROVENANCE = ("seeds x episodes", "updates", "preset", "data", "engine", "changes", "commit")


def terminal_table(sheet: Sheet) -> Table:
    """A table for `print_tables`; provenance that all rows share is told once, below it."""
    columns, lines = sheet.columns, list(sheet.notes)
    shared = {name: columns[name][0] for name in sheet.shared if len(set(columns.get(name, []))) == 1}
    if shared:
        lines.insert(0, f"all rows: {'; '.join(f'{name} {value}' for name, value in shared.items())}")
    caption = "\n".join(lines)
    table = Table(title=sheet.title, caption=caption, title_justify="left", caption_justify="left")
    columns = {name: cells for name, cells in columns.items() if name not in shared}
    for name in columns:
        table.add_column(name, justify="right" if name in sheet.numeric else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def markdown(sheet: Sheet) -> str:
    """The same as Markdown."""
    columns = sheet.columns
    rule = [" ---: " if name in sheet.numeric else " --- " for name in columns]
    lines = [f"## {sheet.title}", "", "| " + " | ".join(columns) + " |", f"|{'|'.join(rule)}|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in cells) + " |"
        for cells in zip(*columns.values(), strict=True)
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in sheet.notes), ""])


_LATEX_COLUMNS = (
    "environment", "task", "setting", "algorithm", "paper", "ours", "95% interval", "preset", "data",
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
    before = None
    for cells in zip(*(sheet.columns[name] for name in sheet.latex), strict=True):
        if before not in (None, cells[:2]):
            lines.append(r"\addlinespace")
        before = cells[:2]
        lines.append(" & ".join(map(latex_text, cells)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
