"""MAC's models of successors: losses and gradients against NumPy, and worlds whose answers are known."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from mac.ablations.dynamics_only import Dynamics
from mac.chunk_dynamics import KINDS, make_dynamics
from mac.config import Config
from mac.data.sampler import sample
from mac.errors import UserError
from mac.mac_diagnostics import compute_diagnostics
from mac.nn.frozen import Numerics
from mac.ops.rollout import Trajectory, imagine, open_loop
from tests.helpers.key_usage import recorded, used_twice
from tests.helpers.mac_cases import Case, make_case, own_losses, touched
from tests.helpers.numpy_ablations import make
from tests.helpers.numpy_mac import double, fresh
from tests.helpers.toy_env import SPEC, goal_mac, mac, window

OPTIONS: dict[str, dict[str, Any]] = {
    "gaussian": {"dynamics": "gaussian", "dynamics_samples": 3},
    "flow": {"dynamics": "flow", "dynamics_steps": 3, "dynamics_scale": 0.5, "dynamics_samples": 2},
}
BOUNDED: dict[str, dict[str, Any]] = {
    "bounded": {"state_bound": 0.8},
    "bounded gaussian": {"state_bound": 0.8, **OPTIONS["gaussian"]},
}


# Against NumPy.


@pytest.fixture(scope="module", params=OPTIONS | BOUNDED)
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(mac(lam=0.9, **(OPTIONS | BOUNDED)[request.param]))


def test_losses_are_those_of_numpy(case: Case):
    metrics, want = case.loss()[1], case.by_hand(double(case.nets))
    got = {net: float(metrics[name]) for net, name in own_losses(case.algo).items()}
    assert got == pytest.approx(want, rel=2e-4)


def test_gradients_are_slopes_of_each_networks_loss(case: Case):
    """No loss reaches another network: values do not teach the model to please them."""
    gradients = case.gradients()
    assert touched(gradients) == {net: {net} for net in own_losses(case.algo)}
    for net in ("model", "v", "q"):
        for got, want in case.slopes_along_random_directions(gradients, net):
            assert got == pytest.approx(want, rel=2e-3, abs=2e-4), net


@pytest.mark.slow
def test_losses_with_goals_are_those_of_numpy():
    algo = goal_mac(value="bce", rollout_batch=5, **OPTIONS["flow"])
    case = make_case(algo)
    metrics, want = case.loss()[1], case.by_hand(double(case.nets))
    got = {net: float(metrics[name]) for net, name in own_losses(algo).items()}
    assert got == pytest.approx(want, rel=2e-4)


# What the rest of the project does with them.


@pytest.mark.parametrize("kind", OPTIONS)
def test_no_key_of_an_update_or_diagnosis_is_used_twice(kind: str, monkeypatch: pytest.MonkeyPatch):
    algo = mac(batch=5, rollout_batch=3, **OPTIONS[kind])
    state, data = fresh(algo), window(algo.cfg.chunk)
    batch = sample(data, algo.sample, jr.key(1))
    with recorded(monkeypatch) as seen:
        jax.jit(lambda *x: algo.loss(*x)[0])(state.nets, state.target, batch, jr.key(3))
        jax.jit(lambda *x: compute_diagnostics(algo, *x))(state.nets, data, jr.key(4))
    assert len(seen) > 20 and used_twice(seen) == {}


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("ablation", ["gaussian", "fql", "euler", "regression"])
def test_ablations_and_diagnoses_take_every_model(kind: str, ablation: str):
    algo = make(ablation, "reward", **OPTIONS[kind])
    state = jax.eval_shape(algo.init, jr.key(0))
    data = window(algo.cfg.chunk)
    batch = jax.eval_shape(partial(sample, spec=algo.sample), data, key=jr.key(0))
    after, metrics = jax.eval_shape(algo.update, state, batch, jnp.zeros((), jnp.int32), jr.key(1))
    assert jax.tree.structure(after) == jax.tree.structure(state) and "model/dynamics_loss" in metrics
    found = jax.eval_shape(algo.diagnose, state, data, jr.key(1))
    assert "diagnostics/drift_6" in found and "diagnostics/imagined_outside_6" in found


def test_off_splits_no_more_keys_than_before():
    """`jr.split(key, 6)` begins with `jr.split(key, 3)`, and a deterministic model asks for 3."""
    key = jr.key(7)
    first = jr.key_data(jr.split(key, 6)[:3])
    np.testing.assert_array_equal(first, jr.key_data(jr.split(key, 3)))
    assert (
        not make_dynamics(Config(), Numerics()).draws
        and make_dynamics(Config(dynamics="flow"), Numerics()).draws
    )
    assert set(KINDS) == {"deterministic", "gaussian", "flow"}


def test_random_model_gets_a_key_of_its_own_in_every_step():
    def model(s: jax.Array, a: jax.Array, key: jax.Array) -> jax.Array:
        return s + a + jr.normal(key, s.shape)

    def policy(s: jax.Array, key: jax.Array) -> jax.Array:
        return jr.uniform(key, s.shape)

    s = jnp.zeros((3, 2))
    tau = imagine(policy, model, s, 4, jr.key(0), jr.key(1))
    plain = imagine(policy, lambda s, a: s + a, s, 4, jr.key(0))
    np.testing.assert_array_equal(tau.action, plain.action)
    noise = np.asarray([jr.normal(k, (3, 2)) for k in jr.split(jr.key(1), 4)])
    walked = np.cumsum(np.asarray(tau.action) + noise, axis=0)
    np.testing.assert_allclose(tau.next_obs, walked, rtol=1e-5)
    again = open_loop(model, s, jnp.moveaxis(tau.action, 0, 1), jr.key(1))
    np.testing.assert_allclose(again, walked, rtol=1e-5)


def test_first_successors_begin_with_the_imagined_one():
    algo = mac(**OPTIONS["gaussian"])
    nets, s, a = fresh(algo).nets, jnp.ones((1, 5, 2)), jnp.ones((1, 5, 4))
    tau = Trajectory(s, a, 7 * s)
    states = algo.first_successors(nets, tau, jr.key(0))
    assert states.shape == (3, 5, 2)
    np.testing.assert_array_equal(states[0], 7 * s[0])
    assert np.ptp(np.asarray(states[1:]), axis=0).min() > 1e-3
    one = dataclasses.replace(algo, cfg=Config(chunk=2, dynamics="gaussian"))
    assert one.first_successors(nets, tau, None).shape == (5, 2)


def test_imagined_states_stay_within_their_bound():
    s, a = jr.normal(jr.key(1), (50, 2)), jnp.zeros((50, 4))
    found = {}
    for bound in (0.0, 0.5):
        algo = mac(dynamics="gaussian", state_bound=bound)
        found[bound] = algo.dynamics.sampler(algo.cfg, fresh(algo).nets.model)(s, a, jr.key(2))
    free = np.asarray(found[0.0])
    assert 0.2 < np.mean(np.abs(free) > 0.5) < 0.95
    np.testing.assert_array_equal(found[0.5], np.clip(free, -0.5, 0.5))
    tau = Trajectory(s[None], a[None], found[0.5][None])
    cfg = dataclasses.replace(algo.cfg, dynamics_samples=4)
    several = dataclasses.replace(algo, cfg=cfg).first_successors(fresh(algo).nets, tau, jr.key(3))
    assert several.shape == (4, 50, 2) and float(jnp.abs(several).max()) == 0.5


def test_unit_of_changes_can_be_swept():
    cfg, key = Config(chunk=1, hidden=(4,), dynamics="flow", dynamics_scale=0.5), jr.key(0)
    model = make_dynamics(cfg, Numerics())
    net, (s, a, after) = model.net(cfg, 2, 2, key), jr.normal(key, (3, 6, 2))
    swept: Any = dataclasses.replace(cfg, dynamics_scale=1.0).with_hparams(
        {"dynamics_scale": jnp.asarray(0.5)}
    )
    assert model.loss(swept, net, s, a, after, key) == model.loss(cfg, net, s, a, after, key)
    np.testing.assert_array_equal(
        model.successor(swept, net, s, a, key), model.successor(cfg, net, s, a, key)
    )
    assert "dynamics_scale" in Config.sweepable()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"dynamics_steps": 5}, "--hp.dynamics-steps=5: --hp.dynamics=deterministic has no flow"),
        ({"dynamics": "gaussian", "dynamics_scale": 0.5}, "--hp.dynamics=gaussian has no flow"),
        ({"dynamics_samples": 2}, "--hp.dynamics-samples=2: a deterministic model has one successor"),
        ({"dynamics": "flow", "dynamics_samples": 0}, "--hp.dynamics-samples=0: must be at least 1"),
        ({"state_bound": -1.0}, "--hp.state-bound=-1.0: must be at least 0"),
        ({"dynamics": "flow", "dynamics_scale": 0.0}, "--hp.dynamics-scale=0.0: must be positive"),
    ],
)
def test_option_without_effect_is_an_error(values: dict[str, Any], said: str):
    with pytest.raises(UserError) as caught:
        Config(**values)
    assert said in str(caught.value)


# Two exits: a third of all chunks end at (1, 0), the others at (0, 1).

EXITS, SHARE = np.asarray([[1.0, 0.0], [0.0, 1.0]]), 1 / 3


def after_training(kind: str, updates: int = 1200) -> np.ndarray:
    """Draws of a model that was trained on states of which nothing but the exits' shares can be known."""
    options: dict[str, Any] = OPTIONS[kind] | {"dynamics_samples": 1} if kind in OPTIONS else {}
    options |= {"dynamics_steps": 10} if kind == "flow" else {}
    cfg = Config(chunk=1, hidden=(32, 32), **options)
    model, optimiser = make_dynamics(cfg, Numerics()), optax.adam(3e-3)
    net = model.net(cfg, 2, 2, jr.key(0))
    s, a = jnp.zeros((256, 2)), jnp.zeros((256, 2))

    def one(carry: Any, key: jax.Array) -> tuple[Any, None]:
        net, opt_state = carry
        k_data, k_loss = jr.split(key)
        first = jr.bernoulli(k_data, SHARE, (256, 1))
        after = jnp.where(first, *(jnp.broadcast_to(jnp.float32(exit), s.shape) for exit in EXITS))
        grads = jax.grad(lambda net: model.loss(cfg, net, s, a, after, k_loss))(net)
        with jax.numpy_dtype_promotion("standard"):
            moves, opt_state = optimiser.update(grads, opt_state)
        return (optax.apply_updates(net, moves), opt_state), None

    @jax.jit
    def train(net: Any) -> jax.Array:
        (net, _), _ = jax.lax.scan(one, (net, optimiser.init(net)), jr.split(jr.key(1), updates))
        wide = jnp.zeros((2000, 2))
        return model.successor(cfg, net, wide, wide, jr.key(2))

    return np.asarray(train(net))


def test_deterministic_model_predicts_between_the_exits():
    got = after_training("deterministic", 400)
    np.testing.assert_allclose(got, np.broadcast_to([SHARE, 1 - SHARE], got.shape), atol=0.05)


def test_gaussian_model_has_mean_and_spread_of_the_exits():
    got = after_training("gaussian")
    np.testing.assert_allclose(got.mean(axis=0), [SHARE, 1 - SHARE], atol=0.06)
    np.testing.assert_allclose(got.std(axis=0), (SHARE * (1 - SHARE)) ** 0.5, rtol=0.1)


def test_flow_model_ends_at_the_exits_with_their_shares():
    """15 of 100 draws are left to the space between: ten Euler steps do not separate all paths."""
    got = after_training("flow")
    away = np.linalg.norm(got[:, None] - EXITS, axis=-1)
    assert np.mean(away.min(axis=1) < 0.3) > 0.85
    assert np.mean(away.argmin(axis=1) == 0) == pytest.approx(SHARE, abs=0.05)


@pytest.mark.slow
def test_model_alone_trains_in_every_kind():
    for kind, options in OPTIONS.items():
        algo = Dynamics(Config(chunk=2, batch=16, hidden=(16,), **options), SPEC)
        state, data = jax.jit(algo.init)(jr.key(0)), window(2)
        batch = sample(data, algo.sample, jr.key(1))
        losses = []
        for i in range(30):
            state, metrics = jax.jit(algo.update)(state, batch, jnp.asarray(i), jr.key(2))
            losses.append(float(metrics["model/dynamics_loss"]))
        assert losses[-1] < losses[0], kind
