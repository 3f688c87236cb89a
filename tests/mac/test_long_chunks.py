"""Options for long chunks: the search in the policy's noise, and the short critic."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac import mac_diagnostics
from mac.algorithm import TrainState
from mac.errors import UserError
from mac.mac import MAC
from mac.ops.best_of_n import best_of_n
from mac.ops.losses import expectile_value_loss
from mac.ops.noise_search import noise_search, shell_deviation
from tests.helpers.mac_cases import Case, draw_batch, leaves, make_case, own_losses, touched
from tests.helpers.numpy_mac import choose, double, fresh, perturb, rounds_of_noise, run
from tests.helpers.toy_env import goal_mac, mac, window

# The search.


def far_from(optimum: np.ndarray) -> Any:
    """A judge that returns noises as they are; the score's only maximum is `optimum`."""
    at = jnp.asarray(optimum, jnp.float32)[None, None]
    return lambda noise: (noise, -jnp.sum(jnp.square(noise - at), axis=-1))


def found(rounds: int, optimum: np.ndarray, n: int = 256) -> np.ndarray:
    """Distances of the best candidates from the optimum, of 32 searches."""
    size = (n, 32, len(optimum))
    search = jax.jit(lambda key: noise_search(far_from(optimum), size, key, rounds=rounds, elites=6))
    return np.linalg.norm(np.asarray(best_of_n(*search(jr.key(0)))) - optimum, axis=-1)


def test_one_round_is_plain_sampling():
    judge, size = far_from(np.ones(3)), (8, 5, 3)
    noise, score = noise_search(judge, size, jr.key(4), rounds=1, elites=2)
    np.testing.assert_array_equal(noise, jr.normal(jr.key(4), size))
    np.testing.assert_array_equal(score, judge(noise)[1])


def test_search_finds_a_known_optimum():
    """At 256 evaluations each, in 8 entries, at an optimum as long as noises are."""
    optimum = np.asarray([1.6, -1, 0.5, -0.5, 1, 0, -1.2, 1.2])
    optimum *= np.sqrt(8 / np.sum(optimum**2))
    searched, plain = found(8, optimum), found(1, optimum)
    assert searched.max() < plain.min() and searched.mean() < 0.4 * plain.mean()


def test_noises_keep_their_expected_length():
    mean = jnp.asarray(np.random.default_rng(0).normal(scale=0.6, size=(4, 50)), jnp.float32)
    s = shell_deviation(mean)
    z = jr.normal(jr.key(0), (20_000, 4, 50))
    noises = np.asarray(mean) + np.asarray(s) * np.asarray(z)
    length = np.mean(np.sum(noises**2, axis=-1), axis=0)
    np.testing.assert_allclose(length, 50, rtol=0.01)
    np.testing.assert_array_equal(shell_deviation(jnp.full((1, 4), 2.0)), [[0.0]])  # longer than any


@pytest.mark.parametrize("rounds", [2, 3])
def test_searched_chunk_is_that_of_numpy(rounds: int):
    algo = mac(candidates_test=6, search_rounds_test=rounds, search_elites=0.7)
    nets = perturb(fresh(mac()).nets, seed=1)
    s = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    draws = rounds_of_noise(jr.key(1), (6, 9, 4), rounds)
    got = jax.jit(algo.act)(TrainState(nets, nets.v, ()), jnp.asarray(s), None, jr.key(1))
    elites = {2: 2, 3: 1}[rounds]
    wide, z = double(nets), np.asarray(draws, np.float64)
    want = choose(wide, s.astype(np.float64), z, rounds=rounds, elites=elites)
    np.testing.assert_allclose(got[:, 0], want[:, :2], rtol=1e-4, atol=1e-4)
    assert not np.allclose(want, choose(wide, s.astype(np.float64), z))  # later rounds matter


# Losses.

CHANGES: dict[str, dict[str, Any]] = {
    "reward": {"critic_chunk": 1, "critic_expectile": 0.8, "search_rounds": 2},
    "whole chunk": {"critic_chunk": 2, "search_rounds": 4, "search_elites": 1.0},
    "bce": {"critic_chunk": 1, "value": "bce"},
}


@pytest.fixture(scope="module", params=CHANGES)
def case(request: pytest.FixtureRequest) -> Case:
    make = goal_mac if request.param == "bce" else mac
    return make_case(make(**CHANGES[request.param]))


def test_losses_are_those_of_numpy(case: Case):
    total, metrics = case.loss()
    got = {net: float(metrics[metric]) for net, metric in own_losses(case.algo).items()}
    assert "q_short" in got
    assert got == pytest.approx(case.by_hand(double(case.nets)), rel=2e-4)
    assert float(total) == pytest.approx(sum(got.values()), rel=1e-6)


def test_gradient_is_the_slope_of_numpys_loss(case: Case):
    gradients = case.gradients()
    for net in ("q_short", "q", "policy"):
        for got, want in case.slopes_along_random_directions(gradients, net):
            assert got == pytest.approx(want, rel=2e-3, abs=2e-4), net
    assert touched(gradients) == {loss: {loss} for loss in own_losses(case.algo)}


@pytest.mark.parametrize(("kind", "tolerance"), [("squared", 1e-3), ("bce", 1e-3)])
def test_short_critic_learns_the_expectile_of_values(kind: Any, tolerance: float):
    """Of targets 0.2 and 0.8 in equal parts: (1 - e) (v - 0.2) = e (0.8 - v)."""
    targets, e = jnp.asarray([0.2, 0.8]), 0.9
    slope = jax.jit(jax.grad(lambda x: expectile_value_loss(jnp.full(2, x), targets, kind, e)))
    x = 0.0
    for _ in range(4000):
        x -= 0.2 * float(slope(x))
    value = x if kind == "squared" else 1 / (1 + np.exp(-x))
    assert value == pytest.approx((1 - e) * 0.2 + e * 0.8, abs=tolerance)


def test_short_critic_leaves_other_networks_as_they_are():
    """Its own weights and random numbers are apart, so the rest trains as without it."""
    plain, short = mac(), mac(critic_chunk=1)
    states = [fresh(plain), fresh(short)]
    for step in range(3):
        batch = draw_batch(plain, jr.key(step))
        states = [
            jax.jit(a.update)(x, batch, jnp.asarray(step), jr.key(step))[0]
            for a, x in zip((plain, short), states, strict=True)
        ]
    for name in ("model", "reward", "flow", "policy", "v", "q"):
        pairs = (leaves(getattr(x.nets, name)) for x in states)
        for x, y in zip(*pairs, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6)
    assert states[0].nets.q_short is None and states[1].nets.q_short is not None


# Acting.


def short(**changes: Any) -> MAC:
    return mac(chunk=3, critic_chunk=2, execute=2, candidates_test=8, **changes)


@pytest.mark.parametrize("long", [False, True])
def test_short_critic_chooses_while_acting(long: bool):
    algo, nets = short(long_critic_test=long), perturb(fresh(short()).nets, seed=1)
    s = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    z = np.asarray(jr.normal(jr.key(1), (8, 9, 6)), np.float64)
    state, wide = TrainState(nets, nets.v, ()), double(nets)
    got = jax.jit(algo.act)(state, jnp.asarray(s), None, jr.key(1))
    critic = (wide.q, 6) if long else (wide.q_short, 4)
    want = choose(wide, s, z, critic=critic)
    np.testing.assert_allclose(got, want.reshape(9, 3, 2)[:, :2], rtol=1e-4, atol=1e-4)
    assert not np.allclose(want, choose(wide, s, z, critic=(wide.q_short, 4) if long else (wide.q, 6)))
    predicted = jax.jit(algo.predict)(state, jnp.asarray(s), None, jr.key(1))
    net, entries = critic
    np.testing.assert_allclose(predicted, 3 * run(net, s, want[:, :entries])[:, 0], rtol=1e-4, atol=1e-4)


def test_training_chooses_by_the_long_critic():
    algo, nets = short(), perturb(fresh(short()).nets, seed=1)
    s = np.random.default_rng(0).normal(size=(9, 2)).astype(np.float32)
    got = jax.jit(MAC.best_chunk, static_argnums=(0, 5))(algo, nets, jnp.asarray(s), None, jr.key(1), 8)
    z = np.asarray(jr.normal(jr.key(1), (8, 9, 6)), np.float64)
    np.testing.assert_allclose(got, choose(double(nets), s, z), rtol=1e-4, atol=1e-4)


def test_diagnostics_compare_critics_and_searches():
    """A short critic that is Q plus 1 for the whole chunk: its gap is 1, in returns, and its regret 0."""
    algo = mac(critic_chunk=2, candidates_test=8, search_rounds_test=2)
    nets = perturb(fresh(algo).nets, seed=1)
    shifted = jax.tree.map(lambda x: x, nets.q)
    last = shifted.dense[-1]
    object.__setattr__(last, "bias", last.bias + 1.0)
    object.__setattr__(nets, "q_short", shifted)
    got = jax.jit(mac_diagnostics.compute_diagnostics, static_argnums=0)(algo, nets, window(), jr.key(1))
    assert float(got["diagnostics/short_critic_gap"]) == pytest.approx(2.0, rel=1e-3)  # 2 actions per chunk
    assert float(got["diagnostics/short_critic_regret"]) == pytest.approx(0, abs=1e-4)
    assert np.isfinite(got["diagnostics/search_gain"])


# Settings.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"critic_chunk": 3}, "--hp.critic-chunk=3: must be 0 to --hp.chunk=2"),
        ({"critic_chunk": -1}, "--hp.critic-chunk=-1: must be 0 to --hp.chunk=2"),
        ({"critic_chunk": 1, "execute": 2}, "--hp.critic-chunk=1: must be at least --hp.execute=2"),
        ({"critic_expectile": 1.0}, "--hp.critic-expectile=1.0: must be in"),
        ({"long_critic_test": True}, "--hp.long-critic-test: needs --hp.critic-chunk"),
        ({"search_rounds": 3}, "--hp.search-rounds=3: must be at least 1 and divide --hp.candidates=4"),
        ({"search_rounds": 0}, "--hp.search-rounds=0: must be at least 1"),
        ({"search_rounds_test": 8}, "--hp.search-rounds-test=8: .* divide --hp.candidates-test=4"),
        ({"search_elites": 0.0}, "--hp.search-elites=0.0: must be in"),
    ],
)
def test_bad_setting_is_named_in_one_line(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as caught:
        mac(**changes)
    assert "\n" not in str(caught.value)
