"""Noise on executed actions: its size, its keys, and what data and evaluations record of it."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.action_noise import NoisyActions, with_action_noise
from envs_mjx.datagen.dataset_spec import DatasetSpec
from envs_mjx.datagen.generate import generate
from envs_mjx.datagen.simulate_episodes import EpisodeJob, Simulator
from envs_mjx.experts.maze_experts import MazeDataPolicy
from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.registry import make
from experiments.launch.announce import describe_noise
from experiments.launch.settings import settings_from_dict
from experiments.report import hyperparameters, names_of
from mac.config import Config
from mac.data.provenance import generated
from mac.errors import UserError
from mac.run.evaluate import Policies, evaluate, evaluation_keys
from tests.helpers.key_usage import recorded, used_twice
from tests.helpers.numpy_mac import fresh
from tests.helpers.toy_env import STRIDE, PointEnv, identity, mac

SIGMA = 0.3
NAME = "pointmaze-medium-stitch-v0"


def starts(env: Any, count: int, seed: int = 0) -> Any:
    return jax.vmap(env.reset, in_axes=(0, None))(jr.split(jr.key(seed), count), jnp.asarray(1))


# In an environment.


def test_displacement_is_the_action_with_noise_of_that_spread():
    env = NoisyActions(PointEnv(), SIGMA)
    before = starts(env, 4000)
    action = jnp.broadcast_to(jnp.asarray([0.1, -0.2]), (4000, 2))  # 3 sigma away from the limits
    after = jax.vmap(env.step)(before, action)
    executed = np.asarray(after.obs - before.obs) / STRIDE
    np.testing.assert_allclose(executed.mean(axis=0), [0.1, -0.2], atol=0.02)
    np.testing.assert_allclose(executed.std(axis=0), SIGMA, rtol=0.04)
    assert abs(np.corrcoef(executed.T)[0, 1]) < 0.06
    later = jax.vmap(env.step)(after, action)
    second = np.asarray(later.obs - after.obs) / STRIDE
    assert abs(np.corrcoef(executed[:, 0], second[:, 0])[0, 1]) < 0.06


def test_executed_actions_stay_within_their_range():
    env = NoisyActions(PointEnv(), 5.0)
    before = starts(env, 500)
    moved = jax.vmap(env.step)(before, jnp.ones((500, 2))).obs - before.obs
    assert np.abs(moved).max() <= STRIDE * (1 + 1e-5) and np.min(moved) < -0.9 * STRIDE


def test_same_key_gives_the_same_episode():
    action = jnp.full((20, 2), 0.2)
    one, other = (NoisyActions(PointEnv(), sigma) for sigma in (SIGMA, 2 * SIGMA))
    first = jax.vmap(one.step)(starts(one, 20), action)
    np.testing.assert_array_equal(first.obs, jax.vmap(one.step)(starts(one, 20), action).obs)
    np.testing.assert_array_equal(starts(one, 20).obs, starts(other, 20).obs)
    assert not np.array_equal(first.obs, jax.vmap(other.step)(starts(other, 20), action).obs)


def test_state_that_is_done_stays_as_it_is():
    env = NoisyActions(PointEnv(), SIGMA)
    state = env.reset(jr.key(0), jnp.asarray(1))
    ended = jax.tree.map(lambda x: x, state)
    ended = ended.__class__(**{**vars(ended), "done": jnp.asarray(True)})
    after = env.step(ended, jnp.ones(2))
    for old, new in zip(jax.tree.leaves(ended), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(jr.key_data(old) if old.dtype == ended.key.dtype else old,
                                      jr.key_data(new) if new.dtype == ended.key.dtype else new)  # fmt: skip
    assert int(env.step(state, jnp.ones(2)).t) == 1


def test_evaluation_plays_with_noise_of_its_own_keys(monkeypatch: pytest.MonkeyPatch):
    algo = mac(batch=7)
    state = jax.tree.map(lambda x: x[None], fresh(algo))
    policies, keys = Policies(algo, identity(), state), evaluation_keys(jnp.asarray([3]), 10)
    monkeypatch.setattr(type(algo), "step_discount", property(lambda _: None))
    with recorded(monkeypatch) as seen:
        noisy = evaluate(policies, NoisyActions(PointEnv(), SIGMA), 4, keys)
    assert used_twice(seen) == {}
    again = evaluate(policies, NoisyActions(PointEnv(), SIGMA), 4, keys, batch=3)
    plain = evaluate(policies, PointEnv(), 4, keys)
    np.testing.assert_array_equal(noisy.length, again.length)
    np.testing.assert_allclose(noisy.episode_return, again.episode_return)
    assert noisy.length.shape == plain.length.shape == (1, 2, 4)


def test_without_noise_there_is_no_wrapper():
    env = PointEnv()
    assert with_action_noise(env, 0.0) is env
    assert with_action_noise(env, SIGMA).spec is env.spec


# In data.


def simulated(noise: float) -> Any:
    env = make(NAME, "c")
    assert isinstance(env, MazeEnv)
    policy = MazeDataPolicy("stitch", env, 201, None)
    jobs = [EpisodeJob(0, 0), EpisodeJob(0, 1)]
    return Simulator(policy, seed=0, lanes=2, noise=noise).run(jobs).rows


def test_recorded_action_is_the_intended_one():
    plain, noisy, again = simulated(0.0), simulated(SIGMA), simulated(SIGMA)
    np.testing.assert_array_equal(plain.actions[:, 0], noisy.actions[:, 0])
    np.testing.assert_array_equal(plain.observations[:, 0], noisy.observations[:, 0])
    for one, other in zip(noisy, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # A point is displaced by 0.2 m times the action, but for walls.
    moved = np.diff(noisy.observations, axis=1) / 0.2
    gap = (moved - noisy.actions[:, :-1])[np.abs(noisy.actions[:, :-1]) < 0.4]
    assert np.median(gap) == pytest.approx(0, abs=0.05) and gap.std() == pytest.approx(SIGMA, rel=0.15)
    still = np.diff(plain.observations, axis=1) / 0.2 - plain.actions[:, :-1]
    assert np.median(np.abs(still)) < 1e-3


def test_noise_is_recorded_and_other_data_are_refused(tmp_path: Path):
    spec = DatasetSpec(NAME, episodes=1, per_shard=1, lanes=2)
    assert "action_noise" not in spec.settings
    generate(spec._replace(action_noise=SIGMA), tmp_path)
    record = json.loads((tmp_path / f"{NAME}.json").read_text())
    assert record["action_noise"] == SIGMA
    made = generated(record, 201)
    assert made is not None and made.facts["action_noise"] == SIGMA and "action noise 0.3" in made.label
    with pytest.raises(UserError, match=r"holds data with action_noise=0\.3, asked is action_noise=None"):
        generate(spec, tmp_path)
    with pytest.raises(UserError, match="action_noise=-1"):
        generate(spec._replace(action_noise=-1.0), tmp_path / "other")


def test_mismatch_of_data_and_evaluation_is_one_line():
    noisy = generated({"source": "made by mac-jax", "action_noise": 0.2}, 10)
    plain = generated({"source": "made by mac-jax"}, 10)
    assert describe_noise(0.0, plain) == describe_noise(0.0, None) == ""
    assert describe_noise(0.2, noisy) == "0.2 on executed actions, in the data and in evaluations"
    for evaluated, made, remedy in ((0.0, noisy, "--eval.noise 0.2"), (0.2, plain, "--eval.noise 0")):
        line = describe_noise(evaluated, made)
        assert "\n" not in line and "shifted environment" in line and line.endswith(remedy)


def test_reports_tell_the_noise_of_evaluations():
    values = {"algo": "mac", "env": "cube-single-play-singletask-task2-v0"}
    runs = {Path(name): settings_from_dict(values | {"eval": {"noise": sigma}}, Config, "here")
            for name, sigma in {"a": 0.0, "b": 0.1, "c": 0.2}.items()}  # fmt: skip
    assert names_of(runs) == ["mac", "mac eval.noise=0.1", "mac eval.noise=0.2"]
    assert [hyperparameters(run) for run in runs.values()] == ["", "eval.noise=0.1", "eval.noise=0.2"]
