"""Diffuser and HD-DA: the diffusion of trajectories, plans that are executed, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.diffuser import DiffuserConfig
from baselines.hd_da import HDDAConfig
from mac.data.sampler import sample
from mac.errors import UserError
from mac.ops.diffusion import cosine_betas, inpaint, trajectory_loss
from mac.planning.diffusion import TrajectoryDiffusion
from mac.run.evaluate import Policies, episode_keys, evaluate, evaluation_keys, select_actions
from mac.types import Past
from tests.helpers.algorithm_cases import make
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.numpy_planners import plan
from tests.helpers.toy_env import GoalPointEnv, identity, window

PLANNERS = ("diffuser", "hd_da")


def started(name: str, **changes: Any) -> tuple[Any, Any]:
    """An algorithm, and its state with perturbed weights."""
    algo: Any = make(name, "goals", **changes)
    state = jax.jit(algo.init)(jr.key(0))
    return algo, type(state)(state.nets, perturb(state.target, 1), state.opt_state)


# Diffusion of trajectories.


def test_cosine_schedule_has_its_variances():
    np.testing.assert_allclose(cosine_betas(4), [0.1529878, 0.4169581, 0.7078587, 0.999], rtol=2e-6)


def test_predicting_nothing_costs_the_data_but_for_known_entries():
    """Entries are ±1: 2 of 12 are known, and the first weighs 3."""
    data = jnp.where(jr.bernoulli(jr.key(0), 0.5, (8, 4, 3)), 1.0, -1.0)
    known = np.zeros((4, 3), bool)
    known[1, 1] = known[3, 2] = True
    loss = trajectory_loss(
        lambda x, _: 0 * x, data, cosine_betas(5), jr.key(1),
        condition=lambda x: jnp.where(jnp.broadcast_to(known, x.shape), data, x),
        weight=jnp.ones((4, 3)).at[0, 0].set(3.0),
    )  # fmt: skip
    assert float(loss) == pytest.approx((9 + 3) / 12)


@pytest.mark.parametrize("predicts", ["data", "noise"])
def test_perfect_prediction_leads_to_the_data(predicts: Any):
    """Data that are one trajectory of 0.3; the known entry is 0.9, and each network input has it."""
    betas, shape = cosine_betas(6), (5, 4, 2)
    kept = jnp.cumprod(1 - betas)
    seen = []

    def condition(x: jax.Array) -> jax.Array:
        return x.at[:, 0, 1].set(0.9)

    def net(x: jax.Array, step: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        share = jnp.broadcast_to(kept[step.astype(jnp.int32)][:, None, None], x.shape)
        return (
            jnp.full_like(x, 0.3) if predicts == "data" else (x - jnp.sqrt(share) * 0.3) / jnp.sqrt(1 - share)
        )

    got = inpaint(net, jr.normal(jr.key(0), shape), betas, jr.key(1), condition=condition, predicts=predicts)
    want = np.full(shape, 0.3)
    want[:, 0, 1] = 0.9
    np.testing.assert_allclose(got, want, atol=2e-3 if predicts == "noise" else 1e-6)
    jax.effects_barrier()
    assert len(seen) == 6 and all((x[:, 0, 1] == np.float32(0.9)).all() for x in seen)


def test_known_entries_are_the_start_and_the_goals_columns():
    known = TrajectoryDiffusion(3, 2, 4, (3, 1), 5).known
    np.testing.assert_array_equal(known.astype(int), [[0, 0, 1, 1, 1, 1], [0] * 6, [0, 0, 0, 1, 0, 1]])


# Windows of the data.


def test_window_pairs_each_action_with_the_state_before_it():
    """The point moves by 0.2 times the action."""
    batch = sample(window(6), make("diffuser", "goals", horizon=6).sample, jr.key(0))
    actions, states = batch.actions, batch.chunk_obs
    inside = np.ones(actions.shape[:2], bool) if batch.valid is None else np.asarray(batch.valid) > 0
    moved = np.asarray(states[:, 1:] - states[:, :-1])[inside[:, :-1]]
    np.testing.assert_allclose(moved, 0.2 * np.asarray(actions[:, :-1])[inside[:, :-1]], atol=1e-5)


@pytest.mark.parametrize("name", PLANNERS)
def test_padded_windows_rest_in_the_final_state(name: str):
    """Windows longer than every episode: 13 transitions of 14 rows."""
    algo: Any = make(name, "goals", horizon=40)
    batch = sample(window(algo.sample.chunk, length=14), algo.sample, jr.key(0))
    actions, states = batch.actions, batch.chunk_obs
    beyond = np.asarray(batch.valid) == 0
    assert beyond[:, -1].all() and not np.asarray(actions)[beyond].any()
    final = np.broadcast_to(states[:, -1:], states.shape)
    np.testing.assert_array_equal(np.asarray(states)[beyond], final[beyond])


# Plans.


@pytest.mark.parametrize(
    ("name", "execute"),
    [("diffuser", 5), ("hd_da", 5), *(pytest.param("hd_da", n, marks=pytest.mark.slow) for n in (1, 3, 6))],
)
def test_executed_actions_are_those_of_numpy(name: str, execute: int):
    """Of plans with segments of 3 steps, which are joined."""
    algo, state = started(name, execute=execute)
    rng = np.random.default_rng(0)
    s, g = rng.uniform(-1, 1, (2, 4, 2))
    got = jax.jit(algo.act)(state, jnp.asarray(s, jnp.float32), jnp.asarray(g, jnp.float32), jr.key(3))
    want = np.clip(plan(name, double(state.target), s, g, algo.cfg, jr.key(3)), -1, 1)
    assert got.shape == (4, execute, 2)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize(("name", "elapsed"), [("diffuser", 2), ("hd_da", 4), ("hd_da", 40)])
def test_goal_that_is_due_comes_earlier_in_later_plans(name: str, elapsed: int):
    """But never among the actions that are executed."""
    algo, state = started(name, execute=3, goal_at="due")
    rng, steps = np.random.default_rng(0), algo.history
    s, g = rng.uniform(-1, 1, (2, 2, 2))
    obs, goal = jnp.asarray(s, jnp.float32), jnp.asarray(g, jnp.float32)
    valid = jnp.broadcast_to(jnp.arange(steps)[::-1] < elapsed, (2, steps))
    zeros = jnp.zeros((2, steps, 2))
    past = Past(zeros, zeros, jnp.zeros((2, steps)), valid)
    got = jax.jit(algo.act_after)(state, past, obs, goal, jr.key(3))
    seen = min(elapsed, steps)
    want = np.clip(plan(name, double(state.target), s, g, algo.cfg, jr.key(3), seen), -1, 1)
    np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-4)
    assert np.abs(np.asarray(got) - np.asarray(algo.act(state, obs, goal, jr.key(3)))).max() > 1e-3


def test_plans_start_at_the_state_and_end_at_the_goal():
    algo, state = started("diffuser")
    obs, goal = jnp.asarray([[0.1, -0.2]]), jnp.asarray([[0.7, 0.4]])
    states = algo.plan(state, obs, goal, jr.key(0)).states
    np.testing.assert_array_equal(states[0, 0], obs[0])
    np.testing.assert_array_equal(states[0, -1], goal[0, ::-1])  # the goal's columns are 1, 0
    np.testing.assert_array_equal(algo.planned_states(state, None, obs, goal, jr.key(0)), states)


def test_segments_of_a_plan_begin_where_the_high_level_says():
    algo, state = started("hd_da", execute=6)
    obs, goal = jnp.asarray([[0.1, -0.2]]), jnp.asarray([[0.7, 0.4]])
    _, states, distant = algo.plan(state, obs, goal, jr.key(0))
    np.testing.assert_array_equal(distant[0, -1], goal[0, ::-1])
    np.testing.assert_array_equal(states[0, ::3], distant[0, :2])
    np.testing.assert_array_equal(algo.planned_states(state, None, obs, goal, jr.key(0)), distant)


def test_average_of_weights_is_a_copy_then_moves_at_some_updates():
    algo: Any = make("diffuser", "goals", ema_start=4, ema_every=2, tau_ema=0.25)
    nets = jax.eval_shape(algo.nets, jr.key(0))
    target, online = (jax.tree.map(lambda x, y=y: jnp.full(x.shape, y), nets) for y in (0.0, 1.0))
    batch = sample(window(algo.sample.chunk), algo.sample, jr.key(0))

    def after(step: int) -> float:
        moved = algo.update_target(target, online, batch, jnp.asarray(step))
        return float(jax.tree.leaves(moved)[0].ravel()[0])

    assert [after(step) for step in range(6)] == [1, 0, 1, 0, 0.25, 0]


@pytest.mark.parametrize("name", [pytest.param("diffuser", marks=pytest.mark.slow), "hd_da"])
def test_evaluation_executes_plans_open_loop(name: str):
    """An episode of 12 steps is three plans, of which 5, 5 and 2 actions are executed."""
    algo, state = started(name, execute=5)
    env, keys = GoalPointEnv(), evaluation_keys(jnp.asarray([0]), 0)
    policies = Policies(algo, identity(), jax.tree.map(lambda x: x[None], state))
    got = evaluate(policies, env, 1, keys, tasks=(2,))

    k_reset, k_act = episode_keys(keys, jnp.asarray([2]), jnp.asarray([0]))
    point = env.reset(k_reset[0, 0], jnp.asarray(2))
    for number in range(3):
        decision = jnp.full((1, 1), number)
        obs, goal = point.obs[None, None], point.goal[None, None]  # pyright: ignore[reportOptionalSubscript]
        for action in select_actions(policies, obs, goal, k_act, decision)[0, 0]:
            point = env.step(point, action) if not point.done else point
    assert int(got.length[0, 0, 0]) == int(point.t) > 5
    assert bool(got.success[0, 0, 0]) == bool(point.success)


# Sizes and errors.


def test_lengths_are_rounded_up_to_what_the_network_can_halve():
    assert [DiffuserConfig(horizon=n).tokens for n in (253, 256, 257)] == [256, 256, 260]
    assert [HDDAConfig(horizon=n).tokens for n in (255, 300, 301)] == [20, 20, 24]


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (DiffuserConfig, {"horizon": 8, "execute": 9}, "--hp.execute=9: a plan has 8 actions"),
        (DiffuserConfig, {"horizon": 1, "execute": 1}, "--hp.horizon=1: must be at least 2"),
        (DiffuserConfig, {"hidden": (5, 8)}, "--hp.hidden=.*even"),
        (DiffuserConfig, {"reward_scale": 2.0}, "--hp.reward-scale=2.0: plans know no rewards"),
        (HDDAConfig, {"jump": 13}, "--hp.jump=13: jump . 1 steps cannot be halved by the U-Net; take 15"),
        (HDDAConfig, {"horizon": 60, "execute": 46}, "--hp.execute=46: a plan has 45 actions"),
    ],
)
def test_impossible_settings_are_refused(config: Any, changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        config(**changes)


@pytest.mark.parametrize("name", ["diffuser", "hd_da"])
def test_tasks_without_goals_are_refused(name: str):
    with pytest.raises(UserError, match=f"--algo={name}: toy-point has no goals"):
        make(name, "reward")
