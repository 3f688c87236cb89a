"""Reports of published tables: verdicts, deviations, provenance of each row, and files of equal content."""

import csv
import json
import math
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest

from experiments.reproduce import main
from experiments.reproduction import comparison
from experiments.reproduction.across import across, across_columns
from experiments.reproduction.cells import Cell, Plan
from experiments.reproduction.comparison import Finished, Row, deviation, judge, row_of
from experiments.reproduction.html_report import Line, Panel, Section, page, runs_section
from experiments.reproduction.render import latex, latex_text, markdown, notes, sheet, terminal_table
from experiments.reproduction.suites import JUDGED, Entry, Published, load_suite
from mac.errors import UserError
from mac.run.report.score import SCORE, SUCCESS, ScoreKind
from mac.run.report.stats import Curve, Interval
from tests.helpers.fake_runs import SUITE, TASKS, Fake, write_finished


@pytest.fixture
def fake(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, finished, monkeypatch)


def curve(scores: np.ndarray, tasks: list[int] | None = None, measure: ScoreKind = SUCCESS) -> Curve:
    """A curve of scores [evaluations, seeds, tasks]."""
    evaluations, seeds, count = scores.shape
    nothing = np.full_like(scores, math.nan)
    steps = [10 * (i + 1) for i in range(evaluations)]
    tasks = tasks or list(range(1, count + 1))
    return Curve(steps, list(range(seeds)), tasks, scores, 15, nothing, nothing, measure=measure)


def part(
    scores: np.ndarray, kind: str = "official", tasks: list[int] | None = None, **more: ScoreKind
) -> Finished:
    cell = Cell("some-env", "mac", "paper", len(scores[0]))
    return Finished(
        cell, Path("f"), curve(scores, tasks, **more), ("c",), ("abc",), ("a cpu",), (kind,), 60.0, ""
    )


def entry(mean: float, dev: float | None, over: comparison.Over = "seeds", **changes: object) -> Entry:
    found = Entry("e", ("e",), None, "mean", "mac", "MAC", Published(mean, dev, over))
    return found._replace(**changes)


SUITE3 = "table3"


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file of a report."""
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


# Verdicts.


@pytest.mark.parametrize(
    "ours, paper, verdict",
    [
        ((50.0, 40.0, 60.0), (55, 5), "inside"),
        ((49.6, 49.0, 50.0), (55, 5), "inside"),  # 5.4 away: within 5 and half for rounding
        ((49.4, 45.0, 49.45), (55, 5), "below"),
        ((49.4, 45.0, 52.0), (55, 5), "below"),  # whatever our interval reaches
        ((61.0, 60.9, 70.0), (55, 5), "above"),
        ((100.0, 100.0, 100.0), (100, 0), "inside"),
        ((99.0, 98.0, 99.4), (100, 0), "below"),
        ((61.0, math.nan, math.nan), (55, 5), "above"),  # one seed has no interval
    ],
)
def test_verdict_is_by_the_papers_deviation(
    ours: tuple[float, float, float], paper: tuple[float, float], verdict: str
):
    assert judge(Interval(*ours), Published(*paper, "seeds")) == (verdict, comparison.WITHIN_DEVIATION)


@pytest.mark.parametrize(
    "ours, verdict, test",
    [
        ((700.0, 650.0, 760.0), "inside", comparison.WITHIN_INTERVAL),
        ((700.0, 690.0, 710.0), "below", comparison.WITHIN_INTERVAL),
        ((800.0, 790.0, 810.0), "above", comparison.WITHIN_INTERVAL),
        ((747.0, math.nan, math.nan), "-", comparison.NO_TEST),
    ],
)
def test_verdict_without_a_deviation_is_by_our_interval(
    ours: tuple[float, float, float], verdict: str, test: str
):
    assert judge(Interval(*ours), Published(747, None, "seeds")) == (verdict, test)


def test_deviation_is_over_what_the_paper_says():
    # Means of the two seeds are 2 and 4: their deviation is sqrt(2). That of all four values is sqrt(8 / 3).
    scores = np.array([[1.0, 3.0], [3.0, 5.0]])
    assert deviation(scores, "seeds") == pytest.approx(math.sqrt(2))
    assert deviation(scores, "tasks and seeds") == pytest.approx(math.sqrt(8 / 3))
    assert math.isnan(deviation(scores[:1], "seeds"))


def test_row_takes_the_task_and_the_evaluations_that_it_names():
    scores = np.zeros((4, 2, 2))
    scores[:, :, 1] = np.array([[0.9, 0.9], [0.2, 0.4], [0.4, 0.6], [0.6, 0.8]])
    row = row_of(load_suite(SUITE3), entry(70, 1, task=4), [part(scores, tasks=[3, 4])])
    assert row.value == pytest.approx(70) and row.task == "4"
    assert row.late == pytest.approx(50)
    assert row.best == pytest.approx(90)
    assert row.deviation == pytest.approx(100 * math.sqrt(2) / 10)
    assert (row.verdict, row.updates, row.seeds, row.episodes) == ("inside", "40", 2, 15)


def test_row_of_several_runs_is_the_mean_of_their_tasks():
    parts = [part(np.full((1, 2, 1), value), tasks=[task]) for task, value in enumerate((0.2, 0.6), 1)]
    row = row_of(load_suite(SUITE3), entry(40, 1, runs=("a", "b")), parts)
    assert row.value == pytest.approx(40) and row.task == "all"
    assert row.deviation == pytest.approx(0)  # of the seeds' means
    pooled = row_of(load_suite(SUITE3), entry(40, 1, "tasks and seeds", runs=("a", "b")), parts)
    assert pooled.deviation == pytest.approx(100 * math.sqrt(4 * 0.2**2 / 3))
    assert row.seconds == 120


def test_total_sums_scores_that_are_no_percentage():
    scores = np.array([[[30.0], [50.0]]])
    row = row_of(
        load_suite(SUITE3),
        entry(120, None, aggregate="sum", runs=("a", "b", "c")),
        [part(scores, measure=SCORE)] * 3,
    )
    assert row.value == pytest.approx(120)
    assert row.deviation == pytest.approx(3 * math.sqrt(200))
    assert (row.verdict, row.test) == ("inside", comparison.WITHIN_INTERVAL)
    assert row.low < row.value < row.high


def test_generated_and_official_data_are_never_judged_together():
    parts = [part(np.full((1, 2, 1), 0.5), kind) for kind in ("official", "generated")]
    row = row_of(load_suite(SUITE3), entry(50, 1, runs=("a", "b")), parts)
    assert row.data == "official + generated"
    assert (row.verdict, row.test) == ("-", comparison.MIXED)


def test_laptop_rows_say_that_they_are_no_repetition():
    row = row_of(load_suite(SUITE3), entry(50, 1), [part(np.full((1, 2, 1), 0.5))])
    said = "do not repeat the paper's experiment"
    assert not any(said in note for note in notes(load_suite(SUITE3), [row]))
    for changed in ({"preset": "laptop"}, {"data": "generated"}):
        other = Row(**{**vars(row), **changed})
        assert any(said in note for note in notes(load_suite(SUITE3), [row, other]))


def test_verdict_may_be_about_the_last_three_evaluations():
    """Means 20, 40, 90 of which the last is far above 50, and the mean of three is not."""
    scores = np.array([[[0.1], [0.3]], [[0.3], [0.5]], [[0.9], [0.9]]])
    suite = load_suite(SUITE3)
    last, mean = (
        row_of(suite, entry(0, 0, published=Published(50, 1, "seeds", judged)), [part(scores)])
        for judged in JUDGED
    )
    assert (last.verdict, mean.verdict) == ("above", "inside")
    assert mean.value == pytest.approx(90) and mean.late == pytest.approx(50)
    said = "`ours is` of MAC compares our mean of the last 3"
    assert any(said in note for note in notes(suite, [mean]))
    assert not any(said in note for note in notes(suite, [last]))


def test_verdict_widens_by_the_digits_that_are_printed():
    ours = Interval(84.0, 83.0, 85.0)
    assert judge(ours, Published(84.5, 0.4, "seeds", decimals=(1, 1)))[0] == "below"
    assert judge(ours, Published(84, 0, "seeds"))[0] == "inside"
    row = row_of(load_suite(SUITE3), entry(0, 0, published=Published(84.5, 0.4, "seeds", "last", (1, 1))),
                 [part(np.full((1, 2, 1), 0.5))])  # fmt: skip
    text = sheet(load_suite(SUITE3), [row])
    assert "| 84.5 ± 0.4 |" in markdown(text) and r"84.5 $\pm$ 0.4" in latex(text)


def test_total_has_no_interquartile_mean():
    parts = [part(np.array([[[30.0], [50.0]]]), measure=SCORE)] * 3
    row = row_of(load_suite(SUITE3), entry(120, None, aggregate="sum", runs=("a", "b", "c")), parts)
    assert math.isnan(row.iqm) and sheet(load_suite(SUITE3), [row]).columns["IQM"] == ["-"]


def test_tests_say_which_rows_they_are_for():
    suite = load_suite("table14")
    one = part(np.array([[[30.0], [50.0]]]), measure=SCORE)
    entries = [entry(40, 1, env="a"), entry(40, None, env="b"), entry(40, None, env="c", method="CQL")]
    rows = [row_of(suite, each, [one]) for each in entries]
    said = [note for note in notes(suite, rows) if "ours is" in note]
    assert said[0].startswith("`ours is` of MAC (a) by this test: our mean lies within")
    assert said[1].startswith("`ours is` of MAC (b), CQL by this test: our 95% interval")
    assert len(said) == 2


def test_own_suite_says_nothing_of_the_paper():
    row = row_of(load_suite(SUITE3), entry(50, 1), [part(np.full((1, 2, 1), 0.5), "generated")])
    own = load_suite(SUITE3)._replace(source="my notes", protocol="")
    text = sheet(own, [row])
    assert "source: my notes" in text.notes and "published" in text.columns
    assert "paper" not in " ".join([*text.columns, *text.notes])
    assert "paper" in sheet(load_suite(SUITE3), [row]).columns


# The command.


def test_report_refuses_runs_of_another_measure(fake: Fake, capsys: pytest.CaptureFixture[str]):
    """Also after a suite whose numbers are complete: nothing is written."""
    write_finished(fake.plan, fake.plan.cell(TASKS[0], "mac"), 0.5)
    own = fake.suite.with_name("other.toml")
    own.write_text(SUITE.replace('"success"', '"return"'))
    words = [str(fake.suite), str(own), "--out", str(fake.out), "--seeds", "2", "--report"]
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "other: measure is 'return', but mac on" in line and 'write measure = "success"' in line
    assert not (fake.out / "report").exists()


def test_task_without_evaluations_is_one_line():
    with pytest.raises(UserError, match="its run has evaluations of task 4; name that"):
        row_of(load_suite(SUITE3), entry(50, 1, task=9), [part(np.full((1, 2, 1), 0.5), tasks=[4])])


def test_narrower_report_has_files_of_its_own(fake: Fake, capsys: pytest.CaptureFixture[str]):
    for task in TASKS[:2]:
        write_finished(fake.plan, fake.plan.cell(task, "mac"), 0.5)
    write_finished(fake.plan, fake.plan.cell(TASKS[0], "mac", ("--eval.episodes", "5")), 0.5)
    words = ("--env", TASKS[0], "--report")
    for more in (("--report",), words, (*words, "--algo", "mac"), (*words, "--", "--eval.episodes", "5")):
        assert fake.run(*more) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"three tasks (only {TASKS[0]})" in said
    assert f"three tasks (only {TASKS[0]}; with --eval.episodes 5)" in said
    names = {path.stem for path in (fake.out / "report").iterdir()}
    full = "mine_laptop_s2"
    assert names == {
        full,
        f"{full}_{TASKS[0]}",
        f"{full}_mac_{TASKS[0]}",
        f"{full}_{TASKS[0]}_eval.episodes=5",
    }
    assert TASKS[1] in (fake.out / "report" / f"{full}.csv").read_text()
    page = (fake.out / "report" / f"{full}_{TASKS[0]}.html").read_text()
    assert f"<h1>mine, preset laptop (only {TASKS[0]})</h1>" in page


def test_selections_have_short_names_of_their_own():
    plan = Plan(Path("out"), "laptop", 2, Path("data"), envs=("cube-single", "scene"), algos=("mac", "fql"))
    assert plan.selection == "fql+mac_cube-single+scene"
    assert plan._replace(algos=("fql", "mac")).selection == plan.selection
    many = [plan._replace(envs=tuple(f"puzzle-{i}" for i in range(count))) for count in (20, 21)]
    assert len({each.selection for each in many}) == 2 and max(len(each.selection) for each in many) < 80
    flags = [plan._replace(envs=(), algos=(), flags=("--data.path", path)) for path in ("a/b", "a-b")]
    assert flags[1].selection == "data.path=a-b" and flags[0].selection.startswith("data.path=a-b-")


def test_report_has_our_numbers_beside_the_papers(fake: Fake, capsys: pytest.CaptureFixture[str]):
    assert fake.run("--env", TASKS[0], TASKS[1]) == 0
    capsys.readouterr()
    assert fake.run("--report") == 0
    said = capsys.readouterr().out
    assert "mine: three tasks" in said and "100 ± 0" in said
    assert "not in this table, because runs are not finished: 2" in said  # a task, and the mean
    assert "not available, Not here: this version does not have the algorithm" in said
    assert len(fake.calls) == 2
    folder = fake.out / "report"
    lines = (folder / "mine_laptop_s2.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["env"] for row in rows] == TASKS[:2]
    first = rows[0]
    assert (first["paper"], first["paper_deviation"], first["preset"]) == ("50", "10", "laptop")
    assert (first["seeds"], first["episodes"], first["updates"]) == ("2", "1", "10")
    assert first["data"] == "local files" and first["engine"] == "c"
    assert "hp.batch=8" in first["changes"] and "steps=10" in first["changes"]
    assert first["commit"] and first["hardware"] and first["verdict"] in ("inside", "below", "above")
    assert (folder / "mine_laptop_s2.md").read_text().count(TASKS[0]) == 1
    assert r"\toprule" in (folder / "mine_laptop_s2.tex").read_text()


def test_same_runs_give_the_same_numbers_in_every_file(fake: Fake):
    """All but the dates of the reports, of which the page has one in its link to the CSV."""
    assert fake.run() == 0

    def files() -> dict[str, list[str]]:
        assert fake.run("--report") == 0
        found = sorted((fake.out / "report").iterdir())
        texts = {p.name: unquote(p.read_text()).splitlines() for p in found}
        return {name: [x for x in lines if not x.startswith("# date:")] for name, lines in texts.items()}

    first = files()
    time.sleep(1.1)  # dates are told to the second
    second = files()
    for name, lines in first.items():
        assert [(a, b) for a, b in zip(lines, second[name], strict=True) if a != b] == []
    assert first.keys() == second.keys() and len(first) == 4


def test_report_compares_algorithms_across_tasks(fake: Fake, capsys: pytest.CaptureFixture[str]):
    fake.suite.write_text(SUITE.replace("not_here", "iql").replace("Not here", "IQL"))
    for task in TASKS:
        write_finished(fake.plan, fake.plan.cell(task, "mac"), 0.5, 0.75)
    write_finished(fake.plan, fake.plan.cell(TASKS[1], "iql"), 0.0, 0.25)
    assert fake.run("--report") == 0
    assert "across" not in capsys.readouterr().out  # one task is common
    content = fake.suite.read_text()
    fake.suite.write_text(content.replace("mac = [0, 3]", "mac = [0, 3], iql = [0, 3]"))
    write_finished(fake.plan, fake.plan.cell(TASKS[2], "iql"), 0.0, 0.25)
    assert fake.run("--report") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "mine, across 2 of 3 tasks (laptop)" in said
    assert "that all of these algorithms have finished: cube-single-play tasks 2, 3" in said
    path = fake.out / "report" / "mine_laptop_s2_across.csv"
    ours, theirs = rows_of(path)
    assert (ours["algo"], ours["reference"], ours["tasks"], ours["seeds"]) == ("mac", "mac", "2", "2")
    assert (ours["runs"], ours["all_runs"], theirs["improvement"]) == ("2", "3", "1")
    assert float(ours["mean"]) + float(ours["gap"]) == pytest.approx(1)
    page = (fake.out / "report" / "mine_laptop_s2.html").read_text()
    assert "cube-single-play tasks 2, 3" in page
    assert page.count('<th class="number"><button type="button">mean<') == 1  # it sorts too
    fake.suite.write_text(content)
    assert fake.run("--report") == 0
    assert not path.exists()  # it would be of other runs than the report


def test_algorithms_are_compared_on_common_tasks():
    """Run `c` is not common to both, so that it does not count."""
    values = {"mac": {"a": 0.8, "b": 0.6, "c": 0.0}, "fql": {"a": 0.2, "b": 0.6}}
    finished = {}
    for algo, runs in values.items():
        for run, value in runs.items():
            finished[Cell(run, algo, "paper", 4)] = part(np.full((1, 4, 1), value), tasks=[1])
    theirs, ours = across(load_suite("table2"), finished, 3)  # in the order of the suite
    assert ours.names == "a; b" and (ours.runs, ours.all_runs) == (2, 3)
    assert (ours.tasks, ours.mean, ours.gap) == (2, pytest.approx(0.7), pytest.approx(0.3))
    assert (theirs.mean, theirs.improvement) == (pytest.approx(0.4), 0.75)  # better on a, even on b
    assert theirs.profile.startswith("0.0:1.000 0.1:1.000 0.2:0.500")
    columns = across_columns(load_suite("table2"), [ours, theirs])
    assert columns["P(MAC is better)"] == ["-", "0.75 (0.75 to 0.75)"]
    assert across(load_suite("table2"), {k: v for k, v in finished.items() if k.algo == "mac"}, 3) == []


def test_report_without_a_finished_cell_is_one_line(fake: Fake, capsys: pytest.CaptureFixture[str]):
    assert fake.run("--report") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--out={fake.out} does not exist" in line and not fake.out.exists()


def test_report_of_a_cut_cell_leaves_it_out(fake: Fake, capsys: pytest.CaptureFixture[str]):
    assert fake.run("--env", TASKS[0], TASKS[1]) == 0
    config = fake.out / f"mac_{TASKS[0]}_laptop_s2" / "config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"steps": 20}))
    capsys.readouterr()
    assert fake.run("--report") == 0
    assert "because runs are not finished: 3" in capsys.readouterr().out


def test_list_and_report_together_are_refused(capsys: pytest.CaptureFixture[str]):
    assert main(["table2", "--list", "--report"]) == 2
    assert "--list and --report" in capsys.readouterr().err


def test_terminal_tells_shared_provenance_once():
    suite = load_suite(SUITE3)
    row = row_of(suite, entry(50, 1), [part(np.full((1, 2, 1), 0.5))])
    same, other = (
        terminal_table(sheet(suite, [row, Row(**{**vars(row), "data": data})])) for data in ("official", "x")
    )
    assert "all rows: seeds x episodes 2 x 15; updates 10; preset paper; data official; " in str(same.caption)
    assert "data" not in [column.header for column in same.columns]
    text = sheet(suite, [row, row])
    for shown in (markdown(text), page([runs_section(suite, text, [row, row], "")], "t")):
        assert shown.count("official") == 1 and "all rows: seeds x episodes 2 x 15; " in shown
    assert "official" in latex(text)
    assert "data" in [column.header for column in other.columns]


def test_markdown_and_latex_escape_what_they_must():
    row = row_of(load_suite(SUITE3), entry(50, 1, env="a_b|c"), [part(np.full((1, 2, 1), 0.5))])
    (line,) = [line for line in markdown(sheet(load_suite(SUITE3), [row])).splitlines() if "a_b" in line]
    assert r"a_b\|c" in line
    (line,) = [line for line in latex(sheet(load_suite(SUITE3), [row])).splitlines() if "50.0" in line]
    assert line.startswith(r"a\_b|c & all & MAC & 50 $\pm$ 1 & 50.0 $\pm$ 0.0 & 50.0 to 50.0 & ")
    assert latex_text("5% of ~x^2\\") == r"5\% of \textasciitilde{}x\textasciicircum{}2\textbackslash{}"


# The page.


class Tags(HTMLParser):
    """Collects tags with their attributes; every tag that is opened must be closed."""

    VOID = ("meta", "br")
    """Tags without an end; those of SVG end themselves."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def section(*values: float, title: str = "t") -> Section:
    """A section with a run of two seeds and three evaluations for each value."""
    suite = load_suite(SUITE3)._replace(title=title)
    scores = [np.linspace(0, value, 3)[:, None, None] + np.zeros((3, 2, 1)) for value in values]
    algos = list(suite.methods)[: len(values)]
    runs = [
        part(each)._replace(cell=Cell("e", algo, "paper", 2))
        for algo, each in zip(algos, scores, strict=True)
    ]
    rows = [row_of(suite, entry(50, 5, algo=run.cell.algo), [run]) for run in runs]
    panel = Panel("e", [Line(run.cell.algo, i, run) for i, run in enumerate(runs)])
    return runs_section(suite, sheet(suite, rows), rows, "a,b\n1,2\n", panels=[panel])


def test_page_is_whole_and_needs_no_network():
    text = page([section(0.5, 0.9)], "title")
    tags = Tags(text)
    assert not tags.open
    links = [value for _, attrs in tags.found for name, value in attrs.items() if name in ("href", "src")]
    assert links == ["data:text/csv;charset=utf-8,a,b%0A1,2%0A"]
    assert "@import" not in text and "url(" not in text
    assert "width=device-width" in (tags.of("meta")[1]["content"] or "")
    assert len(text) < 50_000


def test_page_draws_a_curve_of_each_run():
    tags = Tags(page([section(0.5, 0.9)], "title"))
    assert (len(tags.of("figure")), len(tags.of("polyline")), len(tags.of("polygon"))) == (1, 2, 2)
    assert len(tags.of("path")) == 2  # a sample of each line in the legend
    assert len(tags.of("circle")) == 6
    # 0 and 100 percent are at the lower and the upper end: 90% is a tenth below the latter.
    top, bottom = 8.0, 196.0
    *_, last = (tags.of("polyline")[1]["points"] or "").split()
    assert float(last.split(",")[1]) == pytest.approx(top + 0.1 * (bottom - top), abs=0.1)


def test_page_sorts_by_numbers_and_escapes_text():
    text = page([section(0.5, title="<b>&")], "<i>")
    assert "<b>" not in text and "<i>" not in text and "&lt;b&gt;&amp;" in text
    cells = [attributes.get("data-key") for attributes in Tags(text).of("td")]
    assert cells[:2] == ["e all", "MAC"]  # the environment's cell tells the task
    assert cells[2] == "50" and float(cells[3] or "") == pytest.approx(50)


def test_page_writes_code_and_sets_numbers_right():
    text = page([section(0.5)], "t")
    assert "<code>ours is</code> by this test" in text and "`" not in text.partition("<script>")[0]
    (ours,) = [each for each in Tags(text).of("td") if each.get("data-key") == "50.0"][:1]
    assert ours["class"] == "number"
    assert '>e <span class="task">all tasks</span></td>' in text


def test_page_draws_scores_that_are_no_percentage():
    one = part(np.array([[[-5.0], [-5.0]], [[150.0], [150.0]]]), measure=SCORE)
    suite = load_suite(SUITE3)
    rows = [row_of(suite, entry(1, None), [one])]
    panels = [Panel("e", [Line("MAC", 0, one)])]
    text = page([runs_section(suite, sheet(suite, rows), rows, "", panels=panels)], "t")
    assert "normalised score by updates" in text and "nan" not in text
    assert ">-5</text>" in text and ">150</text>" in text
