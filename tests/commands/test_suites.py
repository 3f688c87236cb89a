"""Suites: the published tables are complete and agree with themselves; a faulty file is one clear line."""

import shutil
import tomllib
from pathlib import Path

import pytest

from envs_mjx.registry import parse
from experiments.reproduce import main
from experiments.reproduction.cells import Plan, cell_settings, cells_of
from experiments.reproduction.suites import (
    SUITES,
    Entry,
    load_suite,
    load_suites,
    read_suite,
    select,
    suite_names,
)
from mac.errors import UserError

ROOT = Path(__file__).parents[2]
NUMBERS = {
    "table1": 60,
    "table2": 45,
    "table2_default": 45,
    "table3": 15,
    "table4": 10,
    "table5": 10,
    "table12": 360,
    "table13": 225,
    "table14": 113,
    "table15": 10,
    "figure2": 4,
    "figure3": 16,
    "figure5": 0,
    "figure6": 0,
    "figure7": 0,
    "figure8": 16,
    "grades": 20,
}
"""Numbers of each table; table 13 repeats those of table 2, and table 14 has four dashes."""


def numbers(name: str) -> dict[tuple[str, int | None, str], tuple[float, float | None]]:
    entries = load_suite(name).entries
    return {(e.env, e.task, e.algo): (e.published.mean, e.published.deviation) for e in entries}


def test_suites_have_as_many_numbers_as_their_tables():
    assert {name: len(load_suite(name).entries) for name in suite_names()} == NUMBERS


def test_headline_numbers_are_those_of_the_paper():
    mac = [value for (_, _, algo), value in numbers("table1").items() if algo == "mac"]
    assert mac == [(36, 2), (0, 0), (100, 1), (30, 6), (100, 0), (99, 3)]
    mac = [value for (_, _, algo), value in numbers("table2").items() if algo == "mac"]
    assert mac == [(99, 2), (53, 4), (97, 4), (20, 0), (78, 13)]
    assert numbers("table14")["total of 12", None, "mac"] == (771, None)


def test_tasks_of_table_12_average_to_table_1():
    """Within rounding, half a percent of each task and of the mean; deviations agree but for one."""
    by_task, overall = numbers("table12"), numbers("table1")
    differing = set()
    for (env, _, algo), (mean, deviation) in overall.items():
        tasks = [by_task[env, task, algo][0] for task in range(1, 6)]
        assert abs(sum(tasks) / 5 - mean) <= 1, (env, algo)
        assert by_task[env, None, algo][0] == mean
        if by_task[env, None, algo][1] != deviation:
            differing.add((algo, env))
    assert differing == {("nsac_bc", "humanoidmaze-giant-navigate-oraclerep-v0")}
    for name in ("table1", "table12"):
        assert len(load_suite(name).disagreements) == 1


def test_tasks_of_table_13_average_to_table_2():
    by_run = {(entry.runs[0], entry.algo): entry.published.mean for entry in load_suite("table13").entries}
    for entry in load_suite("table2").entries:
        means = [by_run[run, entry.algo] for run in entry.runs]
        assert abs(sum(means) / 5 - entry.published.mean) <= 1, entry


def test_totals_of_table_14_that_disagree_are_named():
    suite, table = load_suite("table14"), numbers("table14")
    wrong = set()
    for algo, method in suite.methods.items():
        rows = [mean for (env, _, name), (mean, _) in table.items() if name == algo and env.endswith("-v2")]
        total, _ = table.get(("total of 12", None, algo), (None, None))
        if total is not None and total != sum(rows):
            wrong.add(f"{method}: total {total}, rows sum to {sum(rows)}")
        assert (total is None) == (len(rows) < 12)
    assert set(suite.disagreements) == wrong


def test_default_tasks_are_those_of_the_environments():
    for entry in load_suite("table2_default").entries:
        family = parse(entry.runs[0])
        assert family.task == parse(f"{family.family}-play-singletask-v0").task == entry.task


def test_overall_numbers_say_what_their_deviation_is_over():
    over = {entry.algo: entry.published.over for entry in load_suite("table2").entries}
    free = {"iql", "rebrac", "idql", "fql"}
    assert {algo for algo, what in over.items() if what == "tasks and seeds"} == free


def test_pooled_deviations_explain_the_model_free_columns():
    """The variance pooled over tasks and seeds is that within tasks and that between their means."""
    by_run = {(entry.runs[0], entry.algo): entry.published for entry in load_suite("table13").entries}
    for entry in load_suite("table2").entries:
        parts = [by_run[run, entry.algo] for run in entry.runs]
        between = sum((part.mean - entry.published.mean) ** 2 for part in parts) / 5
        within = sum((part.deviation or 0) ** 2 for part in parts) / 5
        gap = abs((between + within) ** 0.5 - (entry.published.deviation or 0))
        if entry.published.over == "tasks and seeds":
            assert gap < 2.5, entry


def test_entries_are_selected_by_family_name_and_algorithm():
    def chosen(name: str, envs: list[str], algos: list[str]) -> list[Entry]:
        return select([load_suite(name)], envs, algos)[0][1]

    assert len(chosen("table2", ["cube-single"], ["mac", "fql"])) == 2
    assert len(chosen("table13", ["cube-single"], [])) == 45
    (only,) = chosen("table13", ["scene-play-singletask-task3-v0"], ["leq"])
    assert only.task == 3
    assert len(chosen("table14", ["hopper"], ["mac"])) == 4  # the total is of three families
    with pytest.raises(UserError, match="algorithm of table2 'macc' is not known; did you mean 'mac'"):
        chosen("table2", [], ["macc"])
    with pytest.raises(UserError, match="environment of table2 'cube-singel' is not known"):
        chosen("table2", ["cube-singel"], [])
    with pytest.raises(UserError, match="no number is of both"):
        select([load_suite("table3"), load_suite("table1")], ["scene"], ["gciql"])


OWN = """
title = "mine"
source = "here"
measure = "success"
[methods]
mac = "MAC"
[deviation]
mac = "seeds"
[[row]]
env = "cube-single-play-singletask-task2-v0"
published = { mac = [50, 10] }
"""


def test_suite_of_ones_own_is_a_file(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(OWN)
    suite = load_suite(str(path))
    assert suite.name == "mine"
    assert suite.entries[0].published[:3] == (50, 10, "seeds")


@pytest.mark.parametrize(
    "old, new, said",
    [
        ('title = "mine"', 'titel = "mine"', "'titel' is not known; did you mean 'title'"),
        ("measure = ", "measure = 3 #", "measure"),
        ('measure = "success"', 'measure = "succes"', "did you mean 'success'"),
        ("task2-v0", "task9-v0", "unknown environment"),
        ("[50, 10]", "50", r"mac must be \[mean\] or \[mean, deviation\]"),
        ("published = { mac", "published = { fql", "'fql' is not known"),
        ('mac = "seeds"', 'mac = "tasks"', "'tasks' is not known"),
        ('[deviation]\nmac = "seeds"', "", "must say over what"),
        ("[[row]]", "[[rows]]", "'rows' is not known"),
        ("published", 'task = "two"\npublished', "task must be 'all'"),
        ("title", "title = = 3", "Invalid"),
        ("published", "task = 9\npublished", "task = 9, but cube-.*-task2-v0 has task 2"),
        ("[50, 10]", "[50, -10]", "deviation -10, which must be 0 or more"),
        ("[50, 10]", "[nan, 10]", "finite numbers"),
        ("[50, 10]", "[50, inf]", "finite numbers"),
        ('mac = "MAC"', "mac = 3", "methods: mac must be a text"),
        ('mac = "MAC"', "mac = 2.5", "methods: mac must be a text"),
        ("[[row]]", "[[row]]\nalgos = [[1]]", "algos must be a list of algorithms"),
        ("measure", "errors_at = -5\nmeasure", "errors_at must be a number of steps"),
        ('title = "mine"', "title = 2.5", "title is a value of another type"),
        ("[deviation]", '[judged]\nmac = "last 2"\n[deviation]', "'last 2' is not known; did you mean"),
        ("[deviation]", '[judged]\nmc = "last 3"\n[deviation]', "'mc' is not known; did you mean 'mac'"),
        ("title", 'kind = "tabel"\ntitle', "did you mean 'table'"),
        ("title", 'kind = "curve"\ntitle', r"\[\[setting\]\] is of figures"),
        ("title", 'kind = "time"\ntitle', "measure 'success' is not known"),
        ("title", 'picture = "bar"\ntitle', "did you mean 'bars'"),
        ("[deviation]", "[flags]\nmac = 3\n[deviation]", "must be a list of words"),
    ],
)
def test_faulty_suite_is_one_line(tmp_path: Path, old: str, new: str, said: str):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace(old, new))
    with pytest.raises(UserError, match=said) as failed:
        read_suite(path)
    assert "\n" not in str(failed.value) and str(path) in str(failed.value)


@pytest.mark.parametrize(
    "content, said",
    [
        ("row = [1]\n[methods]", "row 1: a number where a table was expected"),
        ('kind = "curve"\nrow = []\nsetting = ["x"]\n[methods]', "setting 1: a text where a table"),
        ('kind = "curve"\nrow = []\nsetting = [{ value = nan }]\n[methods]', "value must be a number"),
    ],
)
def test_list_of_no_tables_is_one_line(tmp_path: Path, content: str, said: str):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.partition("[[row]]")[0].replace("[methods]", content))
    with pytest.raises(UserError, match=said):
        read_suite(path)


@pytest.mark.parametrize(
    "written, text, rounding",
    [
        ("[84.5, 0.4]", "84.5 ± 0.4", 0.05),
        ("[84.50, 1]", "84.50 ± 1", 0.005),
        ("[84]", "84", 0.5),
        ("[-3000, 0.5]", "-3000 ± 0.5", 0.5),
    ],
)
def test_published_number_keeps_its_decimals(tmp_path: Path, written: str, text: str, rounding: float):
    path = tmp_path / "mine.toml"
    path.write_text(OWN.replace("[50, 10]", written))
    published = read_suite(path).entries[0].published
    assert published.text == text and published.rounding == pytest.approx(rounding)


def test_model_free_columns_are_compared_with_the_last_three():
    for name in ("table2", "table13", "table2_default"):
        suite = load_suite(name)
        late = {entry.algo for entry in suite.entries if entry.published.judged == "last 3"}
        assert late == {"iql", "rebrac", "idql", "fql"} and "compare them with the last 3" in suite.protocol
    assert {entry.published.judged for entry in load_suite("table3").entries} == {"last"}


def test_own_suite_has_a_name_of_its_own(tmp_path: Path):
    """Reports are called after it. A copy of a suite of this project is that suite."""
    for name in ("table3", "a/mine", "b/mine"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.toml").write_text(OWN.replace("here", f"here, {name}"))
    paths = {name: str(tmp_path / f"{name}.toml") for name in ("table3", "a/mine", "b/mine")}
    with pytest.raises(UserError, match="a suite of this project is called table3; give the file"):
        load_suites([paths["table3"]])
    with pytest.raises(UserError, match="another suite is called mine too; give one"):
        load_suites([paths["a/mine"], paths["b/mine"]])
    shutil.copy(SUITES / "figure3.toml", tmp_path)
    assert load_suites(["figure3", str(tmp_path / "figure3.toml")]) == [load_suite("figure3")]


def test_suites_of_the_paper_are_told_from_others():
    others = {name for name in suite_names() if not load_suite(name).of_paper}
    assert others == {"grades"}


def test_unknown_suite_names_the_closest():
    with pytest.raises(UserError, match="suite 'tabel2' is not known; did you mean 'table2'"):
        load_suite("tabel2")


def test_suites_are_part_of_the_package():
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "suites/*.toml" in content["tool"]["setuptools"]["package-data"]["experiments"]
    assert SUITES == ROOT / "experiments" / "suites"


def test_settings_of_figures_are_flags_of_their_runs():
    """Chunks of ten are every preset's own, so that figure 3 shares these runs with the tables."""
    figure = load_suite("figure3").entries
    plan = Plan(Path("out"), "paper", 4, Path("data"))
    (shared,) = plan.cells(next(each for each in figure if each.setting and each.setting.value == 10))
    assert shared in cells_of(load_suite("table1").entries, plan)
    for preset in ("paper", "laptop"):
        for name in ("figure3", "figure8"):
            for entry in load_suite(name).entries:
                (cell,) = plan._replace(preset=preset).cells(entry)
                hp = cell_settings(cell, Path("data")).hp
                assert entry.setting is not None
                value = hp.chunk if name == "figure3" else hp.chunk * hp.rollout
                assert value == entry.setting.value and hp.execute <= hp.chunk


def test_figure_without_a_record_is_one_line(capsys: pytest.CaptureFixture[str]):
    assert main(["figure5"]) == 2
    assert "figure5: what figure 5 shows is not recorded" in capsys.readouterr().err
