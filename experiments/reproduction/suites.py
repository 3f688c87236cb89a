"""Suites: published numbers of a table, and the runs that each of them needs, as data in `suites/*.toml`."""

import difflib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from envs_mjx.registry import parse
from mac.atomic_files import misfit, visible
from mac.errors import UserError, one_line, unknown_name
from mac.run.report.score import MEASURES

SUITES = Path(__file__).parents[1] / "suites"
Over = Literal["seeds", "tasks and seeds"]
OVER: tuple[Over, ...] = ("seeds", "tasks and seeds")
AGGREGATES = ("mean", "sum")
ALL = "all"
_HEAD = ("title", "source", "measure", "protocol", "disagreements", "methods", "deviation", "row")
_ROW = ("env", "runs", "task", "aggregate", "published")


class Published(NamedTuple):
    """A number as a table prints it, in percent of success or as a normalised score.

    Attributes:
        deviation: sample standard deviation (n - 1); None where none is printed.
        over: values that it is the deviation of: each seed's mean over tasks, or all tasks and seeds pooled.
    """

    mean: float
    deviation: float | None
    over: Over


class Entry(NamedTuple):
    """One number of a table.

    Attributes:
        env: the environment's name in the table.
        runs: environments, as `--env` takes them, whose runs the number needs.
        task: the only task that counts; None for all tasks of all runs.
        aggregate: `mean` or `sum` over tasks.
        method: the algorithm's name in the table.
    """

    env: str
    runs: tuple[str, ...]
    task: int | None
    aggregate: str
    algo: str
    method: str
    published: Published


class Suite(NamedTuple):
    """One table.

    Attributes:
        name: what the command line calls it.
        measure: `success`, `score` or `return`.
        protocol: seeds, episodes and updates behind the published numbers.
        disagreements: places where the publication disagrees with itself.
        methods: the table's name of each algorithm.
    """

    name: str
    title: str
    source: str
    measure: str
    protocol: str
    disagreements: tuple[str, ...]
    methods: dict[str, str]
    entries: tuple[Entry, ...]


def suite_names() -> list[str]:
    """Names of the suites of this project, `table2` before `table12`."""
    found = [path.stem for path in visible(SUITES, "*.toml")]
    return sorted(found, key=lambda name: (_number(name), name))


def _number(name: str) -> int:
    digits = "".join(each for each in name.partition("_")[0] if each.isdigit())
    return int(digits or 0)


def load_suite(name: str) -> Suite:
    """The suite called `name`, or that of a file of one's own.

    Raises:
        UserError: there is none, or its file holds no suite.
    """
    if name.endswith(".toml"):
        return read_suite(Path(name))
    if name not in (known := suite_names()):
        raise unknown_name("suite", name, known)
    return read_suite(SUITES / f"{name}.toml")


def read_suite(path: Path) -> Suite:
    """Reads a file of a suite.

    Raises:
        UserError: it is not TOML, or misses, misspells or mistypes a value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    _known_keys(content, _HEAD, str(path))
    content = {"disagreements": [], "deviation": {}, "protocol": ""} | content
    texts = dict.fromkeys(("title", "source", "measure", "protocol"), str)
    kinds = texts | {"disagreements": list, "methods": dict, "deviation": dict, "row": list}
    if fault := misfit(content, **kinds):
        raise UserError(f"{path}: {fault}")
    if content["measure"] not in MEASURES:
        raise unknown_name(f"{path}: measure", content["measure"], MEASURES)
    for algo, over in content["deviation"].items():
        if over not in OVER:
            raise unknown_name(f"{path}, deviation of {algo}:", str(over), OVER)
    rows = enumerate(content["row"], start=1)
    entries = [entry for i, row in rows for entry in _entries(row, content, f"{path}, row {i}")]
    if not entries:
        raise UserError(f"{path}: there is no [[row]] with published numbers")
    return Suite(
        name=path.stem,
        disagreements=tuple(map(str, content["disagreements"])),
        methods=content["methods"],
        entries=tuple(entries),
        **{name: content[name] for name in texts},
    )


def _entries(row: Any, content: dict[str, Any], where: str) -> list[Entry]:
    """The numbers of one row of a table."""
    if fault := misfit(row, env=str, published=dict):
        raise UserError(f"{where}: {fault}")
    _known_keys(row, _ROW, where)
    runs, task, aggregate = row.get("runs", [row["env"]]), row.get("task", ALL), row.get("aggregate", "mean")
    if not isinstance(runs, list) or not runs or not all(isinstance(each, str) for each in runs):
        raise UserError(f"{where}: runs must be a list of environments")
    for each in runs:
        _check_env(each, where)
    if task != ALL and (type(task) is not int or len(runs) > 1):
        raise UserError(f"{where}: task must be {ALL!r}, or the number of a task of the only run")
    if aggregate not in AGGREGATES:
        raise unknown_name(f"{where}: aggregate", str(aggregate), AGGREGATES)
    found = []
    for algo, numbers in row["published"].items():
        if algo not in content["methods"]:
            raise unknown_name(f"{where}: algorithm", algo, content["methods"])
        if not _is_pair(numbers):
            raise UserError(f"{where}: {algo} must be [mean] or [mean, deviation]")
        mean, deviation = numbers[0], numbers[1] if len(numbers) > 1 else None
        over = content["deviation"].get(algo)
        if deviation is not None and over is None:
            raise UserError(f"{where}: [deviation] must say over what that of {algo} is taken")
        published = Published(mean, deviation, over or OVER[0])
        chosen = None if task == ALL else task
        method = content["methods"][algo]
        found.append(Entry(row["env"], tuple(runs), chosen, aggregate, algo, method, published))
    return found


def _is_pair(numbers: Any) -> bool:
    known = isinstance(numbers, list) and len(numbers) in (1, 2)
    return known and all(type(number) in (int, float) for number in numbers)


def _check_env(name: str, where: str) -> None:
    try:
        parse(name)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _known_keys(values: dict[str, Any], known: Sequence[str], where: str) -> None:
    for key in values:
        if key not in known:
            raise unknown_name(f"{where}: key", key, known)


def select(
    suites: Sequence[Suite], envs: Sequence[str] = (), algos: Sequence[str] = ()
) -> list[tuple[Suite, list[Entry]]]:
    """Entries of some environments and algorithms by suite; of all where none are named.

    Args:
        envs: names in the table, of its runs, or of their families such as `cube-single`.
        algos: this project's names.
    Raises:
        UserError: no suite has such an environment or algorithm, or none has both.
    """
    called = ", ".join(suite.name for suite in suites)
    methods = {algo for suite in suites for algo in suite.methods}
    known = {name for suite in suites for entry in suite.entries for name in names_of(entry)}
    for algo in algos:
        if algo not in methods:
            raise unknown_name(f"--algo: algorithm of {called}", algo, methods)
    for env in envs:
        if env not in known:
            families = {parse(run).family for suite in suites for each in suite.entries for run in each.runs}
            close = bool(difflib.get_close_matches(env, known, n=1))
            raise unknown_name(f"--env: environment of {called}", env, known if close else families)
    found = [(suite, [each for each in suite.entries if _is_chosen(each, envs, algos)]) for suite in suites]
    if not any(entries for _, entries in found):
        raise UserError(f"{called}: no number is of both --env and --algo; see --list")
    return found


def _is_chosen(entry: Entry, envs: Sequence[str], algos: Sequence[str]) -> bool:
    return (not algos or entry.algo in algos) and (not envs or bool(names_of(entry) & set(envs)))


def names_of(entry: Entry) -> set[str]:
    """Names by which a command line may mean an entry's environment; not those of several runs."""
    found = {entry.env}
    if len(families := {parse(run).family for run in entry.runs}) == 1:
        found |= families
    if len(entry.runs) == 1:
        found |= set(entry.runs)
    return found
