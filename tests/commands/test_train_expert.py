"""Training of our own experts: what is learnt, resumed, recorded and refused."""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import equinox as eqx
import h5py
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Float, Key

from experiments import train_expert
from experiments.expert_training import record_dataset, tasks, trainer
from experiments.expert_training.online_training import (
    OnlineConfig,
    initial_state,
    rollout_policy,
    run_iterations,
    step_lanes,
)
from experiments.expert_training.sac import SacConfig, Transitions
from experiments.expert_training.tasks import AbstractExpertTask, TaskState, build_task, rotated_obs, standing
from experiments.expert_training.trainer import ExpertConfig, load_policy
from mac.data.hdf5 import read_hdf5
from mac.errors import UserError
from tests.helpers.key_usage import recorded as keys_recorded
from tests.helpers.key_usage import used_twice

SAC = SacConfig(hidden=(32, 32), lr=3e-3, discount=0.5, temperature=0.01)
ONLINE = OnlineConfig(lanes=8, iterations=300, random=20, critic_updates=1, batch=64, capacity=200)


class Compass(AbstractExpertTask):
    """A toy: the action that is wanted is the observation, a random unit vector."""

    name: str = eqx.field(static=True, default="hopper")
    obs_dim: int = eqx.field(static=True, default=2)
    action_dim: int = eqx.field(static=True, default=2)
    control_dt: float = eqx.field(static=True, default=0.1)

    def start(self, key: Key[Array, ""]) -> TaskState:
        return TaskState(tasks.random_direction(key), jnp.zeros((), jnp.int32), jnp.asarray(False), ())

    def step(
        self, state: TaskState, action: Float[Array, " A"], key: Key[Array, ""]
    ) -> tuple[TaskState, Transitions]:
        obs, t = tasks.random_direction(key), state.t + 1
        terminated, late = jnp.sum(action) > 1.99, t >= 20
        reward = -jnp.sum(jnp.square(action - state.obs))
        seen = Transitions(
            state.obs, action, reward, obs, 1.0 - terminated.astype(jnp.float32), late & ~terminated
        )
        return TaskState(obs, t, terminated | late, ()), seen


PLAN = ExpertConfig(
    "hopper", 0, "c", ONLINE, SAC
)  # the toy is called hopper, so that its data can be recorded


def go(folder: Path, plan: ExpertConfig = PLAN, stop: Callable[[], bool] = lambda: False) -> bool:
    folder.mkdir(exist_ok=True)
    return trainer.train_expert(plan, folder, ["train_expert.py"], lambda point, done: None, stop)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a finished training of the toy; its replay buffer has gone round once."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (trainer, record_dataset):
            patch.setattr(module, "build_task", lambda name, engine="c": Compass())
        folder = tmp_path_factory.mktemp("experts") / "straight"
        assert go(folder)
        yield folder


@pytest.mark.slow
def test_a_direction_is_learnt(trained: Path) -> None:
    _, policy, _ = load_policy(trained)
    seen = rollout_policy(Compass(), policy, jnp.asarray(5), 16, 20, False)
    # A policy that does nothing has -1, a random one -5/3.
    assert float(seen.reward.mean()) > -0.1
    text = (trained / "curve.csv").read_text().splitlines()
    first, *_, last = csv.DictReader(line for line in text if not line.startswith("#"))
    assert int(last["env_steps"]) == 300 * 8 and int(last["updates"]) == 280
    assert float(last["score"]) > float(first["score"])


@pytest.mark.slow
def test_stopping_and_going_on_changes_no_bit(trained: Path, tmp_path: Path) -> None:
    asked = iter([False] * 20 + [True] * 100)
    assert not go(tmp_path / "broken", stop=lambda: next(asked))
    assert go(tmp_path / "broken")
    straight, broken = ((folder / "policy.eqx").read_bytes() for folder in (trained, tmp_path / "broken"))
    assert straight == broken
    replays = (record_dataset.replayed(PLAN, folder) for folder in (trained, tmp_path / "broken"))
    for one, other in zip(*replays, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_another_training_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds an expert with seed=0, expected seed=1"):
        go(trained, dataclasses.replace(PLAN, seed=1))
    with pytest.raises(UserError, match="no trained expert"):
        load_policy(tmp_path)
    with pytest.raises(UserError, match="was trained for hopper; this dataset needs one for ant"):
        trainer.load_actor(trained, "ant")
    shutil.copytree(trained, tmp_path / "damaged", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "damaged" / "policy.eqx").write_bytes(b"short")
    with pytest.raises(UserError, match="is damaged"):
        load_policy(tmp_path / "damaged")


@pytest.mark.slow
@pytest.mark.parametrize("level", record_dataset.LEVELS)
def test_recorded_data_have_d4rls_schema(trained: Path, level: str) -> None:
    made = record_dataset.record_dataset(PLAN, trained, level, 1600)
    assert made.path.name == f"hopper-ours-{level}.hdf5" and made.rows == 1600
    with h5py.File(made.path) as file:
        assert {name: (column.dtype, column.shape) for name, column in file.items()} == {
            "observations": (np.float32, (1600, 2)),
            "actions": (np.float32, (1600, 2)),
            "rewards": (np.float32, (1600,)),
            "next_observations": (np.float32, (1600, 2)),
            "terminals": (bool, (1600,)),
            "timeouts": (bool, (1600,)),
        }
        columns = {name: column[:] for name, column in file.items()}
        assert file.attrs["expert"] == "ours" and "not comparable" in file.attrs["source"]
    assert json.loads(made.path.with_suffix(".json").read_text())["expert"] == "ours"
    ends = columns["terminals"] | columns["timeouts"]
    follows = (columns["observations"][1:] == columns["next_observations"][:-1]).all(axis=1)
    # A row leads on to the next unless its episode ends.
    assert follows[~ends[:-1]].all() and not follows[ends[:-1]].any()
    assert ends[-1] and not (columns["terminals"] & columns["timeouts"]).any()
    reward = -np.square(columns["actions"] - columns["observations"]).sum(axis=1)
    np.testing.assert_allclose(columns["rewards"], reward, atol=1e-5)
    assert len(read_hdf5(made.path).obs) == 1600 + ends.sum()  # by the reader of D4RL's own files


@pytest.mark.slow
def test_the_replay_buffer_holds_the_newest_steps_in_order(trained: Path) -> None:
    steps = record_dataset.replayed(PLAN, trained)
    assert steps.reward.shape == (200, 8)
    goes_on = (steps.mask == 1) & ~steps.cut
    same = (steps.obs[1:] == steps.next_obs[:-1]).all(axis=-1)
    np.testing.assert_array_equal(same, goes_on[:-1])


@pytest.mark.slow
def test_no_key_of_a_training_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, starts, iterations and the evaluation; sizes that no other test has, so that all is traced."""
    cfg, seed = ONLINE._replace(lanes=3, iterations=4, batch=5, capacity=4), jnp.asarray(0)
    sac, task = SAC._replace(hidden=(4,)), Compass()
    with keys_recorded(monkeypatch) as seen:
        state = initial_state(cfg, sac, task, seed)
        for first, learn in ((0, False), (2, True)):
            state, _ = run_iterations(cfg, sac, task, state, seed, jnp.asarray(first), 2, learn)
        rollout_policy(task, state.learner.policy, seed, 3, 4, False)
    assert len(seen) > 50 and used_twice(seen) == {}


def test_lanes_that_are_over_begin_again_and_others_go_on() -> None:
    task = Compass()
    starts = jax.vmap(task.start)(jr.split(jr.key(0), 4))
    lanes = eqx.tree_at(lambda x: x.t, starts, jnp.asarray([18, 19, 5, 19]))
    new, seen = step_lanes(task, lanes, starts, jnp.zeros((4, 2)), jr.key(1))
    np.testing.assert_array_equal(new.t, [19, 0, 6, 0])
    np.testing.assert_array_equal(seen.cut, [False, True, False, True])
    assert not new.over.any()
    for lane in (1, 3):
        assert (np.asarray(new.obs[lane]) == np.asarray(starts.obs)).all(axis=1).any()
        assert (np.asarray(seen.next_obs[lane]) != np.asarray(new.obs[lane])).any()


@pytest.mark.parametrize("body", tasks.DIRECTED)
def test_a_plane_looks_the_same_from_all_sides(body: str) -> None:
    """Turning walker and direction together changes nothing that the policy sees."""
    rng, width = np.random.default_rng(0), {"ant": 27, "humanoid": 67}[body]
    obs, angle, turn = rng.normal(size=width), 0.7, 1.9
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    other = obs.copy()
    if body == "ant":
        obs[1:5] /= np.linalg.norm(obs[1:5])
        w, x, y, z = obs[1:5]
        c, s = np.cos(turn / 2), np.sin(turn / 2)
        other[1:5] = [c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w]  # rotated_obs about z
        other[13:15] = rotation @ obs[13:15]
    else:
        other[37:39], other[40:42] = rotation @ obs[37:39], rotation @ obs[40:42]
    sights = [
        np.asarray(
            rotated_obs(body, jnp.asarray(o, jnp.float32), jnp.asarray([np.cos(a), np.sin(a)], jnp.float32))
        )
        for o, a in ((obs, angle), (other, angle + turn))
    ]
    np.testing.assert_allclose(sights[0], sights[1], atol=1e-5)
    plain = np.asarray(rotated_obs(body, jnp.asarray(obs, jnp.float32), jnp.asarray([1.0, 0.0])))
    if body == "humanoid":
        np.testing.assert_allclose(plain, obs, rtol=1e-6)  # facing along x, it is what it was
    else:
        assert not np.allclose(plain, sights[0], atol=0.1)


def test_an_ant_is_paid_for_its_way_along_the_direction() -> None:
    task = build_task("ant")
    state = task.start(jr.key(0))
    step = jax.jit(task.step)
    for t in range(3):
        action = jr.uniform(jr.key(t), (8,), minval=-1.0, maxval=1.0)
        new, seen = step(state, action, jr.key(t))
        moved = np.asarray(new.inner.motion.qpos[:2] - state.inner.motion.qpos[:2])
        np.testing.assert_allclose(seen.reward, moved @ np.asarray(state.inner.direction), atol=1e-6)
        np.testing.assert_array_equal(seen.next_obs, new.obs)
        assert float(seen.mask) == 1 and not bool(new.over)
        state = new
    model = task.env.engine.host.walker.model
    assert task.env.engine.host.walker.maze is None and not any(
        model.geom(i).name.startswith("block") for i in range(model.ngeom)
    )


def test_a_humanoids_stand_is_ogbenchs() -> None:
    from ogbench.online_locomotion.humanoid import tolerance

    for head in (0.3, 1.0, 1.35, 1.4, 1.7):
        for upright in (-1.0, -0.5, 0.2, 0.89, 0.95):
            high = tolerance(head, bounds=(1.4, float("inf")), margin=1.4 / 4)
            straight = tolerance(
                upright, bounds=(0.9, float("inf")), margin=1.9, sigmoid="linear", value_at_margin=0
            )
            np.testing.assert_allclose(
                standing(jnp.asarray(head), jnp.asarray(upright)), high * straight, atol=1e-5
            )


def test_errors_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"--task": "hopper", "--out": str(tmp_path / "d")}
    for change, message in (
        ({"--task": "snail"}, "choose ant, humanoid, hopper"),
        ({"--task": "ant", "--rows": "10k"}, "experiments/generate_data.py --expert"),
        ({"--rows": "ten"}, "'ten' is not a whole number"),
        ({"--steps": "5"}, "take at least"),
        ({"--seed": "-1"}, "seed=-1"),
    ):
        argv = [word for pair in (good | change).items() for word in pair]
        assert train_expert.main(argv) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and message in lines[0], lines
    assert not list(tmp_path.iterdir())
