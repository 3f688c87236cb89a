"""The ablations of MAC: losses, gradients and updates against NumPy, and what each one can or cannot do."""

import dataclasses
from functools import partial
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from mac.algorithm import TrainState
from mac.data.sampler import sample
from mac.mac import MAC, Nets
from mac.types import Batch
from tests.helpers.mac_cases import assert_first_step_of_adam, assert_followed, slopes_of
from tests.helpers.numpy_ablations import KINDS, MODES, choose, losses, make, normal
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import mac, window

LR, TAU = 1e-2, 0.1
CASES = [(kind, mode) for kind in KINDS for mode in MODES]
QUICK = (("gaussian", "reward"), ("fql", "goals"))
METRICS = {
    "model": ("model/dynamics_loss",),
    "reward": ("model/reward_loss",),
    "success": ("model/success_loss",),
    "flow": ("policy/flow_loss",),
    "policy": ("policy/nll", "policy/distil_loss", "policy/q_loss", "policy/regression_loss"),
    "v": ("value/loss",),
    "q": ("critic/loss",),
}
"""The losses that train each network; of the policy's, a method has one or two."""
leaves = jax.tree.leaves


@partial(jax.jit, static_argnums=0)
def evaluated(algo: MAC, state: TrainState, batch: Batch, key: jax.Array) -> tuple[Any, ...]:
    """Total loss, metrics and gradient, and the state after an update."""
    (total, metrics), grads = jax.value_and_grad(algo.loss, has_aux=True)(
        state.nets, state.target, batch, key
    )
    return total, metrics, grads, algo.update(state, batch, jnp.zeros((), jnp.int32), key)[0]


@dataclasses.dataclass(frozen=True)
class Case:
    """One method, its weights away from their start so that no bias, scale or target network is trivial."""

    kind: str
    algo: MAC
    state: TrainState
    batch: Batch
    key: jax.Array
    total: jax.Array
    metrics: dict[str, jax.Array]
    grads: Nets
    after: TrainState

    @property
    def names(self) -> list[str]:
        """The networks that the method has."""
        return [name for name in METRICS if getattr(self.state.nets, name) is not None]

    def by_hand(self, nets: Nets) -> dict[str, float]:
        frozen, target = double(self.state.nets), double(self.state.target)
        with jax.numpy_rank_promotion("allow"):
            return losses(self.kind, self.algo, nets, frozen, target, self.batch, self.key)


def make_case(kind: str, mode: str, **changes: Any) -> Case:
    algo = make(kind, mode, lr=LR, tau_ema=TAU, **changes)
    fresh = jax.jit(algo.init)(jr.key(0))
    nets = perturb(fresh.nets, seed=1)
    batch = jax.jit(sample, static_argnums=1)(window(algo.cfg.chunk), algo.sample, jr.key(2))
    state = TrainState(nets, perturb(nets.v, seed=4), fresh.opt_state)
    return Case(kind, algo, state, batch, jr.key(5), *evaluated(algo, state, batch, jr.key(5)))


@pytest.fixture(
    scope="module",
    params=[pytest.param(c, id="-".join(c), marks=[pytest.mark.slow] * (c not in QUICK)) for c in CASES],
)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(*request.param)


def test_losses_are_those_of_numpy(case: Case):
    want = case.by_hand(double(case.state.nets))
    got = {n: sum(float(case.metrics[m]) for m in METRICS[n] if m in case.metrics) for n in case.names}
    assert got == pytest.approx(want, rel=2e-4)
    assert float(case.total) == pytest.approx(sum(want.values()), rel=2e-4)


def test_gradient_of_the_total_is_each_networks_own_slope(case: Case):
    """Central differences of the slow version; a leak from another network's loss would add to it."""
    nets = double(case.state.nets)
    for name in case.names:
        for got, want in slopes_of(nets, name, getattr(case.grads, name), case.by_hand, count=2):
            assert got == pytest.approx(want, rel=2e-3, abs=2e-4), name


def test_update_follows_gradients_and_moves_the_target_network(case: Case):
    before, after = case.state, case.after
    assert_first_step_of_adam(before.nets, after.nets, case.grads, LR)
    assert_followed(before.target, after.target, before.nets.v, TAU)


def test_state_holds_the_networks_of_the_method_only(case: Case):
    assert all(isinstance(leaf, jax.Array) for leaf in leaves(case.after))
    chex.assert_trees_all_equal_shapes_and_dtypes(case.state, case.after)
    outcome = "success" if case.algo.env.goal_dim else "reward"
    policy = {"gaussian": {"policy"}, "fql": {"flow", "policy"}, "euler": {"flow"}, "regression": {"policy"}}
    assert set(case.names) == {"model", outcome, "v", "q"} | policy[case.kind]
    mode = "reward" if case.algo.env.goal_dim is None else "goals"
    again = make(case.kind, mode, lr=LR, tau_ema=TAU)
    assert not any(map(eqx.is_array, leaves(case.algo)))
    assert case.algo == again and hash(case.algo) == hash(again)


def test_acting_takes_the_best_sample_under_the_critic(case: Case):
    s = np.asarray(np.random.default_rng(0).normal(size=(5, 2)), np.float32)
    g = None if case.algo.env.goal_dim is None else 0.5 - s
    goal = None if g is None else jnp.asarray(g)
    got = jax.jit(case.algo.act)(case.state, jnp.asarray(s), goal, jr.key(1))
    noises = normal(jr.key(1), (case.algo.cfg.candidates_test, 5, 4))
    want = choose(case.kind, double(case.state.nets), s, g, noises)
    assert got.shape == (5, 1, 2)
    np.testing.assert_allclose(got[:, 0], want[:, :2], rtol=1e-4, atol=1e-5)


# Options.


@pytest.fixture(scope="module")
def options() -> Case:
    return make_case("fql", "reward", release_discount=True, alpha=0.0)


@pytest.mark.slow
def test_release_discount_is_one_steps_in_the_returns_of_v_only(options: Case):
    def discount(algo: MAC) -> Any:
        return algo.policy.value_discount(algo.cfg)

    want = options.by_hand(double(options.state.nets))
    for name in ("v", "q"):
        assert float(options.metrics[METRICS[name][0]]) == pytest.approx(want[name], rel=2e-4)
    assert discount(options.algo) == 0.9 and options.algo.discount == pytest.approx(0.81)
    assert discount(make("fql", "reward")) == pytest.approx(0.81)


def test_without_alpha_the_critic_alone_pulls_the_policy(options: Case):
    assert float(options.metrics["policy/distil_loss"]) == 0
    assert any(np.any(leaf) for leaf in leaves(options.grads.policy))
    want = options.by_hand(double(options.state.nets))["policy"]
    assert float(options.metrics["policy/q_loss"]) == pytest.approx(want, rel=2e-4)


def test_more_euler_steps_follow_the_flow_itself():
    algo = make("euler", "reward", flow_steps=3)
    nets = jax.jit(algo.init)(jr.key(0)).nets
    s = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)), jnp.float32)
    # MAC with the same flow, which while acting follows it with as many steps.
    teacher = mac(flow_steps_test=3)
    got = algo.sample_chunks(nets, s, None, jr.key(1), 4)
    np.testing.assert_allclose(
        got, teacher.sample_chunks(nets, s, None, jr.key(1), 4, acting=True), rtol=1e-5
    )


# What each policy can learn of data whose action is either of two, each half of the time, in every state.


def samples_after_training(algo: MAC, updates: int = 1500, size: float = 0.99999) -> np.ndarray:
    """Samples of the policy's first entry, trained on the cloning losses alone; the data is ± `size`."""
    optimiser = optax.adam(3e-3)
    nets = algo.nets(jr.key(0))
    s = jnp.zeros((128, 2))

    def one(carry: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
        nets, opt_state = carry
        k_data, k_loss = jr.split(key)
        a = size * jr.rademacher(k_data, (128, 2), jnp.float32)

        def loss(nets: Nets) -> jax.Array:
            return sum(algo.policy.behavior_loss(algo.cfg, nets, s, None, a, k_loss).values(), jnp.zeros(()))

        with jax.numpy_dtype_promotion("standard"):
            moves, opt_state = optimiser.update(jax.grad(loss)(nets), opt_state)
        return (optax.apply_updates(nets, moves), opt_state), None

    @jax.jit
    def train(nets: Nets) -> jax.Array:
        start = (nets, optimiser.init(nets))  # pyright: ignore[reportArgumentType]
        (nets, _), _ = jax.lax.scan(one, start, jr.split(jr.key(1), updates))
        return algo.sample_chunks(nets, s[:1], None, jr.key(2), 1000)

    return np.asarray(train(nets))[:, 0, 0]


SIZES = {"chunk": 1, "hidden": (64, 64)}


@pytest.mark.slow
def test_distilled_flow_keeps_both_modes():
    got = samples_after_training(mac(**SIZES, flow_steps=10), updates=3000)
    assert np.mean(np.abs(got) > 0.7) > 0.7
    assert 0.35 < np.mean(got > 0) < 0.65


@pytest.mark.slow
@pytest.mark.parametrize("kind", slow_except(["regression"], ["euler", "regression"]))
def test_one_step_policy_collapses_without_distillation(kind: str):
    got = samples_after_training(make(kind, "reward", **SIZES))
    assert np.abs(np.mean(got)) < 0.15 and np.mean(np.abs(got) < 0.4) > 0.95


@pytest.mark.slow
def test_gaussian_puts_its_samples_between_the_modes():
    """Its best fit to ± 0.5 is tanh of a normal of mean 0 and standard deviation atanh(0.5) = 0.549.

    |a| < 0.25, where there is no data, then has probability 2 Φ(0.2554 / 0.5493) - 1 = 0.358.
    """
    got = samples_after_training(make("gaussian", "reward", **SIZES), size=0.5)
    assert np.mean(np.abs(got) < 0.25) == pytest.approx(0.358, abs=0.06)
    assert np.std(np.arctanh(got)) == pytest.approx(0.549, rel=0.15)
