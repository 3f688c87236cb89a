"""The Gaussian policy's network against closed forms and an obvious NumPy version."""

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.nn.gaussian_policy import GaussianPolicy, TanhGaussian
from tests.helpers.numpy_ablations import gaussian
from tests.helpers.numpy_mac import double, perturb


def standard(*shape: int) -> TanhGaussian:
    return TanhGaussian(jnp.zeros(shape), jnp.zeros(shape))


def test_log_density_of_a_squashed_standard_normal():
    """log N(x; 0, 1) - log(1 - tanh(x)²): -0.9189385 at x = 0, -1.4189385 + 0.8675617 at x = 1."""
    action = jnp.tanh(jnp.asarray([[0.0], [1.0]]))
    got = standard(2, 1).log_prob(action)
    np.testing.assert_allclose(got, [-0.9189385, -0.5513769], rtol=1e-5)


def test_log_density_adds_up_over_entries():
    action = jnp.tanh(jnp.asarray([0.0, 1.0, 1.0]))
    assert float(standard(3).log_prob(action)) == pytest.approx(-0.9189385 - 2 * 0.5513769, rel=1e-5)


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (0.8, -0.5), (-0.3, 0.4)])
def test_density_has_mass_1(mean: float, log_std: float):
    """Simpson's rule over the open interval, in the variable before the tanh, where nothing is steep."""
    x = np.linspace(-6, 6, 2001, dtype=np.float32)
    law = TanhGaussian(jnp.full((len(x), 1), mean), jnp.full((len(x), 1), log_std))
    density = np.exp(np.asarray(law.log_prob(jnp.tanh(x)[:, None]), np.float64)) / np.cosh(x) ** 2
    assert np.trapezoid(density, x) == pytest.approx(1, abs=2e-3)


def test_log_density_is_exact_up_to_the_samplers_limit():
    """Actions of the data are clipped to ± (1 - 1e-5)."""
    action = np.float32([1 - 1e-5, -(1 - 1e-5), 0.999])
    x = np.arctanh(action.astype(np.float64))
    want = -0.5 * (x - 0.5) ** 2 - 0.5 * np.log(2 * np.pi) - np.log1p(-(action.astype(np.float64) ** 2))
    law = TanhGaussian(jnp.full((3, 1), 0.5), jnp.zeros((3, 1)))
    np.testing.assert_allclose(law.log_prob(jnp.asarray(action)[:, None]), want, rtol=1e-4)


def test_samples_are_the_squashed_noise():
    law = TanhGaussian(jnp.asarray([0.5, -1.0]), jnp.log(jnp.asarray([2.0, 0.1])))
    noise = np.asarray([[0.0, 0.0], [1.0, -3.0]], np.float32)
    want = np.tanh(noise * [2.0, 0.1] + [0.5, -1.0])
    np.testing.assert_allclose(law.at(jnp.asarray(noise)), want, rtol=1e-5)


def test_heads_start_at_a_hundredth_of_the_variance():
    """Uniform on ± sqrt(0.06 / (fan_in + fan_out)), so of standard deviation that over sqrt(3); biases 0."""
    policy = GaussianPolicy((7, None), (32, 300), 200, key=jr.key(0))
    bound = (0.06 / 500) ** 0.5
    for head in (policy.mean, policy.log_std):
        weight = np.asarray(head.weight)
        assert weight.shape == (300, 200)
        assert 0.999 * bound < np.abs(weight).max() <= bound
        assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.01)
        assert not np.any(head.bias)
    assert np.abs(policy.trunk.dense[-1].weight).max() > 0.99 * (6 / 332) ** 0.5


def test_policy_starts_near_the_standard_normal():
    policy = GaussianPolicy((4,), (64, 64), 6, key=jr.key(0))
    law = policy(jr.normal(jr.key(1), (100, 4)))
    assert 0 < float(jnp.std(law.mean)) < 0.25 and 0 < float(jnp.std(law.log_std)) < 0.25


@pytest.mark.parametrize("hidden", [(5,), (5, 3)])
def test_every_hidden_layer_has_activation_and_norm(hidden: tuple[int, ...]):
    policy = perturb(GaussianPolicy((3, 2), hidden, 4, key=jr.key(0)), seed=1)
    rng = np.random.default_rng(0)
    s, g = rng.normal(size=(6, 3)).astype(np.float32), rng.normal(size=(6, 2)).astype(np.float32)
    law = policy(jnp.asarray(s), jnp.asarray(g))
    for got, want in zip(law, gaussian(double(policy), s, g), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_deviations_stay_between_their_limits():
    """exp(-5) to exp(2): far out, the logarithm is cut."""
    policy = GaussianPolicy((3,), (8,), 2, key=jr.key(0))
    wild = jax.tree.map(lambda x: 1000 * x, policy)
    log_std = np.asarray(wild(jr.normal(jr.key(1), (50, 3))).log_std)
    assert (log_std.min(), log_std.max()) == (-5, 2)
