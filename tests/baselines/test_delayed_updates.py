"""Networks that learn at some updates only: ReBRAC's policy between its turns, against Adam in NumPy."""

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from mac.algorithm import TrainState
from mac.data.sampler import sample
from mac.ops.optimisers import at_some_updates, linear_cooldown
from tests.helpers.algorithm_cases import make
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import window

LR = 0.01
VARIANTS = [*itertools.product([True, False], [True, False])]
"""Whether momentum moves the policy between turns, and whether the first update is a turn."""


class Adam:
    """Adam in NumPy (Kingma & Ba 2015, algorithm 1), for a vector."""

    def __init__(self, size: int):
        self.m, self.v, self.count = np.zeros(size), np.zeros(size), 0

    def move(self, grad: np.ndarray, lr: float) -> np.ndarray:
        self.count += 1
        self.m = 0.9 * self.m + 0.1 * grad
        self.v = 0.999 * self.v + 0.001 * grad**2
        m, v = self.m / (1 - 0.9**self.count), self.v / (1 - 0.999**self.count)
        return -lr * m / (np.sqrt(v) + 1e-8)


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def moves(grads: np.ndarray, every: int, coast: bool, first: bool) -> np.ndarray:
    """What `at_some_updates` does with a row of gradients per update."""
    rule = at_some_updates(optax.adam(LR), lambda t: t % every == (0 if first else every - 1), coast=coast)

    def step(state: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        update, state = rule.update(given[0], state, step=given[1])
        return state, jnp.asarray(update)

    rows = jnp.asarray(grads, jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.lax.scan(step, rule.init(rows[0]), (rows, jnp.arange(len(rows))))[1])


@pytest.mark.parametrize("every", slow_except([2], [1, 2, 3]))
@pytest.mark.parametrize(("coast", "first"), VARIANTS)
def test_turns_are_those_of_adam_with_zeros_or_with_pauses(every: int, coast: bool, first: bool):
    grads, adam = np.random.default_rng(0).normal(size=(7, 3)), Adam(3)
    for t, got in enumerate(moves(grads, every, coast, first)):
        turn = t % every == 0 if first else (t + 1) % every == 0
        want = adam.move(grads[t] * turn, LR) if turn or coast else np.zeros(3)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-8)


def test_coasting_policy_goes_about_1_4_times_as_far():
    """A gradient of 1 at every second update: m -> 1/2, v -> 1/2, so steps of 0.71; else 1 of each two."""
    far, near = (-moves(np.ones((4000, 1)), 2, coast, False).sum() for coast in (True, False))
    assert near == pytest.approx(2000 * LR, rel=1e-3)
    assert far / near == pytest.approx(2**0.5, rel=0.02)


@pytest.mark.parametrize(("coast", "first"), slow_except([(True, False)], VARIANTS))
def test_rebracs_policy_and_target_networks_take_turns(coast: bool, first: bool):
    algo: Any = make("rebrac", "reward", lr=LR, tau_ema=0.1, actor_coasts=coast, actor_first=first)
    state: TrainState = jax.jit(algo.init)(jr.key(0))
    # Away from its start, a target network does not equal its network, so that following shows.
    state = dataclasses.replace(state, target=jax.tree.map(lambda x: x + 0.1, state.target))
    update, slope = jax.jit(algo.update), jax.jit(jax.grad(algo.loss, has_aux=True))
    batch = jax.jit(sample, static_argnums=1)(window(1), algo.sample, jr.key(2))
    actor, critics = Adam(flat(state.nets.actor).size), Adam(flat(state.nets.q).size)
    for step in range(5):
        key, turn = jr.key(step), step % 2 == (0 if first else 1)
        grads, _ = slope(state.nets, state.target, batch, key)
        after, _ = update(state, batch, jnp.asarray(step, jnp.int32), key)
        went = actor.move(flat(grads.actor) * turn, LR) if turn or coast else 0.0
        want = flat(state.nets.actor) + went
        np.testing.assert_allclose(flat(after.nets.actor), want, rtol=1e-3, atol=1e-5)
        want = flat(state.nets.q) + critics.move(flat(grads.q), LR)
        np.testing.assert_allclose(flat(after.nets.q), want, rtol=1e-3, atol=1e-5)
        want = flat(state.target) + 0.1 * turn * (flat(state.nets) - flat(state.target))
        np.testing.assert_allclose(flat(after.target), want, rtol=1e-5, atol=1e-6)
        assert np.any(flat(after.nets.actor) != flat(state.nets.actor)) == (turn or (coast and step > 0))
        state = after


@pytest.mark.parametrize(("coast", "first"), VARIANTS)
def test_learning_rates_of_policy_and_critics_cool_together(coast: bool, first: bool):
    """Over 12 updates, of which the last half cools; an optimiser that rests counts turns, not updates."""
    algo: Any = make("rebrac", "reward", 12, lr=LR, cooldown=0.5, actor_coasts=coast, actor_first=first)
    rates = [float(jnp.asarray(algo.actor_rate(jnp.asarray(i)))) for i in range(12 if coast else 6)]
    turns = range(12) if coast else range(0 if first else 1, 12, 2)
    assert rates == pytest.approx([float(jnp.asarray(linear_cooldown(LR, 12, 0.5)(t))) for t in turns])
    assert rates[-1] < 0.5 * LR


PARTS = {
    "cql": ({"actor_lr": 0.002}, {"actor": (0.002, 0, 12), "log_weight": (0.002, 0, 12), "q": (LR, 0, 12)}),
    "mopo": (
        {"actor_lr": 0.002, "model_lr": 0.003, "pretrain": 5},
        {"model": (0.003, 0, 5), "actor": (0.002, 5, 12), "q": (LR, 5, 12)},
    ),
    "mobile": ({"actor_lr": 0.002}, {"model": (LR, 0, 12), "actor": (0.002, 0, 12), "q": (LR, 0, 12)}),
    "tap": (
        {"prior_share": 0.5, "weight_decay": 0.0},
        {"encoder": (LR, 0, 6), "decoder": (LR, 0, 6), "prior": (LR, 6, 12)},
    ),
}
"""Settings of methods whose networks have rates of their own or rest: each network's rate, and the first
update in which it learns and the one after the last."""


@pytest.mark.parametrize("name", PARTS)
def test_every_learning_rate_cools_at_the_end_of_the_run(name: str):
    """Adam moves a weight of constant gradient by the learning rate; over 12 updates the last 9 cool."""
    changes, wanted = PARTS[name]
    algo: Any = make(name, "reward", 12, lr=LR, cooldown=0.75, **changes)
    nets = jax.eval_shape(algo.init, jr.key(0)).nets
    weights = jax.tree.map(lambda x: jnp.ones(x.shape), nets)
    rule = optax.with_extra_args_support(algo.optimiser())

    def step(state: Any, t: jax.Array) -> tuple[Any, Any]:
        moves, state = rule.update(weights, state, weights, step=t)
        return state, {part: jax.tree.leaves(getattr(moves, part))[0].ravel()[0] for part in wanted}

    with jax.numpy_dtype_promotion("standard"):
        moves = jax.jit(lambda: jax.lax.scan(step, rule.init(weights), jnp.arange(12))[1])()
    for part, (lr, first, end) in wanted.items():
        rates = [lr * min(1, (12 - t) / 9) if first <= t < end else 0 for t in range(12)]
        np.testing.assert_allclose(-np.asarray(moves[part]), rates, rtol=1e-3, atol=1e-9, err_msg=part)
