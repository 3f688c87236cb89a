"""The dynamics model alone, and models that run open loop in a world whose answers are known."""

import dataclasses
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments.model_error_study.open_loop import network_of, open_loop_errors, over_episodes, over_seeds
from mac.ablations.dynamics_only import Dynamics
from mac.config import Config
from mac.data.chunk_sequences import Sequences, sample_sequences
from mac.data.sampler import ACTION_LIMIT, sample
from mac.errors import UserError
from mac.nn.mlp import MLP
from mac.ops.rollout import open_loop, residual_model, squared_error
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.types import Window
from tests.helpers.toy_env import SPEC, STRIDE, mac, window

draw = jax.jit(sample_sequences, static_argnums=(1, 2, 3))


def algorithm(chunk: int, hidden: tuple[int, ...] = (8,), lr: float = 1e-3) -> Dynamics:
    return Dynamics(Config(chunk=chunk, batch=64, hidden=hidden, lr=lr), SPEC)


def gentle(chunk: int = 1) -> Window:
    """The point's world, in which s' = s + STRIDE * sum(a) exactly: no action is clipped."""
    plain = window(chunk, length=121, episodes=4)
    small = jnp.clip(plain.action.stored, -ACTION_LIMIT, ACTION_LIMIT)
    # Walked anew with those actions, so that it holds at the walls too.
    steps = STRIDE * small.reshape(4, 121, 2)
    obs = jnp.cumsum(jnp.concatenate([jnp.zeros((4, 1, 2)), steps[:, :-1]], 1), axis=1).reshape(-1, 2)
    column = dataclasses.replace(plain.action, stored=small)
    return dataclasses.replace(plain, obs=dataclasses.replace(plain.obs, stored=obs), action=column)


def exact(chunk: int, bias: tuple[float, float] = (0.0, 0.0)) -> MLP:
    """The network that knows this world, but for `bias` in every prediction."""
    net = MLP((2, 2 * chunk), (), 2, key=jr.key(0))
    weight = jnp.concatenate([jnp.zeros((2, 2)), *[STRIDE * jnp.eye(2)] * chunk])
    return eqx.tree_at(lambda n: (n.dense[0].weight, n.dense[0].bias), net, (weight, jnp.asarray(bias)))


# Running open loop.


@pytest.mark.parametrize("chunk", [1, 5, 10, 25])
def test_exact_model_has_no_error_at_any_horizon(chunk: int):
    """10 chunks of 10 steps, 100 of 1, ...: all end where the data does."""
    error = squared_error(residual_model(exact(chunk)), *draw(gentle(), chunk, 100 // chunk, 32, jr.key(0)))
    assert error.shape == (100 // chunk, 32)
    np.testing.assert_allclose(error, 0, atol=1e-9)


@pytest.mark.parametrize("chunk", [1, 5, 10, 25])
def test_constant_bias_grows_with_the_square_of_predictions(chunk: int):
    """After k predictions each entry is off by k times its bias: k² (0.03² + 0.01²) / 2 on average."""
    error = squared_error(
        residual_model(exact(chunk, (0.03, -0.01))), *draw(gentle(), chunk, 100 // chunk, 8, jr.key(1))
    )
    k = np.arange(1, 100 // chunk + 1)
    np.testing.assert_allclose(error, np.repeat(k[:, None] ** 2 * 0.0005, 8, 1), rtol=2e-3)


def test_open_loop_predicts_from_the_previous_prediction():
    obs, actions = jnp.asarray([[1.0]]), jnp.asarray([[[1.0], [2.0], [3.0]]])
    states = open_loop(lambda s, a: 2 * s + a, obs, actions)
    np.testing.assert_array_equal(states[:, 0, 0], [3.0, 8.0, 19.0])


def test_trajectories_in_a_wrong_order_show_as_error():
    real = draw(gentle(), 2, 5, 16, jr.key(0))
    mixed = Sequences(real.obs, jnp.roll(real.actions, 1, axis=0))
    assert squared_error(residual_model(exact(2)), *real).max() < 1e-9
    assert squared_error(residual_model(exact(2)), *mixed).mean() > 1e-2


def test_all_chunk_lengths_are_measured_on_the_same_data():
    nets = jax.tree.map(lambda *x: jnp.stack(x), exact(2), exact(2, (0.0, 0.1)))
    data = gentle()
    errors = open_loop_errors(nets, data, 2, 20, 40, seed=3)
    assert errors.horizons == list(range(2, 21, 2))
    assert errors.model.shape == (2, 10, 40) and errors.still.shape == (10, 40)
    np.testing.assert_allclose(errors.model[0], 0, atol=1e-9)
    np.testing.assert_allclose(errors.model[1, 9], 0.5 * 1.0**2, rtol=1e-3)
    single = jax.tree.map(lambda x: x[None], exact(1))
    fine = open_loop_errors(single, data, 1, 20, 40, seed=3)
    np.testing.assert_array_equal(fine.still[1::2], errors.still)
    np.testing.assert_array_equal(fine.episode, errors.episode)
    assert set(errors.episode) == {0, 1, 2, 3}


def test_error_of_a_frozen_model_is_how_far_states_move():
    real = draw(gentle(), 5, 4, 16, jr.key(0))
    errors = open_loop_errors(jax.tree.map(lambda x: x[None], exact(5)), gentle(), 5, 20, 16, seed=0)
    moved = np.asarray(real.obs)[:, 1:] - np.asarray(real.obs)[:, :1]
    np.testing.assert_allclose(errors.still, np.mean(moved**2, axis=-1).T, rtol=1e-5)


# Intervals.


def test_interval_over_seeds_has_the_width_of_their_spread():
    rng = np.random.default_rng(0)
    one = rng.uniform(size=100)
    same = over_seeds(np.stack([one] * 4))
    np.testing.assert_allclose(same, [one.mean()] * 3)
    value, low, high = over_seeds(np.stack([one * k for k in (1, 2, 3)]))
    np.testing.assert_allclose([value, low, high], one.mean() * np.asarray([2, 1, 3]), rtol=1e-6)
    assert math.isnan(over_seeds(one[None]).low)


def test_interval_does_not_narrow_with_more_trajectories():
    rng = np.random.default_rng(0)
    each = rng.normal(1.0, 0.2, size=200)
    once = over_episodes(each[None], np.arange(200))
    often = over_episodes(np.repeat(each, 30)[None], np.repeat(np.arange(200), 30))
    np.testing.assert_allclose(often, once)
    # 1.96 standard errors to each side, with 2000 draws of 200 good to 10%.
    np.testing.assert_allclose(once.high - once.low, 2 * 1.96 * each.std() / 200**0.5, rtol=0.1)
    assert math.isnan(over_episodes(each[None], np.zeros(200, int)).low)


def test_model_that_explodes_has_an_error_without_an_interval():
    error, episode = np.asarray([[1.0, np.inf]], np.float32), np.asarray([0, 1])
    for interval in (over_seeds(np.repeat(error, 2, 0)), over_episodes(error, episode)):
        assert interval.value == math.inf and math.isnan(interval.low) and math.isnan(interval.high)


# The algorithm.


def test_loss_is_the_mean_squared_error_of_the_predicted_state():
    algo, data = algorithm(3), window(chunk=3)
    batch = sample(data, algo.sample, jr.key(0))
    net = algo.nets(jr.key(1))
    loss, metrics = algo.loss(net, (), batch, jr.key(2))
    flat = jnp.stack([jnp.concatenate(list(chunk)) for chunk in batch.actions])
    predicted = np.asarray(batch.obs) + np.asarray(net(batch.obs, flat))
    np.testing.assert_allclose(loss, np.mean((predicted - np.asarray(batch.next_obs)) ** 2), rtol=1e-5)
    assert metrics == {"model/dynamics_loss": loss}


def test_training_loop_finds_the_linear_world():
    """A network without hidden layers can be exact, and from two seeds becomes so."""
    algo = Dynamics(Config(chunk=5, batch=64, lr=3e-2, cooldown=0.7), SPEC, 600)
    algo = eqx.tree_at(lambda a: a.cfg.hidden, algo, ())
    data, mesh = gentle(5), seed_mesh(2)
    keys = place(mesh, seed_keys(0, 2), SEED)
    state = init(algo, mesh, keys)
    steps = place(mesh, np.arange(600, dtype=np.int32), ALL)
    state, metrics = segment(algo, mesh, place(mesh, data, ALL), keys, steps, state)
    assert metrics["model/dynamics_loss"].shape == (600, 2)
    nets = jax.device_put(state.nets, jax.local_devices()[0])
    errors = open_loop_errors(nets, data, 5, 50, 32, seed=0)
    assert errors.model[:, -1].mean() < 1e-3 * errors.still[-1].mean()


def test_model_alone_has_no_policy_and_no_slow_copy():
    algo = algorithm(2)
    state = algo.init(jr.key(0))
    assert jax.tree.leaves(state.target) == []
    with pytest.raises(TypeError, match="no policy"):
        algo.act(state, jnp.zeros((1, 2)), None, jr.key(0))


def test_model_of_mac_is_the_kind_that_is_measured():
    net = network_of(mac().nets(jr.key(0)), "MAC")
    assert net.in_sizes == algorithm(2).nets(jr.key(0)).in_sizes
    with pytest.raises(UserError, match="no dynamics model"):
        network_of(algorithm(2).nets(jr.key(0)), "other")
