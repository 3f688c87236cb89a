"""Renders comparisons: a table for the terminal, Markdown and LaTeX."""

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table

from experiments.reproduction.comparison import Row
from experiments.reproduction.suites import Suite

Cell = Callable[[Row], str]


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
    """The cells of each column; `changes` only where there are any."""
    found = {name: [cell(row) for row in rows] for name, cell in COLUMNS.items()}
    return found if any(found["changes"]) else {n: cells for n, cells in found.items() if n != "changes"}


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
    found += [f"`ours is` by this test: {test}" for test in dict.fromkeys(row.test for row in rows)]
    if any((row.preset, row.data) != ("paper", "official") for row in rows):
        found.append(
            "rows of another preset than `paper`, or on data that are not official, do not repeat the "
            "paper's experiment, so they confirm and refute nothing"
        )
    found += [f"the publication disagrees with itself: {each}" for each in suite.disagreements]
    found += [f"not in this table, because runs are not finished: {missing}"] if missing else []
    return found


_PROVENANCE = ("seeds x episodes", "updates", "preset", "data", "engine", "changes", "commit")


def terminal_table(suite: Suite, rows: Sequence[Row], missing: int) -> Table:
    """A table for `print_tables`; provenance that all rows share is told once, below it."""
    columns = shown(rows)
    shared = {name: columns[name][0] for name in _PROVENANCE if len(set(columns.get(name, []))) == 1}
    lines = notes(suite, rows, missing)
    if shared:
        lines.insert(0, f"all rows: {'; '.join(f'{name} {value}' for name, value in shared.items())}")
    title, caption = f"{suite.name}: {suite.title}", "\n".join(lines)
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    columns = {name: cells for name, cells in columns.items() if name not in shared}
    for name in columns:
        table.add_column(name, justify="right" if name in _NUMERIC else "left")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def markdown(suite: Suite, rows: Sequence[Row], missing: int) -> str:
    """The same as Markdown."""
    columns = shown(rows)
    rule = [" ---: " if name in _NUMERIC else " --- " for name in columns]
    lines = [f"## {suite.name}: {suite.title}", "", "| " + " | ".join(columns) + " |", f"|{'|'.join(rule)}|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") or " " for cell in cells) + " |"
        for cells in zip(*columns.values(), strict=True)
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(suite, rows, missing)), ""])


_LATEX_COLUMNS = ("environment", "task", "algorithm", "paper", "ours", "95% interval", "preset", "data")
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


def latex(suite: Suite, rows: Sequence[Row], missing: int) -> str:
    """A `tabular` for the package booktabs, below comments with the notes."""
    comments = [f"% {note}" for note in notes(suite, rows, missing)]
    kinds = "".join("r" if name in _NUMERIC else "l" for name in _LATEX_COLUMNS)
    head = " & ".join(map(latex_text, _LATEX_COLUMNS)) + r" \\"
    lines = [*comments, rf"\begin{{tabular}}{{{kinds}}}", r"\toprule", head, r"\midrule"]
    before = None
    for row in rows:
        if before not in (None, (row.env, row.task)):
            lines.append(r"\addlinespace")
        before = row.env, row.task
        lines.append(" & ".join(latex_text(COLUMNS[name](row)) for name in _LATEX_COLUMNS) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])
