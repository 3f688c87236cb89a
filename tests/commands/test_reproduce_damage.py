"""Cells that a report must leave out, and why; reports without any number say what is there instead."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.reproduce import main
from experiments.reproduction.cells import Progress, progress
from experiments.reproduction.cost import Estimator
from mac.run.io.logger import EVAL
from tests.helpers.fake_runs import TASKS, Fake, write_finished, write_meta

Damage = Callable[[Path], object]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The table of three tasks, two of which are finished."""
    fake = Fake(tmp_path, tmp_path / "none", monkeypatch)
    for task in TASKS[:2]:
        write_finished(fake.plan, fake.plan.cell(task, "mac"), 0.25, 0.5, 0.75)
    return fake


def folder_of(fake: Fake) -> Path:
    return fake.plan.folder(fake.plan.cell(TASKS[0], "mac"))


def meta_of(folder: Path) -> Path:
    (path,) = folder.glob("checkpoints/*/meta.json")
    return path


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def lines_of(folder: Path) -> list[str]:
    return (folder / EVAL).read_text().splitlines(keepends=True)


def keep(folder: Path, lines: list[str]) -> None:
    (folder / EVAL).write_text("".join(lines))


def forget_record(folder: Path) -> None:
    """Makes the checkpoint one of an older version, which records nothing of the rows."""
    meta = json.loads(meta_of(folder).read_text())["meta"]
    write_meta(meta_of(folder).parent, meta | {"log": {}, "checksums": {}})


ALTERED: dict[str, tuple[Damage, str]] = {
    "shortened": (lambda f: keep(f, lines_of(f)[:-2]), "the file was shortened"),
    "edited": (lambda f: change(f / EVAL, "0.75", "0.95"), "was edited after its checkpoint"),
    "added": (lambda f: keep(f, [*lines_of(f), lines_of(f)[-1]]), "rows were added"),
    "old": (lambda f: (forget_record(f), keep(f, lines_of(f)[:-1])), "the last complete evaluation is of"),
    "seed": (
        lambda f: (forget_record(f), keep(f, [x for x in lines_of(f) if '"seed": 0' in x])),
        "it has evaluations of 1 of 2 seeds",
    ),
}
BROKEN: dict[str, tuple[Damage, str]] = {
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json is not JSON"),
    "checkpoint": (lambda f: meta_of(f).write_text("{"), "damaged checkpoint"),
    "row": (
        lambda f: (forget_record(f), change(f / EVAL, '{"step"', "}step")),
        "line 1: not a JSON object",
    ),
    "score": (
        lambda f: (forget_record(f), change(f / EVAL, '"success": 0.75', '"success": "a"')),
        "success is no number",
    ),
    "empty": (lambda f: (forget_record(f), keep(f, [])), "holds no complete evaluation"),
    "gone": (lambda f: (f / EVAL).unlink(), "cannot read"),
    "record": (lambda f: (f / "run.json").write_text("]"), "run.json is not JSON"),
    "launch": (lambda f: change(f / "run.json", '"git": null', '"git": "x"'), "git is a text"),
}


@pytest.mark.parametrize("damage, said", [*ALTERED.values(), *BROKEN.values()], ids=[*ALTERED, *BROKEN])
def test_damaged_cell_is_named_and_is_no_number(
    fake: Fake, damage: Damage, said: str, capsys: pytest.CaptureFixture[str]
):
    folder = folder_of(fake)
    damage(folder)
    assert fake.run("--report") == 0  # the other number is shown
    assert "left out, mac on" in capsys.readouterr().out
    lines = (fake.out / "report" / "mine_laptop_s2.md").read_text().splitlines()
    assert lines[-1].endswith("because runs are not finished: 1")  # the third task
    (note,) = [line for line in lines if "left out" in line]
    assert note.startswith(f"- left out, mac on {TASKS[0]}: ") and said in note
    assert note.endswith(f"move {folder} away and run the cell anew")
    report = (fake.out / "report" / "mine_laptop_s2.csv").read_text()
    assert TASKS[1] in report and f",{TASKS[0]}," not in report
    assert fake.run("--list") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if f"{TASKS[0]} " in line]
    assert "unusable" in line and said in line


def test_record_of_older_runs_is_not_asked_for(fake: Fake):
    forget_record(folder_of(fake))
    assert fake.states() == ["done", "done", "missing"]


def test_unusable_cell_is_not_run_until_it_is_moved(fake: Fake, capsys: pytest.CaptureFixture[str]):
    folder = folder_of(fake)
    change(folder / EVAL, "0.75", "0.95")
    assert fake.run("--env", TASKS[0]) == 1
    said = capsys.readouterr().out
    assert not fake.calls and "1 failed" in said and "was edited after its checkpoint" in said
    shutil.move(folder, folder.with_name("kept"))
    assert fake.states() == ["missing", "done", "missing"]


def test_damaged_record_of_a_cut_cell_has_no_time(fake: Fake):
    """A list goes on; `run.py` renames the record when it continues the run."""
    cell = fake.plan.cell(TASKS[0], "mac")
    (folder_of(fake) / "run.json").write_text("]")
    change(folder_of(fake) / "config.json", '"steps": ', '"steps": 9')
    state = progress(cell, fake.plan)
    assert state.status == "cut"
    Estimator(fake.plan).learn(cell, state)
    Estimator(fake.plan).learn(cell, Progress("done", 10, 10))


def test_many_damaged_cells_are_counted(fake: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cells = [fake.plan.cell(f"scene-play-singletask-task{i}-v0", "mac") for i in range(1, 6)]
    cells += [fake.plan.cell(f"cube-double-play-singletask-task{i}-v0", "mac") for i in range(1, 6)]
    rows = "".join(f'[[row]]\nenv = "{cell.env}"\npublished = {{ mac = [1] }}\n' for cell in cells)
    head = fake.suite.read_text().partition("[[row]]")[0]
    fake.suite.write_text(f'{head}[[row]]\nenv = "{TASKS[0]}"\npublished = {{ mac = [1] }}\n{rows}')
    for cell in cells:
        keep(write_finished(fake.plan, cell, 0.5), [])
    assert fake.run("--report") == 0
    said = capsys.readouterr().out
    assert said.count("left out, mac on ") == 8 and "left out: 2 more cells with damaged files" in said


# Reports without a number.


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_report_names_cells_of_other_sizes(fake: Fake, capsys: pytest.CaptureFixture[str]):
    write_finished(fake.plan, fake.plan.cell(TASKS[0], "mac", ("--eval.episodes", "5")), 0.5)
    words = [str(fake.suite), "--out", str(fake.out), "--report"]
    assert main([*words, "--seeds", "3"]) == 2
    line = refused(capsys)
    assert "any number of mine (preset laptop, 3 seeds)" in line
    assert "it has 2 cells of --preset laptop --seeds 2; " in line
    assert "it has 1 cell of --preset laptop --seeds 2 and other flags after `--`" in line
    assert main([*words, "--seeds", "2", "--preset", "paper"]) == 2
    assert "2 cells of --preset laptop --seeds 2" in refused(capsys)
    assert not (fake.out / "report").exists()


def test_report_says_how_many_cells_are_finished(fake: Fake, capsys: pytest.CaptureFixture[str]):
    head, _, rows = fake.suite.read_text().partition("[[row]]")
    fake.suite.write_text(f"{head}[[row]]{rows.split('[[row]]')[-1]}")  # only the mean of three
    assert fake.run("--report") == 2
    assert "2 of its 3 cells finished; run the rest first" in refused(capsys)
    keep(folder_of(fake), [])
    assert fake.run("--report") == 2
    line = refused(capsys)
    assert "1 of its 3 cells finished; left out, mac on " in line and "the file was shortened" in line


def test_report_names_misspelt_flags(fake: Fake, capsys: pytest.CaptureFixture[str]):
    assert fake.run("--report", "--", "--hp.chunkk", "3") == 2
    line = refused(capsys)
    assert "not available, MAC: " in line and "did you mean --hp.chunk" in line
    assert "2 cells of --preset laptop --seeds 2 without these flags" in line and "first" not in line


def test_times_are_looked_for_in_their_own_sizes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "times" / "a-cpu"
    folder.mkdir(parents=True)
    (folder / "mac_cube-double-play-oraclerep-v0_laptop_s1.json").write_text("{}")
    assert main(["table4", "--out", str(tmp_path), "--report"]) == 2
    line = refused(capsys)
    assert "table4 (preset paper, 1 seed); it has 1 cell of --preset laptop; run" in line


def test_file_in_place_of_the_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["table2", "--out", str(out), "--report"]) == 2
        assert f"--out={out}: {tmp_path / 'file'} is a file; choose a folder" in refused(capsys)
