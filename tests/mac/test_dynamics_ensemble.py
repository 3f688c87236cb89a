"""Ensembles of Gaussian dynamics: densities by hand and against NumPy, members, and samples."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mac.nn.dynamics_ensemble import DynamicsEnsemble, Gaussians, LogStd
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.numpy_model_based import densities
from tests.helpers.platforms import mesh_of

E, OBS, ACTION = 3, 4, 2


def ensemble(obs: int = OBS, *, seed: int = 0, **options: Any) -> DynamicsEnsemble:
    return DynamicsEnsemble(obs, ACTION, (8,), E, key=jr.key(seed), **options)


def flat(ensemble: DynamicsEnsemble) -> DynamicsEnsemble:
    """An ensemble that predicts no change, and 0 for the unbounded number of each spread."""

    def last(e: DynamicsEnsemble) -> list[Any]:
        return [e.members.dense[-1].weight, e.members.dense[-1].bias]

    return eqx.tree_at(last, ensemble, replace_fn=jnp.zeros_like)


def steps(rows: int = 5, obs: int = OBS, width: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """States, actions, and next states (with the reward, if `width` is larger)."""
    rng = np.random.default_rng(0)
    shapes = (rows, obs), (rows, ACTION), (rows, width or obs)
    s, a, after = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    return s, a, after


# By hand.


def test_middle_of_the_bounds_is_a_log_std_of_minus_2():
    s, a, _ = steps()
    guess = flat(ensemble())(s, a)
    np.testing.assert_allclose(guess.log_std, -2.0, rtol=1e-6)
    np.testing.assert_array_equal(guess.mean, np.broadcast_to(s, (E, 5, OBS)))
    # The root of 4 squares of exp(-2).
    np.testing.assert_allclose(guess.spread(), 0.2706706, rtol=1e-6)


@pytest.mark.parametrize(("error", "want"), [(0.0, -3.2431844), (0.1, -2.4242121)])
def test_loss_of_three_entries_is_the_one_worked_out_by_hand(error: float, want: float):
    # Each entry: error² exp(4) / 2 - 2 + log(2 pi) / 2.
    s, a, _ = steps(obs=3)
    assert float(flat(ensemble(3)).loss(s, a, s + error)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_weighted_loss_and_gradient_are_those_of_numpy(beta: float):
    """Of the mean: (mean - x) σ^(2 beta - 2), so that with 1 it is that of a squared error."""
    rng = np.random.default_rng(0)
    mean, log_std = rng.normal(size=(2, E, 5, OBS)).astype(np.float32)
    x = rng.normal(size=(5, OBS)).astype(np.float32)

    def loss(mean: jax.Array, log_std: jax.Array) -> jax.Array:
        return -jnp.sum(Gaussians(mean, log_std).log_prob(jnp.asarray(x), beta))

    got, (by_mean, by_std) = jax.value_and_grad(loss, argnums=(0, 1))(jnp.asarray(mean), jnp.asarray(log_std))
    m, w = mean.astype(np.float64), log_std.astype(np.float64)
    variance = np.exp(2 * w)
    entry = 0.5 * (x - m) ** 2 / variance + w + 0.5 * np.log(2 * np.pi)
    assert float(got) == pytest.approx((variance**beta * entry).sum(), rel=1e-5)
    np.testing.assert_allclose(by_mean, variance ** (beta - 1) * (m - x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(by_std, variance**beta * (1 - (x - m) ** 2 / variance), rtol=1e-4, atol=1e-5)


def test_spread_is_that_of_the_most_uncertain_member():
    log_std = jnp.log(jnp.asarray([[[3.0, 4.0]], [[5.0, 12.0]], [[1.0, 1.0]]]))
    np.testing.assert_allclose(Gaussians(jnp.zeros((3, 1, 2)), log_std).spread(), [13.0], rtol=1e-5)


# Against NumPy.


@pytest.mark.parametrize("log_std", ["bounded", "learned"])
@pytest.mark.parametrize("reward", [False, True])
def test_densities_are_those_of_numpy(log_std: LogStd, reward: bool):
    model = perturb(ensemble(log_std=log_std, reward=reward), 1)
    s, a, after = steps(width=OBS + reward)
    got, want = model(s, a), densities(double(model), np.float64(s), np.float64(a))
    assert got.mean.shape == (E, 5, OBS + reward)
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.log_std, want.log_std, rtol=1e-4, atol=1e-5)
    z = (np.float64(after) - want.mean) / np.exp(want.log_std)
    prob = np.sum(-0.5 * z**2 - want.log_std - 0.5 * np.log(2 * np.pi), axis=-1)
    np.testing.assert_allclose(got.log_prob(after), prob, rtol=1e-4)


def test_learned_bounds_hold_and_are_drawn_together():
    s, a, after = steps()
    model = ensemble(log_std="learned")
    wild = eqx.tree_at(lambda m: m.members.dense[-1].bias, model, replace_fn=lambda b: b.at[0].add(1e3))
    wild = eqx.tree_at(lambda m: m.members.dense[-1].bias, wild, replace_fn=lambda b: b.at[1].add(-1e3))
    log_var = 2 * wild(s, a).log_std
    np.testing.assert_allclose(log_var[0, :, :OBS], 2 * model(s, a).log_std[0, :, :OBS], atol=30)
    assert float(log_var.max()) <= 0.5 + 1e-3 and float(log_var.min()) >= -10 - 1e-3
    bounds = jax.grad(lambda m: m.loss(s, a, after))(flat(model)).bounds
    free = jax.grad(lambda m: -jnp.mean(m(s, a).log_prob(after)))(flat(model)).bounds
    np.testing.assert_allclose(bounds[0] - free[0], -0.01, atol=1e-6)
    np.testing.assert_allclose(bounds[1] - free[1], 0.01, atol=1e-6)


def test_bounded_ensemble_has_no_bounds_to_train():
    assert ensemble().bounds is None


# Members.


def test_members_start_differently():
    weights = np.asarray(ensemble().members.dense[0].weight)
    assert all(not np.array_equal(weights[i], weights[j]) for i in range(E) for j in range(i))


def test_a_members_gradient_is_that_of_the_member_alone():
    model, (s, a, after) = perturb(ensemble(), 1), steps()
    for e in range(E):
        own = jax.grad(lambda m, e=e: -jnp.mean(m(s, a).log_prob(after)[e]))(model)
        member = jax.tree.map(lambda x, e=e: x[e : e + 1], model.members)
        alone = eqx.tree_at(lambda m: m.members, model, member)
        want = jax.grad(lambda m: m.loss(s, a, after))(alone)
        for got, x in zip(jax.tree.leaves(own.members), jax.tree.leaves(want.members), strict=True):
            np.testing.assert_allclose(got[e], x[0], rtol=1e-5, atol=1e-7)
            assert not np.delete(np.asarray(got), e, axis=0).any() and np.any(x)


def test_loss_is_the_mean_over_members():
    model, (s, a, after) = perturb(ensemble(), 1), steps()
    each = -np.mean(model(s, a).log_prob(after), axis=1)
    assert len(set(each.tolist())) == E
    assert float(model.loss(s, a, after)) == pytest.approx(float(each.mean()), rel=1e-5)


def test_both_platforms_have_equal_densities_and_gradients():
    model, (s, a, after) = perturb(ensemble(log_std="learned"), 1), steps()

    def measure() -> Any:
        return model(s, a), jax.grad(lambda m: m.loss(s, a, after))(model)

    here = measure()
    with use_abstract_mesh(mesh_of("gpu")):
        loops = [eqn.primitive.name for eqn in jax.make_jaxpr(lambda: model(s, a))().eqns]
        there = measure()
    assert "scan" not in loops and "while" not in loops
    chex.assert_trees_all_close(here, there, rtol=1e-4, atol=1e-5)


def test_states_may_have_any_leading_axes():
    model, (s, a, _) = ensemble(), steps(6)
    flat_guess, guess = model(s, a), model(s.reshape(2, 3, OBS), a.reshape(2, 3, ACTION))
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.reshape(E, 6, OBS), guess), flat_guess, rtol=1e-5, atol=1e-6
    )


# Samples.


def distant(rows: int, width: int = 2) -> Gaussians:
    """Members whose means are 0, 1, 2, ... in every entry, and hardly any spread."""
    mean = jnp.broadcast_to(jnp.arange(5.0)[:, None, None], (5, rows, width))
    return Gaussians(mean, jnp.full(mean.shape, -12.0))


def members_of(rows: int, keys: int) -> np.ndarray:
    """The member that each row is sampled from, for several keys: members add 100 times their number."""
    model = ensemble()
    numbers = 100 * jnp.arange(float(E))
    shifted = eqx.tree_at(
        lambda m: m.members.dense[-1].bias,
        model,
        replace_fn=lambda b: b.at[:, :OBS].add(jnp.broadcast_to(numbers[:, None], (E, OBS))),
    )
    s, a, _ = steps(rows)
    x = jax.vmap(lambda key: shifted.sample(s, a, key))(jr.split(jr.key(0), keys))
    member = np.rint(np.asarray(x)[..., :OBS] / 100)
    np.testing.assert_array_equal(member, np.broadcast_to(member[..., :1], member.shape))
    return member[..., 0].astype(int)


@pytest.mark.parametrize("rows", [7, 2 * E])
def test_rows_are_dealt_out_to_members_in_equal_shares_at_random(rows: int):
    keys = 6000
    member = members_of(rows, keys)
    share = -(-rows // E)
    for e in range(E):
        assert np.max(np.sum(member == e, axis=1)) <= share
        often = np.mean(member == e, axis=0)  # of each row
        np.testing.assert_allclose(often, 1 / E, atol=5 * np.sqrt(0.25 / keys))


def test_a_row_is_sampled_from_its_members_density():
    """Noise apart, each row is what the member it was dealt to predicts for it."""
    model, (s, a, _) = ensemble(), steps(7)
    k_deal, k_noise = jr.split(jr.key(3))
    order = np.asarray(jr.permutation(k_deal, E * -(-7 // E))).tolist()
    every, noise = model(s, a), np.asarray(jr.normal(k_noise, every_shape := (7, model(s, a).mean.shape[-1])))
    got = model.sample(s, a, jr.key(3))
    assert got.shape == every_shape
    for row in range(7):
        e = order.index(row) // -(-7 // E)
        want = every.mean[e, row] + np.exp(every.log_std[e, row]) * noise[row]
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-5)


def test_by_entry_mixes_members_within_a_row():
    rows = 20_000
    member = np.rint(np.asarray(distant(rows).sample_by_entry(jr.key(0)))).astype(int)
    pairs = np.bincount(5 * member[:, 0] + member[:, 1], minlength=25) / rows
    np.testing.assert_allclose(pairs, 0.04, atol=4 * np.sqrt(0.04 / rows))


def test_samples_spread_as_their_member_says():
    rows = 20_000
    log_std = jnp.log(jnp.asarray([0.5, 2.0]))
    guess = Gaussians(jnp.zeros((1, rows, 2)) + 3.0, jnp.broadcast_to(log_std, (1, rows, 2)))
    x = np.asarray(guess.sample_by_entry(jr.key(0)))
    np.testing.assert_allclose(x.mean(axis=0), 3.0, atol=0.06)
    np.testing.assert_allclose(x.std(axis=0), [0.5, 2.0], rtol=0.03)
    assert abs(np.corrcoef(x.T)[0, 1]) < 0.03
