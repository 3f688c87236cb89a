"""Exported policies act like the run's own, in processes that cannot import this project."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.export
import numpy as np
import pytest

import mac
from experiments.export import main as export
from experiments.launch.saved_run import SavedRun
from experiments.policy_export.artefact import PLATFORMS, actor
from experiments.policy_export.split_noise import split_noise
from experiments.run import main as run
from mac.errors import UserError
from tests.helpers.algorithm_cases import make, mode_of, registered
from tests.helpers.command_line import SIZES
from tests.helpers.random_kills import write_data
from tests.helpers.toy_env import identity

ALONE = """
import sys
for name in ("mac", "baselines", "envs_mjx", "experiments", "equinox", "optax", "mujoco"):
    sys.modules[name] = None  # importing it is an error
sys.path.insert(0, sys.argv[1])
import numpy as np
from loader import ExportedPolicy
data = np.load("inputs.npz")
policy = ExportedPolicy(sys.argv[2])
goal = data["goal"] if "goal" in data else None
policy.reset(task=int(data["task"]))
batch = [policy(row, goal) for row in data["obs"]]
policy.reset(task=int(data["task"]), episode=1)
single = [policy(row[1], None if goal is None else goal[1]) for row in data["obs"]]
np.savez("actions.npz", batch=batch, single=single)
"""


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert export(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.fixture(scope="module")
def goals(tmp_path_factory: pytest.TempPathFactory, data: list[str]) -> Path:
    """A goal-conditioned run of 5 updates, which evaluates few episodes at a time."""
    folder = tmp_path_factory.mktemp("goals") / "run"
    env = ["--env", "pointmaze-medium-navigate-oraclerep-v0"]
    write_data(folder.parent)
    named = ["--data.path", str(folder.parent / "data/small.npz"), "--data.dir", str(folder.parent / "data")]
    assert run([*SIZES, *named, *env, "--steps", "5", "--out", str(folder)]) == 0
    return folder


@pytest.mark.parametrize("which", ["finished", "goals"])
def test_artefact_acts_alone_like_the_run(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    pytest.importorskip("flatbuffers", reason="needs the extra `export`")
    folder: Path = request.getfixturevalue(which)
    out = tmp_path / "mine.jaxpolicy"
    assert export([str(folder), "--out", str(out), "--seed", "1"]) == 0
    with zipfile.ZipFile(out) as file:
        file.extract("loader.py", tmp_path)
        header = json.loads(file.read("header.json"))
    policy = mac.load(folder, seed=1)
    env, rng = policy.env, np.random.default_rng(0)
    facts = {"obs_dim": env.obs_dim, "goal_dim": env.goal_dim, "action_dim": env.action_dim, "seed": 1}
    assert facts.items() <= header.items() and header["platforms"] == ["cpu", "cuda"]
    obs = rng.normal(size=(2 * header["chunk"] + 1, 3, env.obs_dim)).astype(np.float32)
    goal = None if env.goal_dim is None else rng.uniform(0, 9, (3, env.goal_dim)).astype(np.float32)
    task = env.tasks[-1]
    np.savez(tmp_path / "inputs.npz", obs=obs, task=task, **({} if goal is None else {"goal": goal}))
    script = [sys.executable, "-c", ALONE, str(tmp_path), str(out)]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "actions.npz")
    policy.reset(task=task)
    wanted = np.stack([policy(row, goal) for row in obs])
    np.testing.assert_allclose(found["batch"], wanted, atol=1e-5)
    np.testing.assert_allclose(found["single"], wanted[:, 1], atol=1e-5)


def test_missing_flatbuffers_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    out = tmp_path / "mine.jaxpolicy"
    assert "pip install -e '.[export]'" in error_of(capsys, str(finished), "--out", str(out))
    assert not out.exists()
    assert "--seed=5" in error_of(capsys, str(finished), "--seed", "5")


def test_noise_becomes_an_argument():
    """Draws in functions within, and draws that arithmetic of the key alone follows."""
    weight = jax.numpy.asarray([2.0, 3.0])

    def act(key: jax.Array, weight: jax.Array, obs: jax.Array) -> jax.Array:
        one, two = jax.random.split(key)
        noise = jax.random.normal(one, obs.shape)
        shift = jax.jit(lambda obs, key: obs + 0.5 * jax.random.uniform(key, obs.shape))(obs, two)
        return jax.numpy.tanh(weight * noise) + shift

    obs = jax.numpy.asarray([0.1, -0.2])
    found = split_noise(act, jax.random.key(0), weight, obs)
    for seed in range(3):
        key = jax.random.key(seed)
        noise = found.draw(key)
        assert len(noise) == 2
        np.testing.assert_allclose(found.call(noise, weight, obs), act(key, weight, obs), rtol=1e-6)


@pytest.mark.parametrize("which", ["finished", "goals"])
def test_onnx_model_acts_like_the_run(which: str, request: pytest.FixtureRequest, tmp_path: Path):
    pytest.importorskip("jax2onnx", reason="needs the extra `onnx`, in an environment of its own")
    out = tmp_path / "mine.onnx"
    assert export([str(request.getfixturevalue(which)), "--out", str(out), "--format", "onnx"]) == 0
    import onnx

    properties = {each.key: each.value for each in onnx.load(out).metadata_props}
    assert properties["algo"] == "mac" and "noise" in properties


@pytest.mark.parametrize("name", registered(quick=("iql",)))
def test_every_policy_without_history_can_be_exported(name: str):
    """For any number of rows, on both platforms; lowered only, with weights of zero."""
    algo = make(name, mode_of(name), steps=100)
    shapes = jax.eval_shape(algo.init, jax.random.key(0))
    state = jax.tree.map(lambda x: jax.numpy.zeros((1, *x.shape), x.dtype), shapes).without_memory()
    settings: Any = SimpleNamespace(seed=0, seeds=1, algo=name, env="toy")
    saved = SavedRun(Path(), settings, algo, identity(algo.env.obs_dim), 0, state)
    if algo.history:
        with pytest.raises(UserError, match="acts with the last"):
            actor(saved, 0)
        return
    policy = actor(saved, 0)
    (rows,) = jax.export.symbolic_shape("B")
    program = jax.export.export(jax.jit(policy.call), platforms=PLATFORMS)(*policy.arguments(rows))
    assert program.out_avals[0].shape[::2] == (rows, algo.env.action_dim)
