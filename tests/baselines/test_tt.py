"""The Trajectory Transformer: tokens, quantiles, planning against an exhaustive search, and its optimiser."""

import dataclasses
from itertools import product
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.tt import TT, TTConfig
from mac.algorithm import TrainState
from mac.data.sampler import ACTION_LIMIT, sample
from mac.data.transitions import transition_rows
from mac.errors import UserError
from mac.planning.token_planner import returns
from mac.types import EnvSpec, Past
from tests.helpers.algorithm_cases import SIZES
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.numpy_tt import score_of, sequences, token_of
from tests.helpers.toy_env import FALL_SPEC, GOAL_SPEC, SPEC, falling_window, window

BINS = 3
ENV = EnvSpec("line", obs_dim=2, action_dim=1, goal_dim=None, tasks=(1,), max_steps=9, control_dt=0.1)


def make(env: EnvSpec = ENV, **changes: Any) -> TT:
    sizes = SIZES["tt"] | {"hidden": (8,), "discount": 0.9, "batch": 8, "bins": BINS}
    return TT(TTConfig(**sizes | changes), env, 10)


def fresh(algo: TT) -> TrainState:
    """A state with weights that prefer some tokens, and unequal bins."""
    state = jax.jit(algo.init)(jr.key(0))
    edges = jnp.sort(perturb(state.target, 4), axis=-1)
    return dataclasses.replace(state, nets=perturb(state.nets, 1), target=edges)


def past_of(algo: TT, seen: int, rng: np.random.Generator) -> Past:
    """A history of which `seen` steps count; the others hold numbers that must not matter."""
    count, env = algo.history, algo.env
    obs, actions = rng.normal(size=(count, env.obs_dim)), rng.uniform(-1, 1, (count, env.action_dim))
    numbers = [jnp.asarray(x, jnp.float32) for x in (obs, actions, rng.normal(size=count))]
    return Past(numbers[0], numbers[1], numbers[2], jnp.asarray(np.arange(count) >= count - seen))


@pytest.mark.parametrize(
    ("context", "seen"),
    [(2, 1), pytest.param(2, 0, marks=pytest.mark.slow), pytest.param(3, 1, marks=pytest.mark.slow)],
    ids=["sliding", "begun", "growing"],
)
def test_planner_equals_exhaustive_search(context: int, seen: int) -> None:
    """One sample for each of many beams prunes nothing. The slow version reads whole sequences every time."""
    horizon, rng = 2, np.random.default_rng(0)
    algo = make(context=context, horizon=horizon, beams=1500, expand=1, action_cdf=0.0, action_top=0)
    state, past, obs = fresh(algo), past_of(algo, seen, rng), jnp.asarray(rng.normal(size=2), jnp.float32)
    planner = algo.planner(state)
    search = eqx.filter_jit(lambda planner, past, obs, key: planner.search(past, obs, key))
    beams, scores = search(planner, past, obs, jr.key(0))

    nets, target = double(state.nets), double(state.target)
    steps = [
        [*(token_of(float(x), e) for x, e in zip(step, target[:4], strict=True)), BINS - 1]
        for step in np.concatenate([past.obs, past.actions, past.rewards[:, None]], axis=1)[
            algo.history - seen :
        ]
    ]
    now = [token_of(float(x), edges) for x, edges in zip(obs, target[:2], strict=True)]
    want: dict[int, float] = {}
    for plan in product(range(BINS + 1), repeat=horizon):
        score = score_of(nets.model, target, context, steps, now, [(token,) for token in plan], 0.9)
        want[plan[0]] = max(want.get(plan[0], -np.inf), score)
    got = {token: float(scores[beams.first[:, 0] == token].max()) for token in want}
    assert got == pytest.approx(want, rel=1e-4, abs=1e-4)
    best = max(want, key=lambda token: want[token])
    assert int(beams.first[0, 0]) == best and np.ptp(list(want.values())) > 1e-2


def test_score_is_discounted_rewards_and_the_value_after_them() -> None:
    paid, score = jnp.zeros(1), jnp.zeros(1)
    for stage, (reward, value) in enumerate([(1.0, 7.0), (2.0, 30.0)]):
        paid, score = returns(paid, jnp.full(1, reward), jnp.full(1, value), jnp.asarray(stage), 0.99)
    np.testing.assert_allclose(score, [32.383], atol=1e-4)


def test_steps_before_an_episode_do_not_matter() -> None:
    algo = make(context=3, beams=4)
    state, obs = fresh(algo), jnp.zeros((1, 2))
    act = jax.jit(algo.act_after)
    pasts = [past_of(algo, 0, np.random.default_rng(i)) for i in range(2)]
    acts = [act(state, jax.tree.map(lambda x: x[None], past), obs, None, jr.key(0)) for past in pasts]
    np.testing.assert_array_equal(acts[0], acts[1])
    np.testing.assert_array_equal(acts[0], jax.jit(algo.act)(state, obs, None, jr.key(0)))


def test_prepare_fits_quantiles_to_every_transition() -> None:
    algo = make(SPEC, bins=7)
    data = window(algo.sample.chunk)
    state = jax.jit(algo.prepare)(jax.jit(algo.init)(jr.key(0)), data)
    rows, valid = (np.asarray(x) for x in transition_rows(data))
    want = np.concatenate([np.arange(e * 40, e * 40 + 39) for e in range(8)])
    np.testing.assert_array_equal(rows[valid], want)
    returns_after = np.asarray(data.return_to_go)[want + 1]
    # As in batches: a bin that only actions of exactly 1 are in would never be a token.
    actions = np.clip(np.asarray(data.action.stored)[want], -ACTION_LIMIT, ACTION_LIMIT)
    columns = [*np.asarray(data.obs[want]).T, *actions.T]
    *fitted, of_rewards, of_returns = np.asarray(state.target)
    assert set(np.asarray(data.reward)[want].tolist()) == {-1.0, 0.0}  # so each has a bin of its own
    np.testing.assert_array_equal(of_rewards, [-1.25, -0.75, -0.25, *[0.25] * 5])
    for edges, values in zip([*fitted, of_returns], [*columns, returns_after], strict=True):
        ordered = np.sort(values)
        stride = -(-len(ordered) // 7)
        np.testing.assert_array_equal(edges, [*ordered[::stride], *[ordered[-1]] * 8][:8])


def test_tokens_of_a_batch_are_those_of_numpy() -> None:
    """Padding included."""
    algo = make(SPEC, batch=64)
    data = window(algo.sample.chunk)
    state = jax.jit(algo.prepare)(jax.jit(algo.init)(jr.key(0)), data)
    batch = jax.jit(sample, static_argnums=1)(data, algo.sample, jr.key(1))
    tokens = np.asarray(jax.jit(algo.tokens)(state.target, batch))
    np.testing.assert_array_equal(tokens, sequences(np.asarray(state.target), batch))
    assert batch.valid is not None and (tokens[np.asarray(batch.valid) == 0] == BINS).all()
    assert (np.asarray(batch.valid) == 0).any()


def test_padding_after_a_solved_state_does_not_count() -> None:
    """Where rewards are of states, a mask of 0 says that the task is solved, and the episode goes on."""
    algo = make(SPEC, window=6, batch=256)
    data, state = window(6), jax.jit(algo.init)(jr.key(0))
    batch = jax.jit(sample, static_argnums=1)(data, algo.sample, jr.key(1))
    assert batch.masks is not None and batch.valid is not None
    solved = dataclasses.replace(batch, masks=batch.masks * (1 - batch.valid))
    assert float(jnp.min(batch.valid)) == 0 and float(jnp.max(solved.masks)) == 0  # pyright: ignore[reportArgumentType]
    losses = [float(jax.jit(algo.loss)(state.nets, state.target, x, jr.key(0))[0]) for x in (batch, solved)]
    assert losses[0] == losses[1]


def test_padding_counts_after_a_termination_only() -> None:
    algo = make(FALL_SPEC, window=6, batch=256)
    data, state = falling_window(6), jax.jit(algo.init)(jr.key(0))
    batch = jax.jit(sample, static_argnums=1)(data, algo.sample, jr.key(1))
    assert batch.valid is not None and batch.masks is not None
    valid, masks = np.asarray(batch.valid), np.asarray(batch.masks)
    ended = ((masks == 0) & (valid == 1)).any(axis=1)
    padded = (valid == 0).any(axis=1)
    assert (padded & ended).any() and (padded & ~ended).any()

    # Heads that give an episode's end the logit 1 and all other tokens 0.
    model = state.nets.model
    heads = jnp.zeros_like(model.heads).at[:, 0, -1].set(1.0)
    model = eqx.tree_at(
        lambda m: (m.heads, m.norm.scale, m.norm.bias), model, (heads, jnp.zeros(8), jnp.eye(8)[0])
    )
    nets = eqx.tree_at(lambda nets: nets.model, state.nets, model)
    weight = np.ones((6, algo.dims))
    weight[:, FALL_SPEC.obs_dim : -2] = algo.cfg.action_weight
    counts = np.where(ended[:, None], 1.0, valid)[..., None] * weight
    error = np.log(BINS + np.e) - np.where(valid == 0, 1.0, 0.0)[..., None]
    want = (counts * error).reshape(256, -1)[:, 1:].mean()
    assert float(jax.jit(algo.loss)(nets, state.target, batch, jr.key(0))[0]) == pytest.approx(want, rel=1e-5)


def test_recorded_terminations_get_the_reward_that_is_asked_for() -> None:
    assert make(FALL_SPEC).sample.terminal_reward == -100.0
    assert make(FALL_SPEC, terminal_reward=0.0).sample.terminal_reward is None
    assert make(SPEC).sample.terminal_reward is None


def test_learning_rate_rises_and_falls_to_a_tenth() -> None:
    algo = TT(TTConfig(warmup=0.1, lr=1.0), SPEC, 1000)
    rate: Any = algo.schedule
    got = [float(rate(jnp.asarray(step))) for step in (0, 49, 99, 100, 550, 999)]
    assert got == pytest.approx([0.01, 0.5, 1.0, 1.0, 0.5, 0.1], abs=2e-3)


def test_only_weights_of_matmuls_decay() -> None:
    algo = make(SPEC, weight_decay=0.5, lr=0.1, clip=1.0)
    state = fresh(algo)
    zero = jax.tree.map(jnp.zeros_like, state.nets)
    with jax.numpy_dtype_promotion("standard"):
        moves, _ = jax.jit(algo.optimiser().update)(zero, state.opt_state, state.nets)
    before, moved = state.nets.model, moves.model
    np.testing.assert_allclose(moved.heads, -0.05 * before.heads, rtol=1e-5)
    dense, still = moved.blocks.blocks[0].up, (moved.token, moved.position, moved.norm.scale)
    np.testing.assert_allclose(dense.weight, -0.05 * before.blocks.blocks[0].up.weight, rtol=1e-5)
    assert not any(np.any(x) for x in (*still, dense.bias, moved.blocks.blocks[0].norm_mlp.scale))


def test_an_environment_with_goals_is_refused() -> None:
    with pytest.raises(UserError, match="--algo=tt: toy-point-goals has goals"):
        make(GOAL_SPEC)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 4}, "--hp.context=4: must be 2 to --hp.window=3"),
        ({"heads": 3}, "--hp.heads=3: must divide the width 8"),
        ({"hidden": (8, 16)}, "give equal widths"),
        ({"action_cdf": 1.0}, "--hp.action-cdf=1.0: must be in"),
        ({"reward_scale": 0.1}, "--hp.reward-scale=0.1: quantiles do not depend on the scale"),
    ],
)
def test_bad_hyperparameters_are_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make(SPEC, **changes)
