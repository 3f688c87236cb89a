"""MAC's diagnostics of models, critics and policies whose faults are known."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac import mac_diagnostics
from mac.algorithm import TrainState
from mac.config import Config
from mac.data.chunk_sequences import Sequences, sample_sequences
from mac.nn.mlp import MLP, STANDARD
from mac.types import Batch
from tests.helpers.numpy_ablations import MODES, make
from tests.helpers.numpy_mac import choose, double, follow, fresh, run
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import STRIDE, mac, window


def moved(obs: jax.Array, chunk: jax.Array) -> jax.Array:
    """The point's true dynamics."""
    return obs + STRIDE * jnp.sum(chunk.reshape(len(chunk), -1, 2), axis=1)


@pytest.fixture(scope="module")
def real() -> Sequences:
    return sample_sequences(window(chunk=4), 4, 5, 30, jr.key(0))


# The model.


def test_exact_model_does_not_drift(real: Sequences):
    np.testing.assert_allclose(mac_diagnostics.drift(moved, real), np.zeros(5), atol=1e-5)


def test_bias_of_the_model_adds_up_chunk_by_chunk(real: Sequences):
    bias = jnp.asarray([0.03, -0.04])
    got = mac_diagnostics.drift(lambda s, a: moved(s, a) + jnp.broadcast_to(bias, s.shape), real)
    np.testing.assert_allclose(got, np.sqrt(0.5 * (0.03**2 + 0.04**2)) * np.arange(1, 6), rtol=1e-4)


def test_model_of_no_change_drifts_as_far_as_real_states_move(real: Sequences):
    obs = np.asarray(real.obs, np.float64)
    want = []
    for k in range(1, 6):
        errors = [(obs[b, k, d] - obs[b, 0, d]) ** 2 for b in range(30) for d in range(2)]
        want.append(np.sqrt(np.mean(errors)))
    np.testing.assert_allclose(mac_diagnostics.no_change_error(real), want, rtol=1e-5)
    np.testing.assert_allclose(mac_diagnostics.drift(lambda s, a: s, real), want, rtol=1e-5)


def test_horizons_are_round_numbers_of_chunks_and_the_last():
    got = [mac_diagnostics.horizons(n) for n in (1, 2, 5, 7, 10, 25)]
    assert got == [[1], [1, 2], [1, 2, 5], [1, 2, 5, 7], [1, 2, 5, 10], [1, 2, 5, 10, 20, 25]]


def test_state_is_outside_if_any_entry_is_beyond_the_edge():
    inside, beyond, below = [1.0, -1.0], [1.2, 0.0], [0.0, -1.2]
    obs = jnp.asarray([[inside, inside, inside, inside], [inside, beyond, below, [9.0, 9.0]]])
    np.testing.assert_allclose(mac_diagnostics.outside(obs), [0.0, 0.75])


# The critic.


def test_gain_is_in_units_of_the_spread_over_states():
    q = jnp.asarray([[0.0, 10.0], [3.0, 10.0], [6.0, 16.0]])  # means 3 and 12: 4.5 from their mean
    got = mac_diagnostics.gain(q)
    assert float(got["best_of_n_gain"]) == pytest.approx((3 + 4) / 2)
    assert float(got["best_of_n_spreads"]) == pytest.approx(3.5 / 4.5)


def test_equal_candidates_have_no_gain():
    got = mac_diagnostics.gain(jnp.ones((4, 3)))
    assert {name: float(value) for name, value in got.items()} == dict.fromkeys(got, 0.0)


@pytest.mark.parametrize("kind", ["mean", "sum", "squared", "bce"])
@pytest.mark.parametrize("chunks", [0, 1, 7])
def test_expected_returns_are_those_of_the_steps_to_success(kind: str, chunks: int):
    """A chain on which success is `chunks` chunks of n away and every step before it costs 1.

    Q is then the closed form of MAC's own recursion, chunk by chunk.
    """
    n, g = 3, 0.9
    per_chunk = {"mean": sum(g**j for j in range(n)) / n, "sum": sum(g**j for j in range(n)), "squared": 1.0}
    if kind == "bce":
        cfg = Config(chunk=n, discount=g, value="bce")
        odds = g ** (n * chunks)
        q = np.inf if chunks == 0 else np.log(odds / (1 - odds))
    else:
        choice: Any = {} if kind == "squared" else {"chunk_reward": kind}
        cfg = Config(chunk=n, discount=g, **choice)
        q = -per_chunk[kind] * sum(g ** (n * k) for k in range(chunks))
    got = mac_diagnostics.expected_return(cfg, jnp.float32(q), goals=kind in ("squared", "bce"))
    assert float(got) == pytest.approx(-sum(g**t for t in range(n * chunks)), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("acting", [0, 3])
def test_prediction_is_the_critic_at_the_executed_chunk(acting: int):
    algo = mac(candidates_test=5, flow_steps_test=acting)
    nets = fresh(mac()).nets
    state, obs = (
        TrainState(nets, nets.v, ()),
        jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32),
    )
    got = jax.jit(algo.predict)(state, obs, None, jr.key(1))
    wide, s = double(nets), np.asarray(obs, np.float64)
    noise = np.asarray(jr.normal(jr.key(1), (5, 4, 4)), np.float64)
    if acting:
        chunks = np.clip(follow(wide.flow, (np.broadcast_to(s, (5, 4, 2)),), noise, acting), -1, 1)
        best = np.max(run(wide.q, s, chunks)[..., 0], axis=0)
    else:
        best = run(wide.q, s, choose(wide, s, noise))[..., 0]
    np.testing.assert_allclose(got, 2 * best, rtol=1e-4, atol=1e-4)  # 2 actions per chunk


# The policy.


class Table(MLP):
    """A network whose output is a function given by hand."""

    function: Any = eqx.field(static=True)

    def __init__(self, function: Any):
        self.dense, self.norm, self.in_sizes, self.function = (), (), (), function
        self.style = STANDARD

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


def batch(count: int = 50) -> Batch:
    obs = jr.uniform(jr.key(3), (count, 2))
    return Batch(obs, jnp.zeros((count, 2, 2)), obs, None, None)


def hand_made(miss: float) -> Any:
    """A flow that carries noise by (0.1, 0.1, 0.1, 0.1), a student off by `miss`, and Q the chunk's sum."""
    nets = fresh(mac()).nets
    return dataclasses.replace(
        nets,
        flow=Table(lambda s, g, x, t: jnp.full_like(x, 0.1)),
        policy=Table(lambda s, g, x: x + 0.1 + miss),
        q=Table(lambda s, g, a: jnp.sum(a, axis=-1, keepdims=True)),
    )


def test_student_that_equals_its_teacher_has_no_gap():
    got = mac_diagnostics.distillation(mac(), hand_made(0.0), batch(), jr.key(0))
    assert {name: float(value) for name, value in got.items()} == pytest.approx(
        {"distil_gap": 0, "distil_q_gap": 0}, abs=1e-5
    )


def test_gap_is_that_of_clipped_chunks_given_one_noise():
    got = mac_diagnostics.distillation(mac(), hand_made(-0.3), batch(), jr.key(0))
    noise = np.asarray(jr.normal(jr.key(0), (50, 4)))
    teacher, student = np.clip(noise + 0.1, -1, 1), np.clip(noise - 0.2, -1, 1)
    assert float(got["distil_gap"]) == pytest.approx(np.sqrt(np.mean((teacher - student) ** 2)), rel=1e-4)
    want = 2 * np.mean(np.sum(teacher - student, axis=-1))  # a chunk of 2 actions
    assert float(got["distil_q_gap"]) == pytest.approx(want, rel=1e-4)


def test_choice_is_among_clipped_candidates_of_the_acting_policy():
    algo = mac(candidates_test=6)
    got = mac_diagnostics.best_of_n_gain(algo, hand_made(0.0), batch(), jr.key(0))
    chunks = np.clip(np.asarray(jr.normal(jr.key(0), (6, 50, 4))) + 0.1, -1, 1)
    q = 2 * chunks.sum(axis=-1)
    assert float(got["best_of_n_gain"]) == pytest.approx(np.mean(q.max(axis=0) - q.mean(axis=0)), rel=1e-4)
    spread = np.sqrt(np.mean((chunks - chunks.mean(axis=0)) ** 2))
    assert float(got["policy_spread"]) == pytest.approx(spread, rel=1e-4)


# All of it.

diagnose = jax.jit(mac_diagnostics.compute_diagnostics, static_argnums=0)
ALWAYS = {f"{name}_{n}" for name in ("drift", "motion", "imagined_outside") for n in (2, 4, 6)} | {
    "real_outside"
}
CHOICE, PAIR = {"best_of_n_gain", "best_of_n_spreads", "policy_spread"}, {"distil_gap", "distil_q_gap"}


def names(found: dict[str, Any]) -> set[str]:
    assert all(name.startswith("diagnostics/") for name in found)
    return {name.removeprefix("diagnostics/") for name in found}


def test_mac_has_all_of_them_and_a_key_decides_them():
    nets, data = fresh(mac()).nets, window()
    found = jax.device_get(diagnose(mac(), nets, data, jr.key(1)))
    assert names(found) == ALWAYS | CHOICE | PAIR and all(map(np.isfinite, found.values()))
    again, other = (jax.device_get(diagnose(mac(), nets, data, jr.key(i))) for i in (1, 2))
    assert again == found and other != found


def test_rollouts_longer_than_all_episodes_leave_drifts_unknown():
    found = diagnose(mac(), fresh(mac()).nets, window(episodes=30, length=6), jr.key(1))
    unknown = {name for name, value in found.items() if not np.isfinite(value)}
    assert unknown == {f"diagnostics/{name}_{n}" for name in ("drift", "motion") for n in (2, 4, 6)}


@pytest.mark.parametrize("mode", slow_except(["goals"], MODES))
@pytest.mark.parametrize(("kind", "missing"), {"gaussian": PAIR, "fql": CHOICE, "euler": PAIR}.items())
def test_what_a_method_lacks_is_left_out(kind: str, mode: str, missing: set[str]):
    algo = make(kind, mode)
    state = jax.eval_shape(algo.init, jr.key(0))
    found = jax.eval_shape(algo.diagnose, state, window(), jr.key(1))
    assert names(found) == (ALWAYS | CHOICE | PAIR) - missing
