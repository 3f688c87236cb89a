"""Checkpoints: exact, atomic and written while training goes on."""

import errno
import os
import resource
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mac.errors import UserError
from mac.run.io.checkpoint import TEMPORARY, CheckpointStore
from tests.helpers.small_states import State, assert_same_bits, make_state


def template_of(state: State) -> State:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)


def test_restored_state_and_meta_are_the_saved_bits(tmp_path: Path):
    state = make_state()
    meta = {"config": {"hp": {"width": 5}, "env": "cube"}, "logs": {"metrics.jsonl": 12345}}
    with CheckpointStore(tmp_path / "c") as store:
        store.save(40, state, meta)
    found = CheckpointStore(tmp_path / "c").restore(template_of(state))
    assert found.step == 40
    assert found.meta == meta
    assert_same_bits(found.state, state)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found.state))


def test_buffers_may_be_donated_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The write is held back until the training step has overwritten the donated buffers."""
    overwritten = threading.Event()
    write = CheckpointStore._write

    def late(self: CheckpointStore, *args: object) -> None:
        assert overwritten.wait(20)
        write(self, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(CheckpointStore, "_write", late)
    step = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    state = first = {"w": step(jnp.zeros((64, 64)) + 2)}
    with CheckpointStore(tmp_path) as store:
        store.save(1, state, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        donated = first["w"].is_deleted()
        overwritten.set()
    assert donated  # a view held by the writer would have prevented it
    found = CheckpointStore(tmp_path).restore(state)
    np.testing.assert_array_equal(found.state["w"], 3)
    # What was restored may be donated too.
    np.testing.assert_array_equal(step(found.state)["w"], 4)


def test_last_k_are_kept_and_the_newest_is_restored(tmp_path: Path):
    with CheckpointStore(tmp_path, keep=2) as store:
        assert store.latest() is None
        for step in (5, 900, 1000):
            store.save(step, {"x": jnp.full(3, float(step))}, {"at": step})
        store.wait()
        assert store.steps() == [900, 1000]
        assert store.latest() == 1000
        assert store.meta()["at"] == 1000
        assert store.meta(900)["at"] == 900
        template = {"x": jnp.zeros(3)}
        np.testing.assert_array_equal(store.restore(template).state["x"], 1000)
        np.testing.assert_array_equal(store.restore(template, step=900).state["x"], 900)


def test_saved_step_keeps_its_arrays_and_gets_the_new_meta(tmp_path: Path):
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.zeros(2)}, {"first": True})
        store.save(5, {"x": jnp.ones(2)}, {"first": False})
        found = store.restore({"x": jnp.zeros(2)})
    assert found.meta == {"first": False}
    np.testing.assert_array_equal(found.state["x"], np.zeros(2))


def test_meta_is_taken_when_save_is_called(tmp_path: Path):
    logs = {"metrics.jsonl": 10}
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.zeros(2)}, {"logs": logs})
        logs["metrics.jsonl"] = 99
    assert CheckpointStore(tmp_path).meta()["logs"] == {"metrics.jsonl": 10}


# Interruptions.


def test_half_written_checkpoints_are_ignored_and_then_deleted(tmp_path: Path):
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.ones(2)}, {})
    half = tmp_path / f"{TEMPORARY}000000009"
    (half / "state").mkdir(parents=True)
    deleted = tmp_path / f"{TEMPORARY}000000003-old"
    deleted.mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    with CheckpointStore(tmp_path) as store:
        assert store.steps() == [5]
        np.testing.assert_array_equal(store.restore({"x": jnp.zeros(2)}).state["x"], 1)
        store.save(9, {"x": jnp.ones(2)}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["000000005", "000000009", "notes.txt"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import numpy as np
import orbax.checkpoint
from mac.run.io.checkpoint import CheckpointStore

def train(folder):
    with CheckpointStore(folder, keep=2) as store:
        for step in range(1, 10_000):
            # Leaves large and small, all equal to the step: a mixture of two saves would show.
            state = {"a": np.full((8, 64, 64), step, np.float32), "b": np.full(3, step, np.int32)}
            store.save(step, state, {"step": step})

for trial, delay in enumerate(sys.argv[2:]):
    folder = Path(sys.argv[1]) / str(trial)
    child = os.fork()  # a fork, since importing takes much longer than the test
    if child == 0:
        train(folder)
        os._exit(0)
    probe = CheckpointStore(folder)
    limit = time.monotonic() + 60
    while (probe.latest() or 0) < 2 and time.monotonic() < limit:
        time.sleep(0.002)
    time.sleep(float(delay))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status
"""


def test_kill_at_any_moment_leaves_a_complete_checkpoint(tmp_path: Path):
    delays = [f"{d:.3f}" for d in np.random.default_rng(0).uniform(0, 0.4, size=8)]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), *delays],
        check=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"},
    )
    template = {"a": jnp.zeros((8, 64, 64)), "b": jnp.zeros(3, jnp.int32)}
    interrupted = 0
    for trial in range(len(delays)):
        folder = tmp_path / str(trial)
        interrupted += any(p.name.startswith(TEMPORARY) for p in folder.iterdir())
        with CheckpointStore(folder) as store:
            assert 1 <= len(store.steps()) <= 3  # 3 if killed before the oldest was deleted
            for step in store.steps():
                found = store.restore(template, step)
                np.testing.assert_array_equal(found.state["a"], step)
                np.testing.assert_array_equal(found.state["b"], step)
                assert found.meta == {"step": step}
    assert interrupted > 0  # otherwise the kills all missed the writing


def test_full_disk_is_one_line_and_keeps_the_previous(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """A real refusal by the system: files may not grow beyond 64 kB."""
    noise = {"x": jax.random.normal(jax.random.key(0), (512, 512))}  # 1 MB that does not compress
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.ones(2)}, {})
        store.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
        try:
            store.save(6, noise, {})
            with pytest.raises(UserError, match=r"File too large.* the one of step 5 is intact") as caught:
                store.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "\n" not in str(caught.value)
        assert caplog.records == []  # no traceback on the terminal either
        assert [p.name for p in tmp_path.iterdir()] == ["000000005"]
        store.save(6, noise, {})  # there is space again
        store.wait()
        np.testing.assert_array_equal(store.restore(noise).state["x"], noise["x"])


@pytest.mark.parametrize("where", ["meta", "rename"])
def test_failed_write_is_one_line_and_keeps_the_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
):
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with CheckpointStore(tmp_path) as store:
        store.save(5, {"x": jnp.ones(2)}, {})
        store.wait()
        with monkeypatch.context() as patch:
            if where == "meta":
                patch.setattr(Path, "write_text", full)
            else:
                patch.setattr(os, "rename", full)
            store.save(6, {"x": jnp.ones(2)}, {})
            with pytest.raises(UserError, match=r"No space left .* the one of step 5 is intact") as caught:
                store.wait()
        assert "\n" not in str(caught.value)
        assert [p.name for p in tmp_path.iterdir()] == ["000000005"]
        store.save(6, {"x": jnp.ones(2)}, {})  # there is space again
        store.wait()
        assert store.steps() == [5, 6]


def test_failure_of_a_save_is_reported_by_the_next_one(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    store = CheckpointStore(tmp_path / "file" / "c")
    store.save(1, {"x": jnp.ones(2)}, {})
    with pytest.raises(UserError, match="cannot write a checkpoint"):
        store.save(2, {"x": jnp.ones(2)}, {})
    store.close()


def test_at_least_one_checkpoint_is_kept(tmp_path: Path):
    with pytest.raises(UserError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


def test_importing_the_module_does_not_import_orbax():
    code = "import sys, mac.run.io.checkpoint; sys.exit('orbax.checkpoint' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, timeout=300).returncode == 0


# What stands in the way.


@pytest.mark.parametrize("is_file", [False, True])
def test_what_has_a_checkpoints_name_and_is_none_is_moved_aside(tmp_path: Path, is_file: bool):
    for attempt, aside in enumerate(("000000004-aside", "000000004-aside-2")):
        other = tmp_path / "000000004"
        if attempt:
            (other / "meta.json").unlink()
        elif is_file:
            other.write_text("mine")
        else:
            (other / "state").mkdir(parents=True)
        with CheckpointStore(tmp_path) as store:
            assert store.steps() == []
            store.save(4, {"a": jnp.ones(3)}, {})
            store.wait()
            assert store.steps() == [4]
            (note,) = store.notes
            assert str(other) in note and f"called {aside} now" in note
        assert (tmp_path / aside).exists()
    if is_file:
        assert (tmp_path / "000000004-aside").read_text() == "mine"


def test_leftovers_that_cannot_be_deleted_are_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file where a folder was expected is deleted; where the system refuses, another name is used."""
    (tmp_path / f"{TEMPORARY}000000002").write_text("a file")
    stuck = tmp_path / f"{TEMPORARY}000000004"
    (stuck / "state").mkdir(parents=True)
    rmtree = shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if Path(path) != stuck:
            rmtree(path, ignore_errors)
        elif not ignore_errors:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    with CheckpointStore(tmp_path) as store:
        store.save(4, {"a": jnp.ones(3)}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [stuck.name, "000000004"]


def test_an_undeletable_checkpoint_does_not_stop_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rename = os.rename

    def refuse(old: Path, new: Path) -> None:
        if str(new).endswith("-old"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse)
    with CheckpointStore(tmp_path, keep=1) as store:
        store.save(4, {"a": jnp.ones(3)}, {})
        store.save(5, {"a": jnp.ones(3)}, {})
        store.wait()
        assert store.steps() == [4, 5] and "old checkpoint 4 (Permission denied)" in store.notes[0]


def test_only_checkpoints_names_are_steps(tmp_path: Path):
    for name in ("5", "0000000005", "٠٠٠٠٠٠٠٠٥", "-00000005", "000000005-aside", "._000000005"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text("{}")
    assert CheckpointStore(tmp_path).steps() == []


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EACCES, "set rights"), (errno.EMFILE, "ulimit -n")],
)
def test_a_write_that_fails_has_the_remedy_that_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
):
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with CheckpointStore(tmp_path) as store:
        monkeypatch.setattr(Path, "write_text", fail)
        store.save(6, {"x": jnp.ones(2)}, {})
        with pytest.raises(
            UserError, match=rf"\({os.strerror(number)}\); there is none before it; .*{advice}"
        ):
            store.wait()
