"""Figures of the command that runs tables: cells by a setting, studies of models, films, reports."""

import csv
from pathlib import Path

import pytest

from experiments.cli.arguments import read_flags
from experiments.model_error import Args as StudyArgs
from experiments.model_error_study.rows import ChunkRow
from experiments.reproduce import main
from experiments.reproduction import films
from experiments.reproduction.cells import Plan, cells_of
from experiments.reproduction.comparison import Finished, read_finished
from experiments.reproduction.html_report import curve_panels
from experiments.reproduction.model_errors import policy_jobs, read_errors, study_cell, study_file, study_jobs
from experiments.reproduction.suites import load_suite
from mac.errors import UserError
from tests.helpers.fake_runs import TASKS, Fake

ROOT = Path(__file__).parents[2]
FIGURE = f"""
kind = "curve"
title = "by candidates"
source = "nowhere"
measure = "success"
axis = "candidates"
[methods]
mac = "MAC"
[[setting]]
value = 2
flags = ["--hp.candidates", "2"]
[[setting]]
value = 8
[[row]]
env = "{TASKS[1]}"
algos = ["mac"]
"""


@pytest.fixture
def fake(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path, finished, monkeypatch)


def test_figure_runs_a_cell_for_each_setting_and_draws_them(fake: Fake, capsys: pytest.CaptureFixture[str]):
    fake.suite.write_text(FIGURE)
    assert fake.run() == 0
    assert len(fake.calls) == 2 and len(list(fake.out.glob("mac_*"))) == 2
    for run in fake.out.glob("mac_*"):
        (run / "view-task2-c.gif").write_bytes(b"GIF89a")
    capsys.readouterr()
    assert fake.run("--report") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "candidates: 2" in said and "source: nowhere" in said and "not known to this project" not in said
    folder = fake.out / "report"
    lines = (folder / "mine_laptop_s2.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["setting"] for row in rows] == ["candidates: 2", "candidates: 8"]
    assert {row["verdict"] for row in rows} == {"-"}
    assert (folder / "mine_laptop_s2.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "mine_laptop_s2.html").read_text()
    assert "data:image/png;base64," in page and "data:image/gif;base64," in page
    assert "candidates: 2</span>" in page and len(page) < 10_000_000


@pytest.mark.parametrize(
    "name, panels, lines",
    [
        ("grades", 4, ["MAC", "F-MPC", "IQL", "FQL", "flow BC"]),  # one for each grade
        ("figure3", 4, [f"actions per chunk: {value}" for value in (1, 5, 10, 25)]),  # for each environment
        (
            "figure8",
            4,
            [f"{each} per chunk" for each in ("1 action", "5 actions", "10 actions", "25 actions")],
        ),
        ("table3", 5, list(load_suite("table3").methods.values())),
    ],
)
def test_curves_of_a_setting_have_a_panel(name: str, panels: int, lines: list[str]):
    """An algorithm has the same colour in all of them, whatever else is finished."""
    suite, plan = load_suite(name), Plan(Path("out"), "laptop", 2, Path("data"))
    cells = [cell for cell in cells_of(suite.entries, plan) if cell.algo != "fmpc"]
    nothing = Finished(cells[0], Path("f"), None, (), (), (), (), 0.0, "")  # pyright: ignore[reportArgumentType]
    found = curve_panels(suite, suite.entries, {cell: nothing for cell in cells}, plan)
    assert len(found) == panels == len({panel.title for panel in found})
    for panel in found:
        assert all(line.name == lines[line.place] for line in panel.lines)
        assert len({line.place for line in panel.lines}) == len(panel.lines)


def test_studies_of_models_are_commands_that_are_understood(tmp_path: Path):
    """One for each chunk length, after the one that makes the data where there are none."""
    suite = load_suite("figure2")
    for preset in ("laptop", "paper"):
        plan = Plan(tmp_path / "out", preset, 4, tmp_path)
        made, *jobs = study_jobs(suite, suite.entries, plan)
        assert made.words[0] == "generate_data.py" and len(jobs) == 4
        assert all(job.after == (made.done,) for job in jobs)
        args = [read_flags(StudyArgs, job.words[1:], "", StudyArgs()) for job in jobs]
        assert [each.chunks for each in args] == [(1,), (5,), (10,), (25,)]
        assert {each.env for each in args} == {"puzzle-4x5-play-v0"} and {each.seeds for each in args} == {4}


def test_figure_of_model_errors_is_drawn_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = (ROOT / "experiments" / "results" / "model_error_puzzle-3x3.csv").read_text().splitlines(True)
    suite, plan, path = load_suite("figure2"), Plan(tmp_path, "laptop", 4, Path("data")), tmp_path
    for entry in suite.entries[:2]:
        assert entry.setting is not None
        path = study_file(study_cell(suite, entry, plan), plan)
        path.parent.mkdir(parents=True)
        kept = (
            line for line in source if not line[0].isdigit() or line.startswith(f"{entry.setting.value:g},")
        )
        path.write_text("".join(kept))
    assert main(["figure2", "--out", str(tmp_path), "--report"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "actions per chunk: 5" in said and "because not trained: 2" in said
    (page,) = (tmp_path / "report").glob("*.html")
    assert "data:image/png;base64," in page.read_text()
    path.write_text("chunk,horizon\n1,2\n")
    with pytest.raises(UserError, match="damaged"):
        read_errors(path, ChunkRow)


def test_errors_of_runs_and_films_are_asked_of_finished_cells(fake: Fake):
    assert fake.run("--env", TASKS[1]) == 0
    cell = fake.plan.cell(TASKS[1], "mac")
    run = read_finished(cell, fake.plan)
    assert run is not None
    (job,) = policy_jobs(load_suite("figure8"), [cell], fake.plan)
    assert job.words[:5] == ("model_error.py", "--steps", "0", "--policy", str(fake.plan.folder(cell)))
    assert not policy_jobs(load_suite("figure3"), [cell], fake.plan)
    (film,) = films.film_jobs([run], fake.plan)
    film.done.parent.mkdir()
    film.done.write_bytes(bytes(films.MOST_BYTES + 1))
    assert not films.film_jobs([run], fake.plan)
    assert films.films([run], fake.plan) == ([], [film.done])  # no room
