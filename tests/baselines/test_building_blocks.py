"""Building blocks of the baselines: numbers worked out by hand, and what configurations refuse."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import pytest

from baselines import REGISTRY
from baselines.iql import IQLConfig
from mac.actor_critic import n_step
from mac.errors import UserError
from mac.nn.critics import aggregate, critic_loss, twin_critics
from mac.nn.gaussian_policy import TanhGaussian, normal_log_prob
from mac.nn.mlp import MLP, Style
from mac.ops.diffusion import denoise, diffusion_loss, vp_betas
from mac.ops.losses import advantage_weight, cross_entropy, expectile_loss, scale_normalised_q, sum_losses
from mac.ops.optimisers import adam_by_network
from mac.types import Batch, Subgoals
from tests.helpers.algorithm_cases import GOALS_ONLY, make
from tests.helpers.toy_env import SPEC

# Losses.


def test_expectile_loss_weighs_errors_by_their_sign():
    got = [float(expectile_loss(jnp.asarray([d]), 0.9)) for d in (2.0, -2.0)]
    assert got == pytest.approx([3.6, 0.4], rel=1e-6)


def test_expectile_of_two_values_is_between_them():
    """The slope at v is 2 (0.9 (1 - v) - 0.1 (v - 0)) / 2, which is 0 at v = 0.9."""
    slope = jax.grad(lambda v: expectile_loss(jnp.asarray([0.0, 1.0]) - v, 0.9))
    assert float(slope(0.9)) == pytest.approx(0.0, abs=1e-6)


def test_advantage_weight_is_bounded():
    got = advantage_weight(jnp.asarray([0.5, 0.1, -1.0, 1e4]), 10.0)
    np.testing.assert_allclose(got, [100.0, np.e, np.exp(-10), 100.0], rtol=1e-5)


def test_cross_entropy_of_a_logit():
    got = [float(cross_entropy(jnp.asarray([x]), jnp.asarray([y]))) for x, y in ((0.0, 0.7), (2.0, 0.25))]
    assert got == pytest.approx([0.6931472, 1.6269280], rel=1e-6)


@pytest.mark.parametrize(("q", "want"), [((2.0, -2.0), 0.0), ((-1.0, -3.0), -1.0)])
def test_normalised_value_has_no_units(q: tuple[float, ...], want: float):
    for unit in (1.0, 100.0):
        assert float(scale_normalised_q(unit * jnp.asarray(q))) == pytest.approx(want, rel=1e-5)


def test_normalised_value_rises_along_the_value():
    slope = jax.grad(scale_normalised_q)(jnp.asarray([2.0, -4.0]))
    np.testing.assert_allclose(slope, [1 / 6, 1 / 6], rtol=1e-5)


def test_total_adds_losses_and_logs_means():
    got, metrics = sum_losses({"a/loss": jnp.asarray(1.0), "b/loss": jnp.asarray(2.0)}, a__x=jnp.arange(3.0))
    assert float(got) == 3 and {k: float(v) for k, v in metrics.items()} == {
        "a/loss": 1, "b/loss": 2, "a/x": 1,
    }  # fmt: skip


def test_critics_are_two_and_the_lesser_or_the_mean_counts():
    critics = twin_critics((2, None, 1), (4,), key=jr.key(0))
    assert len(critics) == 2
    assert not np.array_equal(critics[0].dense[0].weight, critics[1].dense[0].weight)
    q = jnp.asarray([[1.0, 4.0], [3.0, 2.0]])
    np.testing.assert_array_equal(aggregate(q, "min"), [1, 2])
    np.testing.assert_array_equal(aggregate(q, "mean"), [2, 3])
    assert float(critic_loss(q, jnp.asarray([1.0, 2.0]))) == pytest.approx((0 + 4 + 4 + 0) / 4)


# Densities.


def test_density_of_a_squashed_normal():
    """Of the standard normal, at 0 and where the normal is 1: -0.5 log 2π - 0.5 x² - log(1 - tanh² x)."""
    policy = TanhGaussian(jnp.zeros((2, 1)), jnp.zeros((2, 1)))
    action, log_prob = policy.sample(jnp.asarray([[0.0], [1.0]]))
    np.testing.assert_allclose(action[:, 0], [0.0, 0.7615942], rtol=1e-6)
    np.testing.assert_allclose(log_prob, [-0.9189385, -0.5513769], rtol=2e-6)
    np.testing.assert_allclose(policy.log_prob(action), log_prob, rtol=1e-5)


def test_density_is_finite_where_the_action_rounds_to_one():
    """At x = 30 the slope of tanh is 4 exp(-60)."""
    far = TanhGaussian(jnp.full((1, 1), 30.0), jnp.zeros((1, 1)))
    action, log_prob = far.sample(jnp.zeros((1, 1)))
    assert float(action[0, 0]) == 1.0
    assert float(log_prob[0]) == pytest.approx(-0.9189385 + 60 - np.log(4), rel=1e-5)


def test_normal_density_without_deviations_has_ones():
    x, mean = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.0, 0.0]])
    assert float(normal_log_prob(x, mean)[0]) == pytest.approx(-2.5 - np.log(2 * np.pi), rel=1e-6)
    half = normal_log_prob(x, mean, jnp.log(jnp.asarray([0.5, 2.0])))
    assert float(half[0]) == pytest.approx(-2 - 0.5 - np.log(2 * np.pi), rel=1e-6)


# Diffusion.


def test_noise_has_the_variances_of_the_preserving_process():
    want = [0.1958746, 0.4588182, 0.6357810, 0.7548782, 0.8350314]
    np.testing.assert_allclose(vp_betas(5), want, rtol=2e-6)


def test_predicting_no_noise_costs_the_noise():
    """One for each entry, on average."""
    loss = diffusion_loss(lambda x, _: 0 * x, jnp.ones((20_000, 3)), vp_betas(5), jr.key(0))
    assert float(loss) == pytest.approx(3.0, rel=0.02)


def test_true_noise_leads_back_to_the_data():
    """Data that are one point a: the noise in x is (x - sqrt(kept) a) / sqrt(1 - kept)."""
    betas, a = vp_betas(5), jnp.asarray([0.3, -0.7])
    kept = jnp.cumprod(1 - betas)

    def truth(x: jax.Array, step: jax.Array) -> jax.Array:
        share = jnp.broadcast_to(kept[step.astype(jnp.int32)], x.shape)
        return (x - jnp.sqrt(share) * jnp.broadcast_to(a, x.shape)) / jnp.sqrt(1 - share)

    data = jnp.broadcast_to(a, (64, 2))
    assert float(diffusion_loss(truth, data, betas, jr.key(1))) == pytest.approx(0.0, abs=1e-9)
    got = denoise(truth, jr.normal(jr.key(0), (64, 2)), betas, jr.key(2))
    np.testing.assert_allclose(got, data, atol=1e-5)


# Networks and rates.


def test_small_output_weights_have_a_hundredth_of_the_variance():
    net = MLP((300,), (200,), 100, key=jr.key(0), variance=0.01)
    for dense, share in zip(net.dense, (1.0, 0.01), strict=True):
        bound = (6 * share / sum(dense.weight.shape)) ** 0.5
        assert bound * 0.99 < float(jnp.max(jnp.abs(dense.weight))) <= bound
        assert float(jnp.std(dense.weight)) == pytest.approx(bound / 3**0.5, rel=0.02)


def test_layers_without_norm_are_rectified_products():
    net = MLP((2,), (3,), 1, key=jr.key(0), style=Style("relu", False))
    x = np.asarray([[1.0, -2.0]], np.float32)
    hidden = np.maximum(x @ np.asarray(net.dense[0].weight), 0)
    np.testing.assert_allclose(net(jnp.asarray(x)), hidden @ np.asarray(net.dense[1].weight), rtol=1e-5)
    assert net.norm == (None,)


class Two(eqx.Module):
    """Two networks."""

    actor: Any
    q: Any


def test_networks_learn_at_rates_of_their_own():
    """Adam's first step is the learning rate."""
    nets = Two(jnp.zeros(2), (jnp.zeros(3),))
    optimiser = adam_by_network({"actor": lambda step: 0.1 + 0.0 * step}, 0.01)
    slopes = jax.tree.map(jnp.ones_like, nets)
    with jax.numpy_dtype_promotion("standard"):
        moves, _ = optimiser.update(slopes, optimiser.init(nets), nets)  # pyright: ignore[reportArgumentType]
    after = optax.apply_updates(nets, moves)
    np.testing.assert_allclose(after.actor, -0.1, rtol=1e-5)
    np.testing.assert_allclose(after.q[0], -0.01, rtol=1e-5)


# Runs of several steps.


@pytest.mark.parametrize(("steps", "want"), [(25.0, 0.9752977), (50.0, 0.9512056)])
def test_reward_at_the_end_of_a_run_is_discounted_for_the_way(steps: float, want: float):
    one = jnp.ones((2, 1))
    ways = Subgoals(jnp.full(2, steps), one, jnp.asarray([1.0, 0.0]), one, one, one)
    run = n_step(Batch(one, jnp.ones((2, 1, 1)), one, None, None, subgoals=ways), 0.999)
    np.testing.assert_allclose(run.reached, [want, 0.0], rtol=1e-6)
    np.testing.assert_allclose(run.bootstrap_discount, [0.0, want], rtol=1e-6)


# Methods.


def constant(net: MLP, value: float) -> MLP:
    """The network whose output is `value` everywhere."""
    flat = eqx.tree_at(lambda n: n.dense[-1].weight, net, replace_fn=jnp.zeros_like)
    return eqx.tree_at(lambda n: n.dense[-1].bias, flat, replace_fn=lambda b: b + value)


def rebrac() -> tuple[Any, Any, Batch]:
    """ReBRAC, a fresh state, and a batch of which only rewards, masks and next actions matter."""
    algo: Any = make("rebrac", "reward", alpha_critic=0.01, noise=0.0, discount=0.99)
    ones = jnp.ones((3, 2))
    batch = Batch(ones, ones[:, None], ones, jnp.zeros((3, 1)), jnp.ones((3, 1)))
    batch = dataclasses.replace(batch, next_action=jnp.asarray([[0.1, 0.2]] * 3))
    return algo, algo.init(jr.key(0)), batch


def test_target_of_rebrac_pays_for_leaving_the_data():
    """Q = 1 next, 0 now, and actions (0, 0): 0.99 (1 - 0.01 (0.1² + 0.2²)) = 0.989505."""
    algo, state, batch = rebrac()
    nets = dataclasses.replace(
        state.nets, q=tuple(constant(q, 0.0) for q in state.nets.q), actor=constant(state.nets.actor, 0.0)
    )
    target = dataclasses.replace(nets, q=tuple(constant(q, 1.0) for q in nets.q))
    loss = algo.loss(nets, target, batch, jr.key(0))[1]["critic/loss"]
    assert float(loss) == pytest.approx(0.989505**2, rel=1e-6)


def test_conservative_policy_starts_with_small_deviations():
    nets: Any = make("cql", "reward").init(jr.key(0)).nets
    np.testing.assert_allclose(jnp.exp(nets.actor(jnp.zeros((1, 2)), None).log_std), 1 / np.e, rtol=1e-5)


@pytest.mark.parametrize("name", GOALS_ONLY)
def test_method_about_goals_needs_them(name: str):
    with pytest.raises(UserError, match=f"--algo={name}: toy-point has no goals"):
        make(name, "reward")


def test_falling_rate_of_the_policy_needs_the_length_of_the_run():
    entry = REGISTRY["iql"]
    with pytest.raises(UserError, match=r"--hp\.actor-decay needs the length of the run"):
        entry.algorithm(IQLConfig(actor_decay=True), SPEC)
    assert entry.algorithm(IQLConfig(actor_decay=True), SPEC, 10).steps == 10


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("iql", "expectile", 1.0),
        ("iql", "alpha", -1.0),
        ("fql", "flow_steps", 0),
        ("rebrac", "actor_every", 0),
        ("idql", "blocks", (8, 9)),
        ("idql", "dropout", 1.0),
        ("nsac_bc", "n_step", 0),
        ("cql", "samples", 0),
        ("flow_bc", "flow_steps", 0),
        ("sharsa", "candidates", 0),
    ],
)
def test_impossible_hyperparameter_is_named_in_one_line(name: str, field: str, value: Any):
    with pytest.raises(UserError, match=f"^--hp.{field.replace('_', '-')}=.*") as caught:
        REGISTRY[name].config(**{field: value})
    assert "\n" not in str(caught.value)
