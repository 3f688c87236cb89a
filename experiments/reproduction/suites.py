"""Suites: what a table or figure shows, and the runs that each number needs, as data in `suites/*.toml`."""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from envs_mjx.registry import parse
from mac.atomic_files import misfit, visible
from mac.errors import UserError, one_line, unknown_name
from mac.run.report.score import MEASURES
from mac.run.report.table import LATE

SUITES = Path(__file__).parents[1] / "suites"
Over = Literal["seeds", "tasks and seeds"]
OVER: tuple[Over, ...] = ("seeds", "tasks and seeds")
Judged = Literal["last", "last 3"]
JUDGED: Mapping[Judged, int] = MappingProxyType({"last": 1, "last 3": LATE})
"""Evaluations of ours whose mean is compared with a published number."""
AGGREGATES = ("mean", "sum")
PICTURES = ("", "bars")
ALL = "all"
Kind = Literal["table", "curve", "time", "model error", "unrecorded"]
KINDS: tuple[Kind, ...] = ("table", "curve", "time", "model error", "unrecorded")
"""`table`: numbers of runs beside published ones. `curve`: numbers of runs by a setting. `time`: training
hours or acting milliseconds, measured and scaled. `model error`: errors of dynamics models along
trajectories. `unrecorded`: a figure of the publication whose content this project does not know."""
TIMES = ("training hours", "acting milliseconds")
"""Measures of suites of the kind `time`."""
ERROR = "squared error"
"""Measure of suites of the kind `model error`."""
_TEXTS = ("title", "source", "measure", "protocol", "kind", "axis", "picture")
_TABLES = ("methods", "deviation", "judged", "flags", "sizes")
_HEAD = (*_TEXTS, *_TABLES, "disagreements", "row", "setting", "errors_at")
PAPER = "Park et al. 2025 (arXiv 2512.08108)"
"""With this the source of each suite of the paper begins."""
_ROW = ("env", "runs", "task", "aggregate", "published", "algos")
_SETTING = ("value", "line", "flags")


class Published(NamedTuple):
    """A number as a table prints it, in percent of success or as a normalised score.

    Attributes:
        deviation: sample standard deviation (n - 1); None where none is printed.
        over: values that it is the deviation of: each seed's mean over tasks, or all tasks and seeds pooled.
        judged: our evaluations that it is compared with.
        decimals: digits after the point with which mean and deviation are printed.
    """

    mean: float
    deviation: float | None
    over: Over
    judged: Judged = "last"
    decimals: tuple[int, int] = (0, 0)

    @property
    def text(self) -> str:
        """The number as its table prints it; a dash where it is not known."""
        if math.isnan(self.mean):
            return "-"
        first, second = self.decimals
        return f"{self.mean:.{first}f}" + (
            "" if self.deviation is None else f" ± {self.deviation:.{second}f}"
        )

    @property
    def rounding(self) -> float:
        """Half a unit of the mean's last digit: the mean may be off by so much."""
        return 0.5 * 10.0 ** -self.decimals[0]


UNPUBLISHED = Published(math.nan, None, "seeds")
"""Of a figure, whose numbers are not known to this project."""


class Setting(NamedTuple):
    """A place of a number in a figure, and the flags that lead to it.

    Attributes:
        value: place on the figure's horizontal axis.
        line: name of the line; empty where a figure has one line for each algorithm.
        flags: of `run.py` or, in a figure of model errors, of `model_error.py`.
    """

    value: float
    line: str
    flags: tuple[str, ...]


class Entry(NamedTuple):
    """One number of a table or figure.

    Attributes:
        env: the environment's name in the table.
        runs: environments, as `--env` takes them, whose runs the number needs.
        task: the only task that counts; None for all tasks of all runs.
        aggregate: `mean` or `sum` over tasks.
        method: the algorithm's name in the table.
        setting: the place in a figure; None in a table.
        flags: of the runs, besides those of all runs of a command line.
    """

    env: str
    runs: tuple[str, ...]
    task: int | None
    aggregate: str
    algo: str
    method: str
    published: Published
    setting: Setting | None = None
    flags: tuple[str, ...] = ()


class Suite(NamedTuple):
    """One table or figure.

    Attributes:
        name: what the command line calls it.
        measure: `success`, `score` or `return`; of `TIMES`, or `ERROR`.
        protocol: seeds, episodes and updates behind the published numbers.
        disagreements: places where the publication disagrees with itself.
        methods: the table's name of each algorithm.
        axis: title of a figure's horizontal axis.
        picture: `bars` where a table is drawn too, else empty.
        sizes: flags of `model_error.py` by preset, in a figure of model errors.
        errors_at: steps after which model errors of the runs are drawn against their success; 0 for none.
    """

    name: str
    title: str
    source: str
    measure: str
    protocol: str
    disagreements: tuple[str, ...]
    methods: dict[str, str]
    entries: tuple[Entry, ...]
    kind: Kind = "table"
    axis: str = ""
    picture: str = ""
    errors_at: int = 0
    sizes: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    @property
    def of_runs(self) -> bool:
        """Whether its numbers are those of `run.py`."""
        return self.kind in ("table", "curve")

    @property
    def of_paper(self) -> bool:
        """Whether it is a table or figure of the paper that this project implements."""
        return self.source.startswith(PAPER)


def suite_names() -> list[str]:
    """Names of the suites of this project: tables, figures, others; `table2` before `table12`."""
    return sorted((path.stem for path in visible(SUITES, "*.toml")), key=_place)


def _place(name: str) -> tuple[int, int, str]:
    """Sorts names of suites."""
    first = name.partition("_")[0]
    digits = "".join(each for each in first if each.isdigit())
    kinds = ("table", "figure", first)
    return kinds.index(first.removesuffix(digits) if digits else first), int(digits or 0), name


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


def load_suites(names: Sequence[str]) -> list[Suite]:
    """The suites that a command line names, without repeats.

    Raises:
        UserError: as `load_suite`, or two suites have one name, which is that of their reports too.
    """
    found: dict[str, Suite] = {}
    for name in dict.fromkeys(names):
        suite = load_suite(name)
        if suite.name in suite_names() and suite != load_suite(suite.name):
            raise UserError(
                f"{name}: a suite of this project is called {suite.name}; give the file another name"
            )
        if found.setdefault(suite.name, suite) != suite:
            raise UserError(
                f"{name}: another suite is called {suite.name} too; give one of the files another name"
            )
    return list(found.values())


def read_suite(path: Path) -> Suite:
    """Reads a file of a suite.

    Raises:
        UserError: it is not TOML, or misses, misspells or mistypes a value.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"), parse_float=Decimal)  # keeps 84.50 apart
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    _known_keys(content, _HEAD, str(path))
    content = _complete(content, str(path))
    rows = enumerate(content["row"], start=1)
    settings = _settings(content["setting"], str(path))
    entries = [entry for i, row in rows for entry in _entries(row, content, settings, f"{path}, row {i}")]
    if not entries and content["kind"] != "unrecorded":
        raise UserError(f"{path}: there is no [[row]] with published numbers")
    return Suite(
        name=path.stem,
        disagreements=tuple(map(str, content["disagreements"])),
        methods=content["methods"],
        entries=tuple(entries),
        errors_at=content["errors_at"],
        sizes={preset: tuple(words) for preset, words in content["sizes"].items()},
        **{name: content[name] for name in _TEXTS},
    )


def _complete(content: dict[str, Any], path: str) -> dict[str, Any]:
    """The content of a file with all that it leaves out.

    Raises:
        UserError: a value is missing, misspelt or mistyped.
    """
    optional = {"disagreements": [], "deviation": {}, "protocol": "", "setting": [], "errors_at": 0}
    optional |= {"flags": {}, "sizes": {}, "judged": {}}
    content = optional | {"kind": "table", "axis": "", "picture": ""} | content
    if content["kind"] == "unrecorded":
        content = {"methods": {}, "row": [], "measure": "success"} | content
    kinds = dict.fromkeys(_TEXTS, str) | dict.fromkeys(("disagreements", "row", "setting"), list)
    kinds |= dict.fromkeys(_TABLES, dict)
    if fault := misfit(content, **kinds, errors_at=int):
        raise UserError(f"{path}: {fault}")
    for algo, name in content["methods"].items():
        if not isinstance(name, str):
            raise UserError(f"{path}, methods: {algo} must be a text, its name in the table")
    if content["kind"] not in KINDS:
        raise unknown_name(f"{path}: kind", content["kind"], KINDS)
    known = {"time": TIMES, "model error": (ERROR,)}.get(content["kind"], tuple(MEASURES))
    if content["measure"] not in known:
        raise unknown_name(f"{path}: measure", content["measure"], known)
    if content["errors_at"] < 0:
        raise UserError(f"{path}: errors_at must be a number of steps, or 0 for no figure")
    if content["picture"] not in PICTURES:
        raise unknown_name(f"{path}: picture", content["picture"], PICTURES)
    for table, values in (("deviation", OVER), ("judged", tuple(JUDGED))):
        for algo, value in content[table].items():
            if algo not in content["methods"]:
                raise unknown_name(f"{path}, {table}: algorithm", algo, content["methods"])
            if value not in values:
                raise unknown_name(f"{path}, {table} of {algo}:", str(value), values)
    for preset, words in content["sizes"].items():
        if not _are_words(words):
            raise UserError(f"{path}, sizes of {preset}: must be a list of words")
    for algo, words in content["flags"].items():
        if algo not in content["methods"]:
            raise unknown_name(f"{path}, flags: algorithm", algo, content["methods"])
        if not _are_words(words):
            raise UserError(f"{path}, flags of {algo}: must be a list of words")
    figure = content["kind"] in ("curve", "model error")
    if figure != bool(content["setting"]):
        raise UserError(f"{path}: [[setting]] is of figures, of the kinds curve and model error")
    return content


def _settings(found: list[Any], path: str) -> tuple[Setting, ...]:
    """The places of a figure."""
    settings = []
    for i, each in enumerate(found, start=1):
        where = f"{path}, setting {i}"
        if fault := misfit(each) or misfit({"line": "", "flags": []} | each, line=str, flags=list):
            raise UserError(f"{where}: {fault}")
        _known_keys(each, _SETTING, where)
        value, flags = each.get("value"), each.get("flags", [])
        if not _is_number(value) or not _are_words(flags):
            raise UserError(f"{where}: value must be a number, and flags a list of words")
        settings.append(Setting(float(value), each.get("line", ""), tuple(flags)))
    return tuple(settings)


def _entries(row: Any, content: dict[str, Any], settings: Sequence[Setting], where: str) -> list[Entry]:
    """The numbers of one row of a table, or of one panel of a figure."""
    kinds = {"env": str, "published": dict, "algos": list}
    if fault := misfit(row) or misfit({"published": {}, "algos": []} | row, **kinds):
        raise UserError(f"{where}: {fault}")
    _known_keys(row, _ROW, where)
    runs, task, aggregate = row.get("runs", [row["env"]]), row.get("task", ALL), row.get("aggregate", "mean")
    if not _are_words(runs) or not runs:
        raise UserError(f"{where}: runs must be a list of environments")
    if not _are_words(row.get("algos", [])):
        raise UserError(f"{where}: algos must be a list of algorithms")
    for each in runs:
        _check_env(each, where)
    if task != ALL and (type(task) is not int or len(runs) > 1):
        raise UserError(f"{where}: task must be {ALL!r}, or the number of a task of the only run")
    known = parse(runs[0])
    tasks = known.tasks if known.task is None else (known.task,)
    if task not in (ALL, *tasks) and tasks:
        have = ", ".join(map(str, tasks))
        raise UserError(
            f"{where}: task = {task}, but {runs[0]} has task {have}; write one of these, or {ALL!r}"
        )
    if aggregate not in AGGREGATES:
        raise unknown_name(f"{where}: aggregate", str(aggregate), AGGREGATES)
    named = dict.fromkeys([*row.get("published", {}), *row.get("algos", [])])
    found = []
    for algo in named:
        if algo not in content["methods"]:
            raise unknown_name(f"{where}: algorithm", str(algo), content["methods"])
        published = _published(row, algo, content, where)
        chosen = None if task == ALL else task
        method, flags = content["methods"][algo], tuple(content["flags"].get(algo, ()))
        entry = Entry(row["env"], tuple(runs), chosen, aggregate, algo, method, published, None, flags)
        places = [entry._replace(setting=each, flags=flags + each.flags) for each in settings]
        found += places or [entry]
    return found


def _published(row: dict[str, Any], algo: str, content: dict[str, Any], where: str) -> Published:
    """The published number of an algorithm in a row."""
    numbers = row.get("published", {}).get(algo)
    if numbers is None:
        return UNPUBLISHED
    if not _is_pair(numbers):
        raise UserError(f"{where}: {algo} must be [mean] or [mean, deviation], finite numbers")
    mean, deviation = numbers[0], numbers[1] if len(numbers) > 1 else None
    if deviation is not None and deviation < 0:
        raise UserError(f"{where}: {algo} has the deviation {deviation}, which must be 0 or more")
    if deviation is not None and algo not in content["deviation"]:
        raise UserError(f"{where}: [deviation] must say over what that of {algo} is taken")
    return Published(
        _plain(mean),
        None if deviation is None else _plain(deviation),
        content["deviation"].get(algo, OVER[0]),
        content["judged"].get(algo, "last"),
        (_decimals(mean), _decimals(deviation)),
    )


def _plain(number: int | Decimal) -> int | float:
    return number if isinstance(number, int) else float(number)


def _decimals(number: int | Decimal | None) -> int:
    """Digits after the point with which a number is written."""
    return len(re.sub(r"^[^.]*\.?", "", f"{number:f}")) if isinstance(number, Decimal) else 0


def _are_words(words: Any) -> bool:
    return isinstance(words, list) and all(isinstance(word, str) for word in words)


def _is_pair(numbers: Any) -> bool:
    known = isinstance(numbers, list) and len(numbers) in (1, 2)
    return known and all(map(_is_number, numbers))


def _is_number(value: Any) -> bool:
    return type(value) in (int, Decimal) and math.isfinite(value)


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
    for suite in suites:
        if suite.kind == "unrecorded":
            raise UserError(f"{suite.name}: {suite.title}")
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
