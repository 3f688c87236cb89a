"""Row files survive kills, full disks and second processes; records are complete and atomic."""

import errno
import fcntl
import math
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from mac import atomic_files
from mac.errors import UserError
from mac.run.io import run_metadata
from mac.run.io.eval_rows import Evaluation, eval_rows, warnings_of
from mac.run.io.logger import (
    EVAL,
    METRICS,
    JsonlWriter,
    RunLog,
    append_row,
    check_appendable,
    read_rows,
)
from mac.types import Episodes

EPISODES = Episodes(
    success=jnp.array([[[True, False, True, True]], [[False, False, False, False]]]),
    episode_return=jnp.array([[[-10.0, -200.0, -20.0, -30.0]], [[-200.0] * 4]]),
    length=jnp.array([[[10, 200, 20, 30]], [[200] * 4]]),
    dropped=jnp.array([[[0, 3, 0, 1]], [[0] * 4]]),
)


def test_metrics_have_one_row_per_seed(tmp_path: Path):
    with RunLog(tmp_path) as log:
        log.metrics(
            100, (3, 4), {"critic/loss": np.float32([0.1, 2.0]), "value/loss": np.float32([1e-8, 3.5])}
        )
    assert list(read_rows(tmp_path / METRICS)) == [
        {"step": 100, "seed": 3, "critic/loss": 0.1, "value/loss": 1e-8},
        {"step": 100, "seed": 4, "critic/loss": 2.0, "value/loss": 3.5},
    ]


def test_every_float32_is_read_back_exactly(tmp_path: Path):
    bits = np.random.default_rng(0).integers(0, 2**32, 2000, dtype=np.uint32)
    values = bits.view(np.float32)
    with RunLog(tmp_path) as log:
        log.metrics(1, range(2000), {"x": values})
    back = np.float32([row["x"] for row in read_rows(tmp_path / METRICS)])
    finite = np.isfinite(values)
    np.testing.assert_array_equal(back[finite], values[finite])
    assert np.isnan(back[~finite]).all() and "NaN" not in (tmp_path / METRICS).read_text()


def test_actions_that_are_not_finite_name_seed_and_task():
    none = jnp.zeros((2, 3, 4), jnp.int32)
    result = Episodes(none > 0, none.astype(float), none, none, bad_action=(none > 0).at[1, 2, 3].set(True))
    with pytest.raises(UserError, match=r"update 500: the policy of seed 7 .* not finite in task 5"):
        eval_rows(Evaluation(500, (1, 4, 5), result, "c"), (6, 7))


def test_eval_rows_are_means_over_episodes():
    rows = eval_rows(Evaluation(500, (2,), EPISODES, "c"), (0, 1))
    assert rows[0] == {
        "step": 500, "seed": 0, "task": 2, "success": 0.75, "return": -65.0, "length": 65.0,
        "episodes": 4, "engine": "c", "dropped": 4, "unstable": 0,
    }  # fmt: skip
    assert rows[1]["seed"] == 1 and rows[1]["success"] == 0.0 and rows[1]["return"] == -200.0


def test_contacts_left_out_are_one_line_with_tasks_and_remedy():
    dropped = jnp.asarray([[[0, 0], [1, 2], [0, 1000]], [[0, 0], [4, 0], [0, 0]]])
    none = jnp.zeros(dropped.shape)
    result = Episodes(none > 0, none, dropped, dropped)
    (said,) = warnings_of(eval_rows(Evaluation(500, (1, 4, 5), result, "mjx"), (0, 1)), "--eval.engine")
    assert "\n" not in said and said.startswith("warning: engine mjx")
    assert "1,007 contacts (task 4: 7, task 5: 1,000)" in said and "--eval.engine c" in said
    result = Episodes(none > 0, none, dropped, 0 * dropped)
    clean = eval_rows(Evaluation(500, (1, 4, 5), result, "mjx"), (0, 1))
    assert warnings_of(clean, "--eval.engine") == []


def test_unstable_simulations_are_counted_and_are_one_line():
    none = jnp.zeros((2, 3, 2), jnp.int32)
    unstable = (none > 0).at[0, 1].set(True).at[1, 2, 0].set(True)
    result = Episodes(none > 0, none.astype(float), none, none, unstable=unstable)
    rows = eval_rows(Evaluation(500, (1, 4, 5), result, "c"), (0, 1))
    assert [row["unstable"] for row in rows] == [0, 2, 0, 0, 0, 1]
    (said,) = warnings_of(rows, "--engine")
    assert "on engine c became unstable in 3 episodes (task 4: 2, task 5: 1)" in said
    assert "another --engine" in said and "\n" not in said


def test_eval_rows_name_each_seed_and_task():
    shape = (2, 3, 1)
    success = jnp.arange(6).reshape(shape) % 2 == 0
    ones = jnp.ones(shape, jnp.int32)
    result = Episodes(success, jnp.arange(6.0).reshape(shape), ones, ones)
    rows = eval_rows(Evaluation(0, (1, 4, 5), result, "mjx"), (7, 8))
    assert [(r["seed"], r["task"], r["return"]) for r in rows] == [
        (7, 1, 0.0), (7, 4, 1.0), (7, 5, 2.0), (8, 1, 3.0), (8, 4, 4.0), (8, 5, 5.0),
    ]  # fmt: skip


def write_steps(log: RunLog, steps: range) -> None:
    for step in steps:
        log.metrics(step, (0, 1), {"loss": np.float32([step / 7, step / 11])})
        if step % 3 == 0:
            log.evals(Evaluation(step, (2,), EPISODES, "c"), (0, 1))


def test_resume_cuts_what_the_checkpoint_does_not_cover(tmp_path: Path):
    with RunLog(tmp_path / "whole") as log:
        write_steps(log, range(20))
    with RunLog(tmp_path / "cut") as log:
        write_steps(log, range(8))
        positions = log.sync()
        write_steps(log, range(8, 13))  # lost work: the process is killed here
    with open(tmp_path / "cut" / METRICS, "a") as file:
        file.write('{"step": 13, "se')
    with RunLog(tmp_path / "cut", positions) as log:
        write_steps(log, range(8, 20))
    for name in (METRICS, EVAL):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_resume_without_a_checkpoint_starts_empty(tmp_path: Path):
    with RunLog(tmp_path) as log:
        write_steps(log, range(5))
    with RunLog(tmp_path, {}) as log:
        assert log.sync() == {METRICS: 0, EVAL: 0}
    assert not list(read_rows(tmp_path / METRICS))


WRITER = """
import os, pathlib, signal, sys, time
import numpy as np
from mac import atomic_files as files
from mac.run.io.logger import RunLog

folder, saved = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1], "saved.json")

def write(last):
    start, positions = files.read_json(saved) if saved.exists() else (0, {})
    with RunLog(folder, positions) as log:
        for step in range(start, last or 10**9):
            log.metrics(step, range(3), {"loss": np.float32([step, step / 3, -step])})
            if step % 50 == 49:
                files.write_json(saved, [step + 1, log.sync()])

for seconds in (0.05, 0.1, 0.17, 0.23, 0.31):
    if not (child := os.fork()):
        write(None)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
write(files.read_json(saved)[0] + 120)
"""


def test_killed_writer_neither_loses_nor_doubles_rows(tmp_path: Path):
    subprocess.run([sys.executable, "-c", WRITER, str(tmp_path)], check=True, capture_output=True)
    rows = [(row["step"], row["seed"]) for row in read_rows(tmp_path / METRICS)]
    assert len(rows) > 3 * 120, "the kills must fall into the writing"
    assert rows == [(step, seed) for step in range(len(rows) // 3) for seed in range(3)]


def test_torn_last_line_is_skipped(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}')
    assert list(read_rows(path)) == [{"a": 1}]


def test_broken_line_is_named(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not a JSON object"):
        list(read_rows(path))


def test_null_is_read_as_nan(tmp_path: Path):
    with RunLog(tmp_path) as log:
        log.metrics(1, (0,), {"x": np.float32([np.inf])})
    (row,) = read_rows(tmp_path / METRICS)
    assert math.isnan(row["x"])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_is_a_user_error():
    writer = JsonlWriter(Path("/dev/full"), 0)
    said = r"cannot write /dev/full: No space left on device; free some space, .*; then --resume$"
    with pytest.raises(UserError, match=said):
        writer.write([{"a": 1}])
    writer.close()


def test_rows_that_did_not_fit_are_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    writer = JsonlWriter(tmp_path / "rows.jsonl")
    writer.write([{"a": 1}])
    whole = writer._file

    class Full:
        def write(self, data):
            whole.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        def __getattr__(self, name):
            return getattr(whole, name)

    monkeypatch.setattr(writer, "_file", Full())
    with pytest.raises(UserError, match="No space left"):
        writer.write([{"a": 2}, {"a": 3}])
    monkeypatch.setattr(writer, "_file", whole)
    writer.write([{"a": 4}])
    writer.close()
    assert [row["a"] for row in read_rows(tmp_path / "rows.jsonl")] == [1, 4]


def test_two_writers_of_one_file_are_refused(tmp_path: Path):
    with RunLog(tmp_path), pytest.raises(UserError, match="being written by another process"):
        RunLog(tmp_path, {})
    RunLog(tmp_path, {}).close()


@pytest.mark.parametrize(
    ("content", "position", "message"),
    [
        ('{"a": 1}\n', None, "holds a run already: add --resume"),
        ('{"a": 1}\n', 100, "has 9 bytes but its checkpoint was written at 100"),
        ('{"a": 1}\n{"a": 2}\n', 5, "was edited after its checkpoint"),
    ],
)
def test_files_that_do_not_fit_the_checkpoint_are_left_alone(tmp_path: Path, content, position, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        JsonlWriter(path, position)
    assert path.read_text() == content


def test_rows_that_were_edited_since_are_refused_and_left_alone(tmp_path: Path):
    with RunLog(tmp_path) as log:
        write_steps(log, range(20))
        marks = log.sync(), log.checksums()
    path = tmp_path / METRICS
    text = path.read_bytes()
    lines = text.splitlines(keepends=True)
    digit = text.replace(b'"step": 12,', b'"step": 13,', 1)
    for edited in (digit, b"".join([lines[1], lines[0], *lines[2:]])):
        assert len(edited) == len(text) and edited != text
        path.write_bytes(edited)
        with pytest.raises(UserError, match="was edited after its checkpoint"):
            RunLog(tmp_path, *marks)
        assert path.read_bytes() == edited
    path.write_bytes(text + b'{"step": 20')
    with RunLog(tmp_path, *marks) as log:
        assert (log.sync(), log.checksums()) == marks
        write_steps(log, range(20, 30))
        later = log.sync(), log.checksums()
    RunLog(tmp_path, *later).close()
    RunLog(tmp_path, marks[0]).close()  # a checkpoint of an older version tells no checksums


def test_a_row_is_appended_after_another_writer_is_done(tmp_path: Path):
    """The other one holds the file, and adds a row, while we wait: none is lost."""
    path = tmp_path / "rows.jsonl"
    append_row(path, {"a": 1})
    with open(path, "ab") as other:
        other.write(b'{"a": 2}\n{"a"')
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="being written by another process"):
            append_row(path, {"a": 3}, patience=0.1)
    append_row(path, {"a": 3})
    assert [row["a"] for row in read_rows(path)] == [1, 2, 3]


def test_a_file_that_cannot_be_appended_to_is_found_early(tmp_path: Path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "rows.jsonl", tmp_path):
        with pytest.raises(UserError, match=f"cannot write {path}: .*; choose another file with --out"):
            check_appendable(path, "--out")
    check_appendable(tmp_path / "new" / "rows.jsonl", "--out")
    assert list((tmp_path / "new").iterdir()) == []


def test_unwritable_folder_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        RunLog(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="cannot write"):
        atomic_files.write_json(tmp_path / "file" / "config.json", {})


def test_json_is_replaced_whole_or_not_at_all(tmp_path: Path):
    class Explodes:
        def __str__(self):
            raise RuntimeError

    path = tmp_path / "config.json"
    atomic_files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError):
        atomic_files.write_json(path, {"a": 2, "b": Explodes()})
    assert atomic_files.read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_each_launch_is_recorded(tmp_path: Path):
    run_metadata.record_launch(tmp_path, {"algo": "mac", "out": tmp_path})
    run_metadata.record_launch(tmp_path, {"algo": "mac", "out": tmp_path}, resumed_from=500)
    assert atomic_files.read_json(tmp_path / "config.json") == {"algo": "mac", "out": str(tmp_path)}
    first, second = atomic_files.read_json(tmp_path / "run.json")["launches"]
    assert (first["resumed_from"], second["resumed_from"]) == (None, 500)
    assert first["versions"]["numpy"] == np.__version__
    assert "missing" not in {first["versions"][name] for name in ("jax", "jaxlib", "mujoco", "mujoco-mjx")}
    assert first["hardware"]["cores"] >= 1 and first["hardware"]["memory_gib"] > 0.1
    assert set(first) >= {"started", "command", "git", "hardware", "environment"}


BROKEN_RECORDS = {
    "{": "is not JSON",
    "{}": "launches is missing",
    "null": "null where a table was expected",
    "[]": "a list where a table was expected",
    '"text"': "a text where a table was expected",
    '{"launches": 3}': "launches is a number",
    '{"launches": [3]}': "a launch: a number where a table was expected",
    '{"launches": [{"folder": 3}]}': "a launch: folder is a number",
    "[" * 100_000: "is not JSON (nested too deeply)",
}


@pytest.mark.parametrize("text", BROKEN_RECORDS, ids=range(len(BROKEN_RECORDS)))
def test_a_broken_record_is_set_aside_and_begun_anew(text: str, tmp_path: Path):
    path = tmp_path / "run.json"
    for attempt, name in enumerate(("run.json.damaged", "run.json.damaged-2")):
        path.write_text(text)
        with pytest.raises(UserError) as caught:
            run_metadata.launches(tmp_path)
        assert str(path) in str(caught.value) and BROKEN_RECORDS[text] in str(caught.value)
        (note,) = run_metadata.record_launch(tmp_path, {}, resumed_from=5 * attempt)
        assert note.startswith("note: ") and f"called {name} now" in note and "\n" not in note
        assert (tmp_path / name).read_text() == text
        (launch,) = run_metadata.launches(tmp_path)
        assert launch["resumed_from"] == 5 * attempt


def test_the_end_is_recorded_even_if_the_record_is_gone(tmp_path: Path):
    run_metadata.record_end(tmp_path, step=10)
    (launch,) = run_metadata.launches(tmp_path)
    assert launch["step"] == 10 and "ended" in launch


def test_a_resume_elsewhere_says_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("JAX_ENABLE_CUSTOM_PRNG", "0")
    assert run_metadata.record_launch(tmp_path, {}) == []
    assert run_metadata.record_launch(tmp_path, {}, resumed_from=5) == []
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_max_isa=AVX2")
    monkeypatch.delenv("JAX_ENABLE_CUSTOM_PRNG")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))  # which changes no number
    monkeypatch.setattr(run_metadata, "cpu_model", lambda: "Abacus 3")
    (note,) = run_metadata.record_launch(tmp_path, {}, resumed_from=5)
    last = run_metadata.launches(tmp_path)[-1]
    assert last["environment"]["XLA_FLAGS"] == "--xla_cpu_max_isa=AVX2"
    before = run_metadata.launches(tmp_path)[0]["hardware"]["cpu"]
    assert note == (
        f"note: this launch differs from the last one in cpu ({before} then, Abacus 3 now), "
        "JAX_ENABLE_CUSTOM_PRNG (0 then, unset now), XLA_FLAGS (unset then, --xla_cpu_max_isa=AVX2 now): "
        "numbers may differ in their last bits from those of a run that was never stopped"
    )
    assert run_metadata.differences(
        {"versions": {"jax": "0.1"}}, {"versions": {"jax": "0.2"}, "environment": {}}
    )
    assert (
        run_metadata.differences({}, {"environment": {"XLA_FLAGS": "x"}}) is None
    )  # older records tell nothing


def test_a_resume_in_other_arithmetic_says_so(tmp_path: Path):
    tf32, bf16 = ({"precision": name, "kernels": "plain"} for name in ("tf32", "bf16"))
    assert run_metadata.record_launch(tmp_path, {}, numerics=tf32) == []
    assert run_metadata.record_launch(tmp_path, {}, resumed_from=5, numerics=tf32) == []
    (note,) = run_metadata.record_launch(tmp_path, {}, resumed_from=5, numerics=bf16)
    assert note == (
        "note: this launch differs from the last one in precision (tf32 then, bf16 now): numbers may differ "
        "from those of a run that was never stopped"
    )
    assert run_metadata.launches(tmp_path)[-1]["numerics"] == bf16


def test_a_pipe_in_place_of_a_file_is_refused_not_waited_for(tmp_path: Path):
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    for use in (
        lambda: list(read_rows(pipe)),
        lambda: append_row(pipe, {}),
        lambda: check_appendable(pipe, "--out"),
        lambda: atomic_files.read_json(pipe),
    ):
        with pytest.raises(UserError, match=r"rows\.jsonl: a pipe or a device, no regular file"):
            use()
