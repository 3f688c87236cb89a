"""Jobs: cells side by side on this machine, and what is asked of a cluster; `tests/slurm` has a real one."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from envs_mjx.registry import parse
from experiments import reproduce, run
from experiments.launch import dataset, slurm
from experiments.launch.job_options import JobConfig, Jobs, read_jobs
from experiments.launch.settings import DataConfig, parse_command_line
from experiments.reproduction import runner
from experiments.reproduction import slurm_jobs as jobs
from experiments.reproduction.cells import Progress, progress
from experiments.reproduction.runner import Slot, slots
from mac.atomic_files import locked, write_json
from mac.errors import UserError
from mac.run.io.run_metadata import launches
from tests.helpers.command_line import SIZES
from tests.helpers.fake_runs import SUITE, TASKS, Fake

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    return Fake(tmp_path, finished, monkeypatch)


def test_cells_run_side_by_side_and_the_budget_stops_all(fake: Fake, capsys: pytest.CaptureFixture[str]):
    fake.does(task1="hang", task2="hang")
    assert fake.run("--jobs", "local:2", "--budget", "8s") == 0
    said = capsys.readouterr().out
    assert "2 processes at a time" in said and f"mac on {TASKS[1]}: stopped at update" in said
    assert "2 stopped by the budget, 1 not begun" in said
    assert fake.states() == ["cut", "cut", "missing"]
    fake.does(task2="fail")
    assert fake.run("--jobs", "local:2") == 1
    assert f"mac on {TASKS[1]}: failed: --hp.lr=0: must be positive" in capsys.readouterr().out
    assert fake.states() == ["done", "failed", "done"]


def test_interrupt_stops_all_cells(fake: Fake, tmp_path: Path):
    fake.does(task1="hang", task2="hang")
    code = (
        "import sys; from experiments.reproduction import runner; from experiments.reproduce import main; "
        f"runner.program = lambda: [sys.executable, {str(tmp_path / 'fake.py')!r}]; "
        "sys.exit(main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", code, str(fake.suite), "--out", str(fake.out), "--seeds", "2"]
    process = subprocess.Popen([*words, "--jobs", "local:2"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    configs = [fake.out / f"mac_{task}_laptop_s2" / "config.json" for task in TASKS[:2]]
    while not all(path.exists() and task in path.read_text() for path, task in zip(configs, TASKS[:2])):  # noqa: B905
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143 and "Traceback" not in err
    assert f"continue with: python experiments/reproduce.py {fake.suite}" in err
    assert fake.states() == ["cut", "cut", "missing"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_rooms_divide_cores_and_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4, 12)))
    monkeypatch.setattr(runner, "cores", lambda: 8)
    assert slots(1, []) == [Slot()]
    assert [room.cores for room in slots(3, [])] == [(4, 7, 10), (5, 8, 11), (6, 9)]
    assert len(slots(None, [])) == 4
    assert [room.gpu for room in slots(3, ["0", "2"])] == ["0", "2", "0"]
    assert len(slots(None, ["0", "2"])) == 2
    assert [room.cores for room in slots(9, [])][:2] == [(4,), (5,)] and slots(9, [])[8].cores == (4,)
    monkeypatch.setattr(runner, "cores", lambda: 2)  # of a quota
    assert [room.cores for room in slots(2, [])] == [(4,), (5,)]
    assert Slot((4,), "1").environment["CUDA_VISIBLE_DEVICES"] == "1"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_process_has_the_cores_of_its_room():
    mine = os.sched_getaffinity(0)
    core = min(mine)
    with Slot((core,)).entered():
        said = subprocess.run(
            [sys.executable, "-c", "import os; print(os.sched_getaffinity(0))"],
            capture_output=True,
            text=True,
        ).stdout
    assert said.strip() == str({core}) and os.sched_getaffinity(0) == mine


def test_one_process_generates_and_the_others_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[Path] = []

    def generate(name: str, rows: int, path: Path, **_: Any) -> SimpleNamespace:
        made.append(path)
        time.sleep(0.3)
        path.parent.mkdir(parents=True)
        np.savez(path, x=0)
        return SimpleNamespace(hits=1, targets=1)

    monkeypatch.setattr(dataset, "generate_file", generate)
    data, env = DataConfig(dir=tmp_path, rows=1001), parse(TASKS[0])
    choice = dataset.choose_source(data, env)
    assert choice.how == "generate"
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(lambda _: dataset.obtain(choice, data, env), range(4)))
    assert len(made) == 1 and set(paths) == {choice.path}
    assert not list(tmp_path.glob(".*"))


def test_many_may_ask_at_once_whether_a_folder_is_writable(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: dataset.check_writable(tmp_path, "--data.dir"), range(2000)))
    assert not list(tmp_path.iterdir())


def test_discarded_lock_excludes_all_others(tmp_path: Path):
    """Deleting the file of a lock must not let two hold it."""
    inside, most, guard = 0, 0, threading.Lock()

    def work(_: int) -> None:
        nonlocal inside, most
        with locked(tmp_path / "lock", discard=True):
            with guard:
                inside += 1
                most = max(most, inside)
            time.sleep(0.005)
            with guard:
                inside -= 1

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert most == 1 and not (tmp_path / "lock").exists()


# What is asked of a cluster.


def test_jobs_are_local_or_slurm():
    assert read_jobs("slurm") == Jobs("slurm") and read_jobs("local") == Jobs("local")
    assert read_jobs("local:3") == Jobs("local", 3)


def test_options_of_a_job_are_those_of_sbatch():
    job = JobConfig(time="90m", partition="gpu", memory="16G", extra=("qos=high", "exclusive"))
    assert job.minutes == 90 and job.warning == 120
    expected = {"partition": "gpu", "mem": "16G", "requeue": True, "qos": "high", "exclusive": True}
    assert job.options == expected
    assert JobConfig(time="1m").warning == 15  # a quarter at most


@pytest.mark.parametrize(
    "words, said",
    [
        (["--jobs", "local:0"], "--jobs local:0: write slurm, local, or local:N"),
        (["--jobs", "pbs"], "--jobs pbs: write slurm"),
        (["--jobs", "slurm", "--budget", "9m"], "limit the time of jobs with --job.time"),
        (["--jobs", "slurm", "--job.time", "4"], "--job.time 4: write a duration"),
        (["--jobs", "slurm", "--job.time", "30s"], "must be at least 60 seconds"),
        (["--jobs", "slurm", "--job.memory", "lots"], "--job.memory lots: write a size"),
        (["--jobs", "slurm", "--job.extra", "--qos=x"], "unknown flag --qos"),
        (["--jobs", "slurm", "--job.gpus", "-1"], "--job.gpus=-1: must be at least 0"),
    ],
)
def test_wrong_options_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert reproduce.main(["table2", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_run_is_one_process(capsys: pytest.CaptureFixture[str]):
    assert run.main(["--jobs", "local:2"]) == 2
    assert "a run is one process; reproduce.py runs several side by side" in capsys.readouterr().err


def test_machine_without_slurm_is_told_in_one_line(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(slurm.shutil, "which", lambda _: None)
    assert fake.run("--jobs", "slurm") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --jobs slurm") and ("submitit" in line or "no sbatch" in line)
    assert fake.states() == ["missing"] * 3


def test_list_and_other_calls_know_what_the_queue_holds(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Task 1 waits, task 2 runs elsewhere, task 3 had a job that is over."""
    for number, task in enumerate(TASKS, start=1):
        write_json(fake.out / jobs.JOBS / f"mac_{task}_laptop_s2.json", {"job": f"7_{number}"})
    held = {"7_1": slurm.QueuedJob("PENDING", "Priority"), "7_2": slurm.QueuedJob("RUNNING", "node5")}
    monkeypatch.setattr(slurm, "queue", lambda: held)
    assert fake.run("--list", "--algo", "mac") == 0
    said = capsys.readouterr().out
    assert "queued: job 7_1, pending: Priority" in said and "running: job 7_2 on node5" in said
    assert "job 7_3 is over before the cell is; see" in said
    assert "3 cells: 1 missing, 1 queued, 1 running" in said
    assert fake.run("--env", TASKS[0]) == 0  # left to the queue
    assert fake.calls == [] and "1 in another process" in capsys.readouterr().out
    write_json(fake.out / jobs.JOBS / f"mac_{TASKS[0]}_laptop_s2.json", {"no": "job"})
    (cell, *_) = reproduce.cells_of(reproduce.load_suite(str(fake.suite)).entries, fake.plan)
    assert jobs.with_queue({cell: progress(cell, fake.plan)}, fake.plan)[cell] == Progress(
        "missing", 0, progress(cell, fake.plan).steps
    )


@pytest.mark.parametrize(
    "words, kept",
    [
        (["table2", "--jobs", "slurm", "--job.extra", "a=1", "b", "--out", "x"], ["table2", "--out", "x"]),
        (["--jobs", "slurm", "table2", "--job.time=2h"], ["table2"]),
        (["--job.gpus", "1", "table2", "--", "--steps", "5"], ["table2"]),
    ],
)
def test_command_for_states_leaves_the_options_of_jobs_out(words: list[str], kept: list[str]):
    tail = words[words.index("--") :] if "--" in words else []
    assert reproduce._instead(words, "--list") == [*kept, "--list", *tail]


def test_warned_job_lets_its_run_write_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`checkpoint` is called in a handler while the job waits for the run."""
    pytest.importorskip("submitit", reason="the extra `slurm`")
    child = tmp_path / "run.py"
    child.write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n"
        "    time.sleep(0.5); pathlib.Path('checkpoint').touch(); sys.exit(140)\n"
        "signal.signal(signal.SIGUSR2, stop)\n"
        "pathlib.Path('ready').touch(); time.sleep(60)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(slurm, "RUN", child)
    task = slurm.RunTask(tmp_path, [], tmp_path / "log")
    found: list[Any] = []

    def warn(*_: Any) -> None:
        found.append((task.checkpoint(), (tmp_path / "checkpoint").exists()))

    def send() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGUSR2)

    before = signal.signal(signal.SIGUSR2, warn)
    try:
        threading.Thread(target=send).start()
        with pytest.raises(SystemExit) as end:
            task()
    finally:
        signal.signal(signal.SIGUSR2, before)
    ((delayed, saved),) = found
    assert saved and end.value.code == 140 and delayed.function is task


@pytest.mark.slow
def test_cells_of_one_dataset_prepare_it_once(tmp_path: Path):
    """The real run.py: one of two processes generates and converts, the other waits."""
    (tmp_path / "mine.toml").write_text(SUITE.replace("mac", "flow_bc"))
    words = ["--algo", "flow_bc", "--seeds", "1", "--jobs", "local:2", "--env", TASKS[0], TASKS[1]]
    words += ["--out", str(tmp_path / "out"), "--data-dir", str(tmp_path / "data")]
    sizes = [
        "--hp.hidden",
        "8",
        "--hp.batch",
        "8",
        "--hp.cooldown",
        "0",
        "--steps",
        "5",
        "--eval.episodes",
        "1",
    ]
    sizes += ["--data.rows", "2002"]
    assert reproduce.main([str(tmp_path / "mine.toml"), *words, "--", *sizes]) == 0
    logs = [path.read_text() for path in (tmp_path / "out" / "logs").iterdir()]
    assert len(logs) == 2 and sum("expert hit" in log for log in logs) == 1
    assert sum("waiting for another process that generates" in log for log in logs) == 1
    assert len(list((tmp_path / "data" / "stores").glob("[!.]*"))) == 1


def test_unknown_words_of_the_queue_are_no_jobs(monkeypatch: pytest.MonkeyPatch):
    said = "8_0|PENDING|(Resources)\n8_1|RUNNING|node1\n9|COMPLETED|node2\nnonsense\n"
    monkeypatch.setattr(slurm.shutil, "which", lambda _: "squeue")
    monkeypatch.setattr(slurm.subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    assert slurm.queue() == {
        "8_0": slurm.QueuedJob("PENDING", "Resources"),
        "8_1": slurm.QueuedJob("RUNNING", "node1"),
    }

    def refuse(*_: Any, **__: Any) -> None:
        raise subprocess.CalledProcessError(1, ["squeue"], stderr="slurm_load_jobs error: cannot connect\n")

    monkeypatch.setattr(slurm.subprocess, "run", refuse)
    with pytest.raises(UserError, match="squeue: slurm_load_jobs error: cannot connect; try again"):
        slurm.queue()


def test_submitted_run_is_one_that_its_job_continues(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """A stand-in takes the job; what it would call is called here, with settings that were resolved."""
    taken: list[slurm.RunTask] = []

    def take(tasks: list[slurm.RunTask], *_: Any) -> list[str]:
        taken.extend(tasks)
        return ["12"]

    monkeypatch.setattr(slurm, "submit", take)
    out = ["--out", str(tmp_path / "run")]
    assert run.main([*SIZES, *data, "--steps", "5", *out, "--jobs", "slurm", "--job.gpus", "1"]) == 0
    said = capsys.readouterr().out
    assert "job       12, " in said and "scancel 12" in said
    assert run.main(taken[0].command()) == 0
    assert len(launches(tmp_path / "run")) == 1
    assert run.main([*out, "--resume", "--steps", "10", "--jobs", "slurm"]) == 0
    assert run.main(taken[1].command()) == 0
    assert "finished at update 10" in capsys.readouterr().out

    def refuse(*_: Any) -> None:
        raise UserError("--jobs slurm: sbatch refuses: no")

    monkeypatch.setattr(slurm, "submit", refuse)
    config = (tmp_path / "run" / "config.json").read_bytes()
    assert run.main([*out, "--resume", "--steps", "15", "--jobs", "slurm"]) == 2
    assert (tmp_path / "run" / "config.json").read_bytes() == config
    assert run.main([*SIZES, *data, "--out", str(tmp_path / "new"), "--jobs", "slurm"]) == 2
    assert not (tmp_path / "new").exists()


def test_preset_of_a_job_follows_its_gpus():
    for words, preset in ((["--job.gpus", "1"], "paper"), ([], "laptop"), (["--preset", "paper"], "paper")):
        settings, _ = parse_command_line(["--jobs", "slurm", *words])
        assert settings.preset == preset


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep a child whose parent is killed")
def test_child_ends_with_its_killed_parent(tmp_path: Path):
    child, started = tmp_path / "child.py", tmp_path / "pid"
    child.write_text(f"import os, time; open({str(started)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    program = (
        "from pathlib import Path; from experiments.reproduction.processes import LoggedProcess, guarded; "
        f"LoggedProcess(guarded(Path({str(child)!r})), ['child'], Path({str(tmp_path / 'log')!r})).wait()"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT) as parent:
        _until(lambda: started.exists() and started.read_text() != "")
        parent.kill()
    _until(lambda: not Path(f"/proc/{started.read_text()}/cmdline").exists())


def _until(done: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.05)
