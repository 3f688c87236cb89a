"""MAC where data record terminations: terms against NumPy, units, and that it learns to avoid them."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from mac.config import Config
from mac.data.sampler import sample
from mac.errors import UserError
from mac.mac import MAC, Nets
from mac.mac_diagnostics import expected_return
from mac.nn.mlp import scalar, value_net
from mac.ops.losses import cross_entropy
from mac.run.evaluate import Policies, evaluate, evaluation_keys
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.report.realized_return import ended_itself, realised_return, steady_reward
from mac.run.segment import init, segment
from mac.types import Episodes, SampleSpec
from tests.helpers.mac_cases import Case, leaves, make_case, own_losses, touched
from tests.helpers.numpy_mac import double, fresh
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import (
    EDGE,
    FALL_SPEC,
    SPEC,
    STRIDE,
    EdgeEnv,
    edge_mac,
    falling_window,
    identity,
    mac,
)


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(edge_mac())


@pytest.fixture(scope="module")
def gradients(case: Case) -> dict[str, Nets]:
    return case.gradients()


@pytest.mark.parametrize(
    "changes",
    slow_except(
        [{}], [{}, {"chunk_reward": "sum", "chunk": 3, "rollout": 2}, {"lam": 0.7, "rollout_batch": 4}]
    ),
)
def test_losses_with_terminations_are_those_of_algorithm_1(changes: dict[str, Any]):
    case = make_case(edge_mac(**changes))
    total, metrics = case.loss()
    got = {net: float(metrics[metric]) for net, metric in own_losses(case.algo).items()}
    assert set(got) == {"model", "reward", "termination", "flow", "policy", "v", "q"}
    assert got == pytest.approx(case.by_hand(double(case.nets)), rel=1e-4)
    assert float(total) == pytest.approx(sum(got.values()), rel=1e-6)


def test_batch_has_chunks_with_and_without_termination(case: Case):
    terminated = 1 - np.asarray(case.batch.masks).min(-1)
    assert 0 < terminated.mean() < 1


@pytest.mark.parametrize("net", ["termination", "v", "q"])
def test_gradients_with_terminations_are_the_slopes(case: Case, gradients: dict[str, Nets], net: str):
    for got, want in case.slopes_along_random_directions(gradients, net):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_no_loss_reaches_another_network(gradients: dict[str, Nets]):
    assert touched(gradients) == {loss: {loss} for loss in own_losses(edge_mac())}


def test_masks_of_the_data_teach_terminations_and_nothing_else(case: Case):
    safe = dataclasses.replace(case.batch, masks=jnp.ones_like(case.batch.masks))
    got, want = dataclasses.replace(case, batch=safe).loss()[1], case.loss()[1]
    changed = {name for name in want if float(got[name]) != float(want[name])}
    assert changed == {"model/termination_loss"}


def test_nothing_counts_after_a_certain_termination(case: Case):
    """Whatever the value of the states after it, targets are then the rewards alone."""
    certain = eqx.tree_at(lambda n: n.termination.dense[-1].bias, case.nets, replace_fn=lambda b: b + 1000)
    falling = dataclasses.replace(case, nets=certain)
    worth = dataclasses.replace(falling, target=jax.tree.map(lambda x: 5 * x, case.target))
    assert float(falling.loss()[1]["value/loss"]) == pytest.approx(float(worth.loss()[1]["value/loss"]))
    usual = dataclasses.replace(case, target=worth.target)
    assert float(case.loss()[1]["value/loss"]) != pytest.approx(float(usual.loss()[1]["value/loss"]))


def test_networks_of_other_environments_are_bitwise_as_they_were():
    """The network of terminations has the last key, so that it moves no other draw."""
    terminating, without = fresh(edge_mac()).nets, fresh(mac()).nets
    assert without.termination is None and terminating.termination is not None
    for x, y in zip(leaves(dataclasses.replace(terminating, termination=None)), leaves(without), strict=True):
        np.testing.assert_array_equal(x, y)


# Units.


def test_reward_scale_is_learned_and_divided_out_of_reports():
    algo = edge_mac(reward_scale=0.25)
    window, key = falling_window(2), jr.key(0)
    got, want = (sample(window, a.sample, key).rewards for a in (algo, edge_mac()))
    np.testing.assert_allclose(got, 0.25 * np.asarray(want), rtol=1e-6)
    q = jnp.asarray([2.0, -1.0])
    for reduce, factor in (("mean", 2.0), ("sum", 1.0)):
        cfg = dataclasses.replace(algo.cfg, chunk_reward=reduce)
        np.testing.assert_allclose(expected_return(cfg, q, goals=False), np.asarray(q) * factor / 0.25)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf")])
def test_a_scale_that_is_not_positive_is_refused(scale: float):
    with pytest.raises(UserError, match="reward-scale"):
        Config(reward_scale=scale)


def test_termination_ends_returns_and_the_limit_does_not():
    length = jnp.asarray([5, FALL_SPEC.max_steps])
    success, last = jnp.asarray([False, False]), jnp.asarray([3.0, 3.0])
    total = jnp.asarray([10.0, 24.0])
    ended = ended_itself(FALL_SPEC, success, length)
    np.testing.assert_array_equal(ended, [True, False])
    np.testing.assert_array_equal(ended_itself(SPEC, success, length), [False, False])
    steady = steady_reward(FALL_SPEC, last, total, length)
    np.testing.assert_allclose(steady, [2.0, 2.0])
    np.testing.assert_allclose(steady_reward(SPEC, last, total, length), last)
    got = realised_return(jnp.asarray([9.0, 15.0]), steady, ended, length, 0.9)
    longer = sum(0.9**t * 2.0 for t in range(FALL_SPEC.max_steps, 2000))
    np.testing.assert_allclose(got, [9.0, 15.0 + longer], rtol=1e-5)


# Learning: the best place is at the right edge, and one step beyond it all is lost.

SEEDS, UPDATES = 2, 600
LEARNS = Config(
    batch=64, hidden=(32, 32), lr=3e-3, cooldown=0.5, discount=0.95, tau_ema=0.02, chunk=2, rollout=4,
    candidates=8, candidates_test=16, flow_steps=5, reward_scale=0.5,
)  # fmt: skip


def played(cfg: Config, state: Any) -> Episodes:
    keys = evaluation_keys(jnp.arange(SEEDS), UPDATES)
    policies = Policies(MAC(cfg, FALL_SPEC, UPDATES), identity(), state)
    return jax.device_get(evaluate(policies, EdgeEnv(), 20, keys))


@pytest.mark.slow
def test_mac_goes_to_the_edge_and_does_not_fall():
    algo, mesh = MAC(LEARNS, FALL_SPEC, UPDATES), seed_mesh(1)
    keys, rows = seed_keys(0, SEEDS), falling_window(chunk=2, episodes=300)
    state, _ = segment(algo, mesh, rows, keys, np.arange(UPDATES, dtype=np.int32), init(algo, mesh, keys))
    chosen = played(LEARNS, state)
    cloned = played(dataclasses.replace(LEARNS, candidates_test=1), state)
    terminated = (chosen.length < FALL_SPEC.max_steps).mean(), (cloned.length < FALL_SPEC.max_steps).mean()
    mine, theirs = (x.episode_return.mean((1, 2)) for x in (chosen, cloned))
    print(f"returns {mine} (cloned {theirs}), terminations {terminated[0]:.2f} (cloned {terminated[1]:.2f})")
    # From -0.5 at full speed the edge is 7 steps away: 0.7 on average after 12 steps, so at most 17 in all.
    assert STRIDE * 7 >= EDGE + 0.5
    assert (mine > theirs + 2).all() and terminated[0] < 0.15 < terminated[1]
    assert chosen.predicted is not None and chosen.realised is not None
    assert abs(chosen.predicted.mean() / chosen.realised.mean() - 1) < 0.3


# Why actions after a terminal state are not zeros.


def found_terminations(blank: bool) -> tuple[float, float]:
    """Share of terminations that a network finds in chunks like those it was trained on, and in chunks that
    go on with ordinary actions; `blank` trains it on zeros after each terminal state."""
    chunk, rows = 6, falling_window(chunk=6, episodes=300)
    spec = SampleSpec(128, chunk)

    def draw(key: jax.Array, blank: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        batch = sample(rows, spec, key)
        assert batch.masks is not None
        over = jnp.pad(1 - batch.masks[:, :-1], ((0, 0), (1, 0)))[..., None] > 0
        actions = jnp.where(jnp.broadcast_to(over & blank, batch.actions.shape), 0, batch.actions)
        return batch.obs, actions.reshape(len(actions), -1), 1 - batch.masks.min(-1)

    rule = optax.adam(3e-3)

    def step(carry: Any, key: jax.Array) -> Any:
        net, state = carry
        s, a, terminated = draw(key, blank)
        slope = jax.grad(lambda net: cross_entropy(scalar(net, s, a), terminated))(net)
        with jax.numpy_dtype_promotion("standard"):
            change, state = rule.update(slope, state, net)
        return (optax.apply_updates(net, change), state), None

    net = value_net((2, 2 * chunk), (32, 32), key=jr.key(0))
    (net, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jr.split(jr.key(1), 800)))((net, rule.init(net)))

    def found(blank: bool) -> float:
        drawn = [draw(jr.key(i), blank) for i in range(90, 98)]
        s, a, terminated = (jnp.concatenate(x) for x in zip(*drawn, strict=True))
        return float(jnp.mean((scalar(net, s, a) > 0)[terminated == 1].astype(jnp.float32)))

    return found(blank), found(False)


@pytest.mark.slow
def test_zeros_after_terminal_states_would_be_looked_for():
    blank, elsewhere = found_terminations(True), found_terminations(False)
    print(f"terminations found: trained on zeros {blank}, on actions from elsewhere {elsewhere}")
    assert blank[0] > 0.95 and elsewhere[1] > 0.9
    assert blank[1] < elsewhere[1] - 0.1
