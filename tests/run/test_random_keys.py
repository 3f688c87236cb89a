"""Random bits: no key serves two purposes, in training, evaluation, diagnosis and generated data."""

from collections import Counter
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines import REGISTRY
from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.sampler import sample
from mac.mac import MAC
from mac.run.evaluate import Policies, evaluate, evaluation_keys
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.rng_streams import Stream
from mac.run.seed_diagnostics import diagnose
from mac.run.segment import init, segment
from mac.types import Batch, EnvSpec, Metrics, SampleSpec, Window
from tests.helpers import toy_env
from tests.helpers.algorithm_cases import GOALS_ONLY, make
from tests.helpers.key_usage import recorded, used_twice

UPDATES = 6
"""As many as initial weights have parts, so that keys of those would meet keys of updates."""


class Drawing(AbstractAlgorithm):
    """Draws from parts of every key that it is given, as algorithms do, and learns nothing."""

    env: EnvSpec = eqx.field(static=True, default=toy_env.SPEC)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(3, 2)

    def init(self, key: jax.Array) -> TrainState:
        return TrainState(parts(key), (), ())

    def update(self, state: TrainState, batch: Batch, step: Any, key: jax.Array) -> tuple[TrainState, Any]:
        return state, {"some/draw": parts(key) + jnp.sum(batch.obs)}

    def act(self, state: TrainState, obs: jax.Array, goal: Any, key: jax.Array) -> jax.Array:
        return jnp.broadcast_to(parts(key), (len(obs), 1, 2))

    def diagnose(self, state: TrainState, window: Window, key: jax.Array) -> Metrics:
        return {"diagnostics/draw": parts(key)}


def parts(key: jax.Array) -> jax.Array:
    return sum((jr.uniform(k) for k in jr.split(key, UPDATES)), jnp.zeros(()))


def play(algo: AbstractAlgorithm, env: Any, window: Window, seed: int) -> None:
    """Training of one seed, its evaluations, other draws of them, and its diagnoses, at two updates."""
    mesh, keys = seed_mesh(1), seed_keys(seed, 1)
    state = init(algo, mesh, keys)
    for first in (0, UPDATES):
        steps = np.arange(first, first + UPDATES, dtype=np.int32)
        state, _ = segment(algo, mesh, window, keys, steps, state)
        for draw in range(4):
            asked = evaluation_keys(jnp.asarray([seed]), first, draw)
            evaluate(Policies(algo, toy_env.identity(), state), env, 3, asked)
        diagnose(algo, mesh, window, evaluation_keys(jnp.asarray([seed]), first), state)


@pytest.mark.slow
def test_no_key_of_a_seed_is_used_twice(monkeypatch: pytest.MonkeyPatch):
    """Weights, batches, updates, start states, actions, diagnoses: none of them share random bits."""
    with recorded(monkeypatch) as seen:
        play(Drawing(), toy_env.PointEnv(), toy_env.window(), seed=7)
    drawn = Counter(use.name for use in seen)
    episodes = 2 * 4 * 2 * 3  # updates, draws, tasks, and of each
    assert drawn["uniform"] >= UPDATES * (1 + 2 * UPDATES + 2 + 3 * episodes) and drawn["randint"] > 0
    assert used_twice(seen) == {}


def test_no_key_of_a_batch_is_used_twice(monkeypatch: pytest.MonkeyPatch):
    """With goals, and with the actions that follow a terminal state."""
    spec = toy_env.goal_mac(batch=5).sample._replace(chunk=3)
    with recorded(monkeypatch) as seen:
        sample(toy_env.falling_window(3), spec, jr.key(1))
    assert len(seen) >= 12 and used_twice(seen) == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rewards", "goals", "terminations"])
def test_no_key_of_mac_is_used_twice(kind: str, monkeypatch: pytest.MonkeyPatch):
    # What it expects of an episode is asked with the key of its first action, since it is about that action.
    monkeypatch.setattr(MAC, "step_discount", property(lambda _: None))
    algo, env, window = {
        "rewards": (toy_env.mac(batch=5), toy_env.PointEnv(), toy_env.window()),
        "goals": (toy_env.goal_mac(batch=5), toy_env.GoalPointEnv(), toy_env.window()),
        "terminations": (toy_env.edge_mac(batch=5), toy_env.EdgeEnv(), toy_env.falling_window()),
    }[kind]
    with recorded(monkeypatch) as seen:
        play(algo, env, window, seed=7)
    assert len(seen) > 500 and used_twice(seen) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in REGISTRY if not name.startswith("mac")])
def test_no_key_of_a_baseline_is_used_twice(name: str, monkeypatch: pytest.MonkeyPatch):
    mode = "goals" if name in GOALS_ONLY else "reward"
    algo = make(name, mode, batch=5)
    with recorded(monkeypatch) as seen:
        mesh, keys = seed_mesh(1), seed_keys(3, 1)
        steps = np.arange(UPDATES, dtype=np.int32)
        segment(algo, mesh, toy_env.window(1), keys, steps, init(algo, mesh, keys))
    assert len(seen) > 100 and used_twice(seen) == {}


def test_streams_differ_and_lie_above_updates_tasks_and_episodes():
    numbers = [int(which) for which in Stream]
    assert len(set(numbers)) == len(Stream) == len(Stream.__members__)
    assert min(numbers) >= 2**31 and max(numbers) < 2**32


def test_split_is_fold_in_so_that_one_key_cannot_serve_both():
    """If JAX changes this, streams are still right, but no longer needed."""
    key = jr.key(5)
    for i, part in enumerate(jr.split(key, 4)):
        np.testing.assert_array_equal(jr.key_data(part), jr.key_data(jr.fold_in(key, i)))


def test_a_key_that_serves_twice_is_found(monkeypatch: pytest.MonkeyPatch):
    @jax.jit
    def wrong(key: jax.Array) -> jax.Array:
        return jax.vmap(lambda k: jr.normal(k))(jr.split(key, 3)).sum() + jr.uniform(jr.fold_in(key, 1))

    with recorded(monkeypatch) as seen:
        wrong(jr.key(0))
    first, second = (tuple(int(x) for x in jr.key_data(k)) for k in (jr.key(0), jr.split(jr.key(0), 3)[1]))
    found = {key: sorted(names) for key, names in used_twice(seen).items()}
    assert found == {first: ["fold_in", "split"], second: ["normal", "uniform"]}
