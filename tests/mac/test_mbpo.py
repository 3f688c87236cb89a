"""Imagined steps of MOPO and MOBILE: outcomes, rollouts, penalties by hand, and the mixed batch."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines import get_algorithm
from baselines.mobile import disagreement
from mac.actor_critic import Step
from mac.errors import UserError
from mac.mbpo import AbstractMBPO
from mac.nn.critics import Combine, aggregate
from mac.types import EnvSpec, Window
from tests.helpers.algorithm_cases import IMAGINED
from tests.helpers.numpy_ablations import normal, wide
from tests.helpers.numpy_baselines import gaussian, value
from tests.helpers.numpy_leq import dealt
from tests.helpers.numpy_mac import double, perturb, sigmoid
from tests.helpers.numpy_model_based import densities
from tests.helpers.toy_env import FALL_SPEC, GOAL_SPEC, SPEC, falling_window, window

STARTS, HORIZON = 6, 4
KINDS: dict[str, tuple[EnvSpec, Any]] = {
    "reward": (SPEC, window),
    "goals": (GOAL_SPEC, window),
    "terminations": (FALL_SPEC, falling_window),
}


def make(kind: str, name: str = "mopo", **changes: Any) -> AbstractMBPO[Any]:
    entry = get_algorithm(name)
    sizes = {"batch": 8, "hidden": (8,), "discount": 0.9} | IMAGINED | {"rollout": HORIZON} | changes
    algo = entry.algorithm(entry.config(**sizes), KINDS[kind][0], 0)
    assert isinstance(algo, AbstractMBPO)
    return algo


def rolled(algo: AbstractMBPO[Any], kind: str, step: int = 1, key: int = 3) -> tuple[Any, Step, int, Window]:
    """Perturbed networks, their rollout as float64 arrays, how many transitions count, and the data."""
    data = KINDS[kind][1](1)
    state = jax.jit(algo.init)(jr.key(0)).without_memory()
    state = dataclasses.replace(state, nets=perturb(state.nets, 1), target=perturb(state.target, 4))
    rows, count = jax.jit(algo.rollout)(state, data, jnp.asarray(step), jr.key(key))
    return state, jax.tree.map(wide, rows), int(count), data


def by_step(rows: Step) -> Step:
    """Transitions `[H, starts, ...]`, as rollouts without terminations leave them."""
    return jax.tree.map(lambda x: x.reshape(HORIZON, STARTS, *x.shape[1:]), rows)


# Penalties by hand.


@pytest.mark.parametrize(("combine", "unbiased", "want"), [("mean", False, 2.25), ("min", True, 2.8284271)])
def test_disagreement_is_the_one_worked_out_by_hand(combine: Combine, unbiased: bool, want: float):
    # Axes: critics, members, samples. Means of critics: [1.5, 2.5], [4.5, 8.5]; of samples: 2 and 6.5.
    # Minima: [1, 2], [4, 7]; means 1.5 and 5.5, whose standard deviation over n - 1 is 4 / sqrt(2).
    q = jnp.asarray([[[1.0, 3.0], [5.0, 7.0]], [[2.0, 2.0], [4.0, 10.0]]])
    q = jnp.swapaxes(q, 1, 2)[..., None]
    np.testing.assert_allclose(disagreement(aggregate(q, combine), unbiased=unbiased), [want], rtol=1e-6)


# Rollouts.


@pytest.mark.parametrize("kind", ["reward", "goals"])
def test_a_rollout_is_that_of_numpy(kind: str):
    """One step at a time, with the same keys: policy, a member of its own for each row, and outcomes."""
    algo = make(kind)
    state, rows, count, _ = rolled(algo, kind)
    assert count == STARTS * HORIZON == algo.replay.rows  # pyright: ignore[reportOptionalMemberAccess]
    nets, x = double(state.nets), by_step(rows)
    with jax.numpy_rank_promotion("allow"):
        for i, key in enumerate(jr.split(jr.split(jr.key(3))[1], HORIZON)):
            k_action, k_model, _ = jr.split(key, 3)
            s, g = x.obs[i], None if x.goal is None else x.goal[i]
            mean, std = gaussian(nets.actor, s, g)
            a = np.tanh(mean + std * normal(k_action, (STARTS, 2)))
            np.testing.assert_allclose(x.action[i], a, rtol=1e-3, atol=1e-4)

            k_member, k_noise = jr.split(k_model)
            guess = densities(nets.model.dynamics, s, a)
            member = dealt(k_member, STARTS, 3)
            noise = normal(k_noise, (STARTS, 2))
            for row, e in enumerate(member):
                after = guess.mean[e, row] + np.exp(guess.log_std[e, row]) * noise[row]
                np.testing.assert_allclose(x.next_obs[i, row], after, rtol=1e-3, atol=1e-3)

            if kind == "goals":
                reached = value(nets.model.success, s, g, a) > 0
                np.testing.assert_array_equal(x.reward[i], reached - 1.0)
                np.testing.assert_array_equal(x.mask[i], 1.0 - reached)
            else:
                np.testing.assert_allclose(x.reward[i], value(nets.model.reward, s, a), rtol=1e-3, atol=1e-3)
                np.testing.assert_array_equal(x.mask[i], value(nets.model.termination, s, a) <= 0)


@pytest.mark.parametrize("kind", ["reward", "goals"])
def test_each_step_begins_where_the_one_before_ended(kind: str):
    """Whatever its mask, and with the same two goals; the first step begins in the data."""
    _, rows, _, data = rolled(make(kind), kind)
    x = by_step(rows)
    np.testing.assert_array_equal(x.obs[1:], x.next_obs[:-1])
    real = np.asarray(data.obs[np.arange(len(data.obs))])
    assert all((real == start).all(axis=1).any() for start in x.obs[0].astype(np.float32))
    for goal in (x.goal, x.actor_goal):
        assert (goal is None) == (kind == "reward")
        if goal is not None:
            np.testing.assert_array_equal(goal, np.broadcast_to(goal[0], goal.shape))
    if kind == "goals":
        assert not np.array_equal(x.goal, x.actor_goal)


def ending(algo: AbstractMBPO[Any], bias: float) -> tuple[Step, int, Any]:
    """A rollout, where the logit of termination is larger by `bias`."""
    state = jax.jit(algo.init)(jr.key(0)).without_memory()
    nets = perturb(state.nets, 1)
    head = nets.model.termination.dense[-1]
    nets = eqx.tree_at(
        lambda n: [n.model.termination.dense[-1].weight, n.model.termination.dense[-1].bias],
        nets,
        [30 * head.weight, head.bias + bias],
    )
    state = dataclasses.replace(state, nets=nets)
    rows, count = jax.jit(algo.rollout)(state, falling_window(1), jnp.asarray(1), jr.key(3))
    return jax.tree.map(wide, rows), int(count), nets


def test_rollouts_stop_after_a_recorded_termination():
    algo = make("terminations", rollout_starts=40)
    rows, count, nets = ending(algo, 0.0)
    assert 40 < count < 40 * HORIZON
    # Valid transitions come first, in the order of their steps; those after a termination do not count.
    valid = jax.tree.map(lambda x: x[:count], rows)
    soft = sigmoid(-value(double(nets).model.termination, valid.obs, valid.action))
    np.testing.assert_allclose(valid.mask, soft, rtol=1e-3, atol=1e-3)
    starts, ended = 40, int(np.sum(valid.mask[:40] <= 0.5))
    following = valid.obs[starts : starts + 40 - ended]
    np.testing.assert_array_equal(following, valid.next_obs[:40][valid.mask[:40] > 0.5])
    assert 0 < ended < 40


@pytest.mark.parametrize(("bias", "steps"), [(1e3, 1), (-1e3, HORIZON)])
def test_rollouts_are_as_long_as_nothing_terminates(bias: float, steps: int):
    rows, count, _ = ending(make("terminations"), bias)
    assert count == steps * STARTS and len(rows.obs) == HORIZON * STARTS


def test_penalty_may_be_that_of_the_models_at_the_rollout():
    plain, lowered = (
        rolled(make("reward", penalty=2.0, penalty_at=at), "reward") for at in ("update", "rollout")
    )
    state, before, after = plain[0], plain[1], lowered[1]
    std = np.exp(densities(double(state.nets).model.dynamics, before.obs, before.action).log_std)
    largest = np.sqrt(np.sum(std**2, axis=-1)).max(axis=0)
    np.testing.assert_allclose(before.reward - after.reward, 2 * largest, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(before.next_obs, after.next_obs)


@pytest.mark.parametrize("step", [0, 1])
def test_states_are_normalised_twice_at_update_0_as_released(step: int):
    def shifted(chunk: int) -> Window:
        data = window(chunk)
        column = dataclasses.replace(data.obs, center=jnp.full(2, 0.5), width=jnp.full(2, 2.0))
        return dataclasses.replace(data, obs=column)

    state = jax.jit(make("reward").init)(jr.key(0)).without_memory()
    rows, again = (
        jax.jit(make("reward", release_initial_buffer=flag).rollout)(
            state, shifted(1), jnp.asarray(step), jr.key(3)
        )[0]
        for flag in (False, True)
    )
    for x, y in ((rows.obs, again.obs), (rows.next_obs, again.next_obs)):
        np.testing.assert_allclose(y, (x - 0.5) / 2 if step == 0 else x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rows.action, again.action)


# Settings.


def test_sizes_of_the_ring_follow_the_settings():
    spec = make("reward", batch=10, real_fraction=0.25, rollouts_kept=3).replay
    assert spec == (STARTS * HORIZON, 3, 3, 8, 0, False)
    assert make("reward", real_fraction=1.0).replay is None
    assert make("reward", release_initial_buffer=True).replay.fill_at_start  # pyright: ignore[reportOptionalMemberAccess]


def test_all_real_batches_need_no_model_of_the_ring():
    algo = make("reward", real_fraction=1.0)
    assert jax.jit(algo.init)(jr.key(0)).memory == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"real_fraction": 0.0}, "model-batch"),
        ({"real_fraction": 1.5}, "real-fraction"),
        ({"rollout_every": 0}, "rollout-every"),
        ({"penalty": -1.0}, "penalty"),
        ({"target_range": (1.0,)}, "--hp.target-range=.*: give two numbers, the lesser one first"),
        ({"target_range": (0.0, -1.0)}, "give two numbers, the lesser one first"),
        ({"temperature": -0.1}, "--hp.temperature=-0.1: must be at least 0 and finite"),
        ({"temperature": 0.2, "temperature_limit": 1.0}, "is of a learned temperature"),
        ({"model_decay": (1e-4,)}, "give 2 numbers, one for each layer of the models"),
        ({"model_hidden": (8, 8), "model_decay": (1e-4, -1.0, 0.0)}, "each must be at least 0 and finite"),
        ({"actor_cosine": True, "cooldown": 0.5}, "learning rates fall already; leave out --hp.cooldown"),
        ({"actor_cosine": True}, "--hp.actor-cosine needs the length of the run"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        make("reward", **changes)


def test_goals_have_no_reward_to_predict_jointly():
    with pytest.raises(UserError, match="joint-reward"):
        make("goals", joint_reward=True)


def test_targets_with_goals_are_clipped_already():
    with pytest.raises(UserError, match="toy-point-goals has goals, whose targets are clipped already"):
        make("goals", target_range=(-1.0, 0.0))
