"""Reports: comparisons of suites as files, one page with all of them, and tables for the terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from experiments.benchmarks.harness import write_csv
from experiments.model_error_study.figures import draw_chunks, draw_policies
from experiments.model_error_study.rows import ChunkRow, PolicyRow
from experiments.reproduction.across import across, across_table
from experiments.reproduction.cells import Plan
from experiments.reproduction.comparison import Comparison, Finished, compare
from experiments.reproduction.figures import draw_bars, draw_settings
from experiments.reproduction.films import films
from experiments.reproduction.html_report import Picture, Section, curve_panels, page, runs_section
from experiments.reproduction.model_errors import (
    error_columns,
    error_rows,
    policy_file,
    read_errors,
    study_cell,
    study_file,
)
from experiments.reproduction.render import (
    UNKNOWN,
    Sheet,
    latex,
    markdown,
    sheet,
    source_note,
    terminal_table,
)
from experiments.reproduction.suites import Entry, Suite
from experiments.reproduction.times import time_rows, time_sheet
from mac.atomic_files import replace_file, writing
from mac.run.report.table import print_tables

FOLDER = "report"


class Report(NamedTuple):
    """What one suite leaves.

    Attributes:
        tables: for the terminal.
        finished: runs behind it.
    """

    section: Section
    tables: list[Table]
    paths: list[Path]
    finished: list[Finished]


def write_reports(
    chosen: Sequence[tuple[Suite, list[Entry]]], plan: Plan, command: Sequence[str]
) -> list[Path]:
    """Writes the reports of suites and one page with all of them; prints their tables.

    Returns the files; none if no number is complete.

    Raises:
        UserError: a file of a run is damaged, or one cannot be written.
    """
    found = list[Report]()
    chosen = [(suite._replace(title=suite.title + plan.told), entries) for suite, entries in chosen]
    compared = {suite.name: compare(suite, entries, plan) for suite, entries in chosen if suite.of_runs}
    for suite, entries in chosen:
        if suite.of_runs:
            report = _runs(suite, entries, compared[suite.name], plan, command)
        else:
            report = (_times if suite.kind == "time" else _errors)(suite, entries, plan, command)
        if report is None:
            print(f"{suite.name}: no number is complete yet")
            continue
        print_tables(*report.tables)
        found.append(report)
    if not found:
        return []
    runs = list({run.cell: run for report in found for run in report.finished}.values())
    shown = films(runs, plan)
    for path in shown.left_out:
        print(f"note: the page has no room for {path}")
    suites = [report.section.suite for report in found]
    names = [suite.name for suite in suites]
    path = plan.out / FOLDER / f"{'_'.join(names)}_{_ending(plan, *suites)}.html"
    presets = ", ".join(dict.fromkeys(_preset(plan, suite) for suite in suites))
    beside = ": this project and the paper" if all(suite.of_paper for suite in suites) else ""
    title = f"{', '.join(names)}{beside}, preset {presets}{plan.told}"
    write_text(path, page([report.section for report in found], title, shown.pictures))
    return [*(each for report in found for each in report.paths), path]


def _preset(plan: Plan, suite: Suite) -> str:
    return plan.time_preset if suite.kind == "time" else plan.preset


def _ending(plan: Plan, *suites: Suite) -> str:
    """Sizes and selection in the names of files; times are of one seed, however many are asked for."""
    sizes = (_preset(plan, each) + ("" if each.kind == "time" else f"_s{plan.seeds}") for each in suites)
    return "_".join(filter(None, [*dict.fromkeys(sizes), plan.selection]))


def _path(suite: Suite, plan: Plan, suffix: str) -> Path:
    return plan.out / FOLDER / f"{suite.name}_{_ending(plan, suite)}{suffix}"


def _files(
    suite: Suite, text: Sheet, rows: Sequence[Any], plan: Plan, command: Sequence[str]
) -> tuple[list[Path], str]:
    """Writes rows as CSV, Markdown and LaTeX; returns the files and the CSV's text."""
    paths = [_path(suite, plan, suffix) for suffix in (".csv", ".md", ".tex")]
    write_csv(paths[0], rows, command)
    write_text(paths[1], markdown(text))
    write_text(paths[2], latex(text))
    return paths, paths[0].read_text(encoding="utf-8")


# Suites whose numbers are those of runs.


def _runs(
    suite: Suite, entries: Sequence[Entry], compared: Comparison, plan: Plan, command: Sequence[str]
) -> Report | None:
    if not compared.rows:
        return None
    finished = list(compared.finished.values())
    text = sheet(suite, compared.rows, compared.left_out)
    paths, table = _files(suite, text, compared.rows, plan, command)
    tables, statistics = [terminal_table(text)], []
    if suite.kind == "table":
        runs = {run for entry in entries for run in entry.runs}
        statistics = across(suite, compared.finished, len(runs))
    csv = _path(suite, plan, "_across.csv")
    if statistics:
        tables.append(across_table(suite, statistics))
        paths.append(csv)
        write_csv(csv, statistics, command)
    else:
        with writing(csv):
            csv.unlink(missing_ok=True)  # of an earlier report
    drawn = _drawings(suite, entries, compared, plan)
    paths += [path for path, _ in drawn]
    pictures = [Picture(path.read_bytes(), "png", caption) for path, caption in drawn]
    panels = curve_panels(suite, entries, compared.finished, plan)
    section = runs_section(
        suite, text, compared.rows, table, across=statistics, pictures=pictures, panels=panels
    )
    return Report(section, tables, paths, finished)


def _drawings(
    suite: Suite, entries: Sequence[Entry], compared: Comparison, plan: Plan
) -> list[tuple[Path, str]]:
    """Draws the figures of a suite; returns files with captions."""
    drawn = []
    if suite.picture == "bars":
        drawn.append((_path(suite, plan, ".png"), f"{suite.name} as bars"))
        draw_bars(suite, compared.rows, drawn[-1][0])
    if suite.kind == "curve":
        done = [entry for entry in entries if entry not in compared.missing]
        drawn.append((_path(suite, plan, ".png"), f"{suite.name}: by {suite.axis}"))
        draw_settings(suite, list(zip(done, compared.rows, strict=True)), drawn[-1][0])
    if suite.errors_at:
        found = [policy_file(cell, plan, suite.errors_at) for cell in compared.finished]
        read = [read_errors(path, PolicyRow) for path in found if path.exists()]
        for env in dict.fromkeys(each.rows[0].env for each in read):
            rows = [row for each in read for row in each.rows if row.env == env]
            path = _path(suite, plan, f"_error_{env.replace('/', '-')}.png")
            title = f"{suite.name}: success and model error, {env} ({plan.preset})"
            draw_policies(rows, path, title=title, data=rows[0].data)
            drawn.append((path, f"{suite.name}: success against model error on {env}"))
    return drawn


# Times and model errors.


def _times(suite: Suite, entries: Sequence[Entry], plan: Plan, command: Sequence[str]) -> Report | None:
    rows, missing = time_rows(suite, entries, plan)
    if not rows:
        return None
    text = time_sheet(suite, rows, len(missing), plan)
    paths, table = _files(suite, text, rows, plan, command)
    details = [f"{row.hardware}; {row.date}; peak memory {row.peak_mb:,.0f} MB" for row in rows]
    section = Section(suite, text, {}, details, table)
    return Report(section, [terminal_table(text)], paths, [])


def _errors(suite: Suite, entries: Sequence[Entry], plan: Plan, command: Sequence[str]) -> Report | None:
    files = {entry: study_file(study_cell(suite, entry, plan), plan) for entry in entries}
    pairs = [(entry, read_errors(path, ChunkRow)) for entry, path in files.items() if path.exists()]
    if not pairs:
        return None
    ends = error_rows(suite, pairs, plan.preset)
    columns = error_columns(ends)
    notes = [
        "mean squared error of the normalised state, open loop along held-out trajectories, at the last step",
        source_note(suite),
    ]
    notes += [UNKNOWN] if suite.of_paper else []
    missing = len(files) - len(pairs)
    notes += [f"not in this figure, because not trained: {missing}"] if missing else []
    plain = ("environment", "setting", "preset", "data", "commit")
    numeric = [name for name in columns if name not in plain]
    shared = ("steps", "seeds", "updates", "preset", "data", "commit")
    kept = ("environment", "setting", "error", "95% over seeds", "95% over episodes", "preset")
    text = Sheet(f"{suite.name}: {suite.title}", columns, notes, numeric, shared, kept, group=1)
    every = [row for _, read in pairs for row in read.rows]
    paths, table = _files(suite, text, every, plan, command)
    for env in dict.fromkeys(entry.env for entry, _ in pairs):
        here = [read for entry, read in pairs if entry.env == env]
        path = _path(suite, plan, f"_{env}.png")
        title = f"{suite.name}: dynamics models of {env} ({plan.preset}, {here[0].rows[0].seeds} seeds)"
        rows = [row for read in here for row in read.rows]
        draw_chunks(rows, path, title=title, data=here[0].head.get("data", ""))
        paths.append(path)
    pictures = [
        Picture(p.read_bytes(), "png", f"{suite.name}: {suite.title}") for p in paths if p.suffix == ".png"
    ]
    details = [f"{row.hardware}; {row.date}" for row in ends]
    section = Section(suite, text, {}, details, table, pictures=pictures)
    return Report(section, [terminal_table(text)], paths, [])


def write_text(path: Path, text: str) -> None:
    """Writes a file in one go.

    Raises:
        UserError: it cannot be written.
    """
    replace_file(path, lambda file: file.write(text.encode()))
