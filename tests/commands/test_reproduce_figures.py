"""Figures of the command that runs tables: cells by a setting, studies of models, films, reports."""

import csv
from pathlib import Path

import pytest

from experiments.cli.arguments import read_flags
from experiments.model_error import Args as StudyArgs
from experiments.model_error_study.rows import ChunkRow
from experiments.reproduce import main
from experiments.reproduction import films
from experiments.reproduction.cells import Plan
from experiments.reproduction.comparison import read_finished
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
    assert "candidates: 2" in said and "are not known to this project: these are ours alone" in said
    folder = fake.out / "report"
    lines = (folder / "mine_laptop_s2.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["setting"] for row in rows] == ["candidates: 2", "candidates: 8"]
    assert {row["verdict"] for row in rows} == {"-"}
    assert (folder / "mine_laptop_s2.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "mine_laptop_s2.html").read_text()
    assert "data:image/png;base64," in page and "data:image/gif;base64," in page
    assert "MAC, candidates: 2" in page and len(page) < 10_000_000


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
    suite, plan = load_suite("figure2"), Plan(tmp_path, "laptop", 4, Path("data"))
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
