"""MAC's loss and update against Algorithm 1 written out in NumPy, and what its pieces must not touch."""

import dataclasses
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.algorithm import TrainState
from mac.config import Config
from mac.errors import UserError
from mac.mac import MAC, Nets
from mac.ops.optimisers import linear_cooldown, polyak
from tests.helpers.mac_cases import Case, draw_batch, leaves, make_case, own_losses, slopes, touched
from tests.helpers.numpy_mac import choose, double, follow, fresh, run
from tests.helpers.toy_env import SPEC, mac

LR, TAU = 1e-2, 0.1


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(mac())


@pytest.fixture(scope="module")
def gradients(case: Case) -> dict[str, Nets]:
    return case.gradients()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="paper"),
        pytest.param({"chunk_reward": "sum", "chunk": 3, "rollout": 2}, id="sum", marks=pytest.mark.slow),
        pytest.param({"lam": 0.7, "candidates": 1}, id="lambda", marks=pytest.mark.slow),
        pytest.param({"rollout_batch": 2, "flow_steps": 3}, id="part of the batch", marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_algorithm_1(changes: dict[str, Any]):
    case = make_case(mac(**changes))
    total, metrics = case.loss()
    got = {net: float(metrics[metric]) for net, metric in own_losses(case.algo).items()}
    assert got == pytest.approx(case.by_hand(double(case.nets)), rel=1e-4)
    assert float(total) == pytest.approx(sum(got.values()), rel=1e-6)


@pytest.mark.parametrize("net", own_losses(mac()))
def test_gradient_of_each_loss_is_the_slope_of_algorithm_1(case: Case, gradients: dict[str, Nets], net: str):
    """Central differences of the NumPy loss along random directions of the network that it trains."""
    for got, want in case.slopes_along_random_directions(gradients, net):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_no_loss_reaches_another_network(gradients: dict[str, Nets]):
    assert touched(gradients) == {loss: {loss} for loss in own_losses(mac())}


def test_masks_of_the_data_do_not_matter(case: Case):
    assert case.batch.masks is not None and np.any(case.batch.masks)
    solved = dataclasses.replace(case.batch, masks=jnp.zeros_like(case.batch.masks))
    got, want = (dataclasses.replace(case, batch=batch).loss()[1] for batch in (solved, case.batch))
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in want.items()}


def test_critic_and_value_never_see_the_actions_of_the_data(case: Case):
    batch = dataclasses.replace(case.batch, actions=-0.5 * case.batch.actions)
    got, want = dataclasses.replace(case, batch=batch).loss()[1], case.loss()[1]
    for name in ("critic/loss", "value/loss", "critic/q_mean"):
        assert float(got[name]) == pytest.approx(float(want[name]), rel=1e-6)
    assert float(got["policy/flow_loss"]) != pytest.approx(float(want["policy/flow_loss"]), rel=1e-3)


# Choosing chunks.

jit_propose = jax.jit(MAC.best_chunk, static_argnums=(0, 5))


def test_proposals_are_clipped_before_the_critic_scores_them():
    nets = double(fresh(mac()).nets)
    wild = dataclasses.replace(nets, policy=jax.tree.map(lambda x: 30 * x, nets.policy))
    wild = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), wild)
    s = jnp.asarray(np.random.default_rng(0).normal(size=(16, 2)), jnp.float32)
    got = np.asarray(jit_propose(mac(), wild, s, None, jr.key(1), 8))
    noise = np.asarray(jr.normal(jr.key(1), (8, 16, 4)))
    raw = run(double(wild).policy, np.asarray(s), noise)
    assert np.abs(raw).max() > 1.5
    np.testing.assert_allclose(got, choose(double(wild), np.asarray(s), noise), rtol=1e-4, atol=1e-5)
    unclipped = np.argmax(run(double(wild).q, np.asarray(s), raw)[..., 0], axis=0)
    late = np.clip(raw[unclipped, np.arange(16)], -1, 1)
    assert not np.allclose(got, late)  # the order matters for these weights


def test_one_candidate_is_a_plain_sample():
    nets = fresh(mac()).nets
    got = jit_propose(mac(), nets, jnp.zeros((3, 2)), None, jr.key(1), 1)
    want = run(double(nets).policy, np.zeros((3, 2)), np.asarray(jr.normal(jr.key(1), (1, 3, 4)))[0])
    np.testing.assert_allclose(got, np.clip(want, -1, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("execute", [1, 2, 3])
def test_act_returns_the_chunks_first_actions_in_order(execute: int):
    algo = mac(chunk=3, execute=execute, candidates_test=5)
    nets = fresh(mac(chunk=3)).nets
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    got = jax.jit(algo.act)(TrainState(nets, nets.v, ()), obs, None, jr.key(1))
    assert got.shape == (4, execute, 2)
    chunk = np.asarray(jit_propose(mac(chunk=3), nets, obs, None, jr.key(1), 5)).reshape(4, 3, 2)
    np.testing.assert_allclose(got, chunk[:, :execute], rtol=1e-5, atol=1e-6)
    assert np.abs(np.asarray(got)).max() <= 1


def test_acting_with_the_flow_chooses_among_its_own_chunks():
    algo = mac(candidates_test=4, flow_steps_test=3)
    nets = fresh(mac()).nets
    obs = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    got = jax.jit(algo.act)(TrainState(nets, nets.v, ()), obs, None, jr.key(1))
    wide, s = double(nets), np.asarray(obs, np.float64)
    noise = np.asarray(jr.normal(jr.key(1), (4, 5, 4)), np.float64)
    chunks = np.clip(follow(wide.flow, (np.broadcast_to(s, (4, 5, 2)),), noise, 3), -1, 1)
    best = np.argmax(run(wide.q, s, chunks)[..., 0], axis=0)
    np.testing.assert_allclose(got[:, 0], chunks[best, np.arange(5)][:, :2], rtol=1e-4, atol=1e-5)


# The update.


@pytest.fixture(scope="module")
def three_updates(case: Case) -> tuple[list[TrainState], list[Any]]:
    """States before and after three updates, and the gradients that made them."""
    update = jax.jit(mac(lr=LR, tau_ema=TAU).update)
    states, grads = [fresh(case.algo)], []
    for step in range(3):
        batch, state = draw_batch(case.algo, jr.key(step)), states[-1]
        rows = slopes(case.algo, state.nets, state.target, batch, jr.key(step)).values()
        grads.append([sum(double(list(same))) for same in zip(*map(leaves, rows), strict=True)])
        states.append(update(state, batch, jnp.asarray(step), jr.key(step))[0])
    return states, grads


def test_slow_values_lag_one_update_behind(three_updates: Any):
    states, _ = three_updates
    first = states[0].target
    chex.assert_trees_all_close(first, states[0].nets.v, rtol=0)  # a copy at the start
    chex.assert_trees_all_close(
        states[1].target, first, rtol=1e-6
    )  # unmoved: it followed weights not yet trained
    want = jax.tree.map(lambda v, t: TAU * v + (1 - TAU) * t, states[1].nets.v, first)
    chex.assert_trees_all_close(states[2].target, want, rtol=1e-5, atol=1e-7)


def test_update_is_adam_on_the_whole_loss(three_updates: Any):
    """Kingma and Ba 2015, Algorithm 1: decay rates 0.9 and 0.999, epsilon 1e-8, no weight decay."""
    states, grads = three_updates
    params = double(leaves(states[0].nets))
    m = [np.zeros_like(p) for p in params]
    v = [np.zeros_like(p) for p in params]
    for t, grad in enumerate(grads, start=1):
        for i, g in enumerate(grad):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g**2
            params[i] = params[i] - LR * (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-8)
    # A gradient near 0 has a step of either sign, so single entries may differ by a part of a step.
    for got, want in zip(leaves(states[3].nets), params, strict=True):
        assert np.mean(np.abs(got - want) < 1e-5) > 0.99
        assert np.max(np.abs(got - want)) < 3 * LR


def test_state_holds_arrays_only(three_updates: Any):
    states, _ = three_updates
    assert all(isinstance(leaf, jax.Array) for leaf in leaves(states[-1]))
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[-1])
    assert [x.aval for x in leaves(states[0])] == [x.aval for x in leaves(states[-1])]


def test_algorithm_is_hashable_and_holds_no_array():
    assert not any(map(eqx.is_array, leaves(mac())))
    assert mac() == mac() and hash(mac()) == hash(mac())
    assert mac() != mac(lr=1e-3)


def test_learning_rate_cools_down_over_the_last_share_of_the_run():
    rate = linear_cooldown(1e-3, steps=100, share=0.25)
    got = [float(rate(step)) for step in (0, 75, 80, 99, 100, 200)]
    np.testing.assert_allclose(got, [1e-3, 1e-3, 8e-4, 4e-5, 0, 0], rtol=1e-5, atol=1e-10)


def test_cooling_down_needs_the_length_of_the_run():
    with pytest.raises(UserError, match="needs the length of the run"):
        MAC(Config(cooldown=0.5), SPEC)


def test_polyak_moves_by_its_rate():
    got = polyak({"a": jnp.ones(2)}, {"a": jnp.full(2, 3.0)}, 0.25)
    np.testing.assert_allclose(got["a"], [1.5, 1.5])
