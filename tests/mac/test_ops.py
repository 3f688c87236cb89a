"""The operations that MAC is made of, against closed forms."""

from math import erf, exp, pi, sqrt

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mac.ops.best_of_n import best_of_n
from mac.ops.flow import Field, euler, flow_matching_loss
from mac.ops.returns import chunk_reward, lambda_return
from mac.ops.rollout import imagine
from tests.helpers.platforms import mesh_of

GAMMA = 0.999
GAMMA_10 = GAMMA**10


# Rewards of chunks.


@pytest.mark.parametrize(("reduce", "want"), [("sum", 9.955119790251757), ("mean", 0.9955119790251757)])
def test_chunk_reward_of_ones(reduce: str, want: float):
    got = chunk_reward(jnp.ones((3, 10)), discount=GAMMA, reduce=reduce)
    np.testing.assert_allclose(got, np.full(3, want), rtol=1e-6)


@pytest.mark.parametrize(("reduce", "worst"), [("mean", -100.0), ("sum", -1000.0), (None, -100.45082541138)])
def test_worst_value_is_the_fixed_point_of_reward_minus_one(reduce: str | None, worst: float):
    """`None`: a chunk's reward is -1 itself, as in goal-conditioned data."""
    r = -jnp.ones(1) if reduce is None else chunk_reward(-jnp.ones((1, 10)), discount=GAMMA, reduce=reduce)
    fixed = lambda_return(r[None], jnp.ones((1, 1)), jnp.full((1, 1), worst), discount=GAMMA_10, lam=1.0)
    np.testing.assert_allclose(fixed, [[worst]], rtol=1e-6)


def test_chunk_reward_discounts_from_the_chunks_first_action():
    got = chunk_reward(jnp.asarray([[1.0, 10.0, 100.0]]), discount=0.5, reduce="sum")
    np.testing.assert_allclose(got, [1 + 5 + 25])


def test_unknown_chunk_reward_is_refused():
    with pytest.raises(ValueError, match="choose 'mean' or 'sum'"):
        chunk_reward(jnp.ones((1, 2)), discount=0.9, reduce="max")


# Returns.


def columns(*rows: list[float]) -> list[jax.Array]:
    return [jnp.asarray(row, jnp.float32)[:, None] for row in rows]


def test_masked_return_forgets_all_values():
    r, m, v = columns([-1, -1, 0], [1, 1, 0], [50, -3, 8])
    ret = lambda_return(r, m, v, discount=0.9, lam=1.0)
    np.testing.assert_allclose(ret[:, 0], [-1.9, -1, 0], rtol=1e-6)


@pytest.mark.parametrize(("lam", "want"), [(1.0, [3.122, 4.58, 6.2]), (0.95, [3.21668, 4.616, 6.2])])
def test_return_by_hand(lam: float, want: list[float]):
    r, m, v = columns([-1, -1, -1], [1, 1, 1], [6, 7, 8])
    ret = lambda_return(r, m, v, discount=0.9, lam=lam)
    np.testing.assert_allclose(ret[:, 0], want, rtol=1e-6)


def random_steps(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    r, v = rng.normal(size=(2, 6, 4)).astype(np.float32)
    return [r, (rng.uniform(size=(6, 4)) < 0.8).astype(np.float32), v]


def test_lambda_return_has_no_loop_on_a_gpu():
    ones = jnp.ones((4, 2))
    with use_abstract_mesh(mesh_of("gpu")):
        traced = jax.jit(lambda r: lambda_return(r, ones, ones, discount=0.9, lam=0.5)).trace(2 * ones)
        assert "stablehlo.while" not in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_is_advantages_plus_values(seed: int, lam: float):
    """Generalised advantage estimation, added to the values it was measured from."""
    r, m, v = random_steps(seed)
    value = np.concatenate([np.full_like(v[:1], 3.3), v])  # the first value cancels
    adv, want = np.zeros(4), []
    for k in reversed(range(6)):
        adv = r[k] + m[k] * 0.9 * value[k + 1] - value[k] + m[k] * 0.9 * lam * adv
        want.append(adv + value[k])
    got = lambda_return(*map(jnp.asarray, (r, m, v)), discount=0.9, lam=lam)
    np.testing.assert_allclose(got, np.stack(want[::-1]), rtol=1e-4, atol=1e-5)


def test_lambda_zero_is_one_step_and_lambda_one_is_monte_carlo():
    r, m, v = random_steps(0)
    m = np.ones_like(m)
    one = lambda_return(*map(jnp.asarray, (r, m, v)), discount=0.9, lam=0.0)
    np.testing.assert_allclose(one, r + 0.9 * v, rtol=1e-5, atol=1e-6)
    full = lambda_return(*map(jnp.asarray, (r, m, v)), discount=0.9, lam=1.0)
    want = sum(0.9**k * r[k] for k in range(6)) + 0.9**6 * v[-1]
    np.testing.assert_allclose(full[0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "bad", [{"discount": 0.0, "lam": 1.0}, {"discount": 1.1, "lam": 1.0}, {"discount": 0.9, "lam": 1.5}]
)
def test_return_refuses_factors_out_of_range(bad: dict[str, float]):
    with pytest.raises(ValueError, match=r"must be in [\(\[]0, 1\]"):
        lambda_return(*columns([0.0], [1.0], [0.0]), **bad)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_value_expansion_finds_the_values_of_a_chain(lam: float):
    """State d is d chunks from the goal; reward -1, and 0 with an end at the goal."""
    states, discount, depth = 6, 0.9, 3
    start = jnp.arange(states, dtype=jnp.float32)[:, None]
    tau = imagine(
        lambda s, k: jnp.ones_like(s), lambda s, a: jnp.maximum(s - a, 0.0), start, depth, jr.key(0)
    )
    at, after = tau.obs[..., 0], tau.next_obs[..., 0].astype(jnp.int32)
    reward, mask = jnp.where(at > 0, -1.0, 0.0), jnp.where(at > 0, 1.0, 0.0)
    backup = jax.jit(lambda v: lambda_return(reward, mask, v[after], discount=discount, lam=lam)[0])
    v = jnp.full(states, 7.0)
    for _ in range(states):
        v = backup(v)
    want = -(1 - discount ** np.arange(states)) / (1 - discount)
    np.testing.assert_allclose(v, want, rtol=1e-5, atol=1e-6)


# Imagination.


@pytest.mark.parametrize("n", [1, 4, 10])
def test_chunked_rollout_equals_single_steps_in_a_linear_world(n: int):
    """World s' = s + a, exact model of chunks, constant policy: states and return against a Python loop."""
    depth, step, start = 100 // n, np.asarray([0.01, -0.02], np.float32), np.asarray([[1.0, 2.0]], np.float32)
    tau = imagine(
        lambda s, k: jnp.tile(jnp.asarray(step), (1, n)),
        lambda s, a: s + a.reshape(1, n, 2).sum(1),
        jnp.asarray(start),
        depth,
        jr.key(0),
    )
    single = [start[0]]
    for _ in range(n * depth):
        single.append(single[-1] + step)
    single = np.stack(single)
    np.testing.assert_allclose(tau.obs[:, 0], single[: n * depth : n], atol=1e-5)
    np.testing.assert_allclose(tau.next_obs[:, 0], single[n::n], atol=1e-5)

    rewards = single[:-1].sum(-1)  # reward of a state: the sum of its entries
    chunked = chunk_reward(jnp.asarray(rewards.reshape(depth, 1, n)), discount=GAMMA, reduce="sum")
    value = jnp.full((depth, 1), 5.0)
    ret = lambda_return(chunked, jnp.ones((depth, 1)), value, discount=GAMMA**n, lam=1.0)
    want = sum(GAMMA**t * r for t, r in enumerate(rewards)) + GAMMA ** (n * depth) * 5.0
    assert float(ret[0, 0]) == pytest.approx(want, rel=1e-5)


def test_every_imagined_step_draws_from_its_own_key():
    def policy(s, k):
        return jr.normal(k, s.shape)

    tau = imagine(policy, lambda s, a: s + a, jnp.zeros((3, 2)), 5, jr.key(0))
    assert len(np.unique(np.asarray(tau.action))) == 5 * 3 * 2
    want = jax.vmap(lambda k: jr.normal(k, (3, 2)))(jr.split(jr.key(0), 5))
    np.testing.assert_allclose(tau.action, want, rtol=1e-6)
    np.testing.assert_array_equal(tau.obs[1:], tau.next_obs[:-1])


# Flows.


def test_euler_of_a_constant_field_adds_it():
    z = jr.normal(jr.key(0), (4, 3))
    np.testing.assert_allclose(euler(lambda x, t: jnp.full_like(x, 0.7), z, 10), z + 0.7, rtol=1e-6)


def test_euler_of_growth_is_compound_interest():
    # v = x: (1 + 1/10) ** 10, where the exact flow would give e.
    np.testing.assert_allclose(euler(lambda x, t: x, jnp.ones((1, 1)), 10), [[2.5937424601]], rtol=1e-6)


def test_euler_reads_the_field_at_the_left_end_of_each_step():
    # v = t: (0 + 0.1 + ... + 0.9) / 10; at right ends it would be 0.55, at midpoints 0.5.
    got = euler(lambda x, t: jnp.broadcast_to(t, x.shape), jnp.zeros((2, 3)), 10)
    np.testing.assert_allclose(got, np.full((2, 3), 0.45), rtol=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 10])
def test_straight_flow_to_a_point_arrives_in_any_number_of_steps(steps: int):
    data = jnp.asarray([[0.3, -0.9]])
    z = jr.normal(jr.key(1), (5, 2))

    def field(x, t):
        return (jnp.broadcast_to(data, x.shape) - x) / (1 - t)

    np.testing.assert_allclose(euler(field, z, steps), np.broadcast_to(data, (5, 2)), rtol=1e-5, atol=1e-6)


def test_euler_converges_at_first_order():
    def error(steps: int) -> float:
        return abs(float(euler(lambda x, t: x, jnp.ones((1, 1)), steps)[0, 0]) - exp(1))

    assert error(20) / error(40) == pytest.approx(2.0, rel=0.03)


def flow_loss(field: Field, data: jax.Array) -> float:
    return float(jax.jit(lambda x, k: flow_matching_loss(field, x, k))(data, jr.key(0)))


def test_flow_loss_of_no_velocity_is_one_plus_mean_square():
    data = jnp.broadcast_to(jnp.asarray([[1.0, -2.0]]), (20_000, 2))
    loss = flow_loss(lambda x, t: jnp.zeros_like(x), data)
    # |a - z|² has mean 1 + a² and variance 2 + 4 a²; the error of the mean over 40,000 is below 0.025.
    assert loss == pytest.approx(1 + (1 + 4) / 2, abs=4 * 0.025)


def test_flow_loss_of_the_true_field_of_a_point_is_zero():
    point = jnp.asarray([[0.5, -0.25]])
    data = jnp.broadcast_to(point, (256, 2))

    def field(x, t):  # noise is at time 0 and data at time 1: on the path, this is data - noise
        return (jnp.broadcast_to(point, x.shape) - x) / (1 - t)

    # Near time 1 the division magnifies rounding; the loss of the reversed path is above 1.
    assert flow_loss(field, data) < 1e-6


@pytest.mark.parametrize("power", [1, 3])
def test_flow_times_are_uniform_and_one_per_example(power: int):
    def field(x, t):  # data at 0: the true velocity, and an error of t ** power
        return -x / (1 - t) + t**power

    loss = flow_loss(field, jnp.zeros((20_000, 2)))
    # Mean of t ** 2p; its standard error is below 0.3 / sqrt(20,000) = 0.0021.
    assert loss == pytest.approx(1 / (2 * power + 1), abs=4 * 0.0021)


def test_many_flow_steps_keep_two_modes_and_one_collapses():
    """Data ±1 with equal odds: E[a | x_t = x] = tanh(t x / (1 - t)²), hence the field in closed form."""

    def field(x, t):
        return (jnp.tanh(t * x / (1 - t) ** 2) - x) / (1 - t)

    z = jr.normal(jr.key(0), (500, 1))
    np.testing.assert_allclose(euler(field, z, 1), jnp.zeros((500, 1)), atol=1e-6)
    many = np.asarray(euler(field, z, 200))
    clear = np.abs(np.asarray(z)) > 0.05
    np.testing.assert_allclose(many[clear], np.sign(np.asarray(z))[clear], atol=0.02)


def test_distilling_a_still_flow_costs_what_clipping_removes():
    """Field 0 and the identity as student: E (z - clip z)² over a standard normal z."""
    density, below = exp(-0.5) / sqrt(2 * pi), 0.5 * (1 + erf(1 / sqrt(2)))
    want = 2 * (2 * (1 - below) - density)
    assert want == pytest.approx(0.1506796, abs=1e-7)
    z = jr.normal(jr.key(0), (400_000, 1))
    teacher = jnp.clip(euler(lambda x, t: jnp.zeros_like(x), z, 10), -1, 1)
    assert float(jnp.mean(jnp.square(z - teacher))) == pytest.approx(want, rel=0.02)


# Selection.


def test_best_of_n_is_the_candidate_nearest_to_the_peak():
    candidates = np.random.default_rng(0).normal(size=(7, 5, 3)).astype(np.float32)
    peak = np.asarray([0.2, -0.1, 0.4], np.float32)
    distance = np.sum((candidates - peak) ** 2, axis=-1)
    got = best_of_n(jnp.asarray(candidates), jnp.asarray(-distance))
    for b in range(5):
        np.testing.assert_array_equal(got[b], candidates[distance[:, b].argmin(), b])


def test_best_of_one_is_the_candidate():
    candidate = jr.normal(jr.key(0), (1, 4, 2))
    np.testing.assert_array_equal(best_of_n(candidate, jnp.zeros((1, 4))), candidate[0])


def test_first_of_equal_candidates_wins():
    candidates = jnp.arange(6.0).reshape(3, 1, 2)
    np.testing.assert_array_equal(best_of_n(candidates, jnp.asarray([[0.0], [1.0], [1.0]])), [[2.0, 3.0]])
