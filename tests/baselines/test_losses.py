"""The baselines: losses, gradients and updates against NumPy, and what acts in them."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

import baselines
from baselines import REGISTRY, algorithms, register_algorithm
from tests.helpers.algorithm_cases import (
    LOSSES,
    LR,
    METRICS,
    TAU,
    TAU_ACTOR,
    Case,
    make,
    make_case,
    mode_of,
    registered,
)
from tests.helpers.mac_cases import assert_first_step_of_adam, assert_followed, leaves, slopes_of
from tests.helpers.numpy_ablations import KINDS
from tests.helpers.numpy_acting import act, expect
from tests.helpers.numpy_mac import double
from tests.helpers.numpy_planners import PLANNERS

OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: (name, mode_of(name), {}) for name in algorithms() if not name.startswith("mac")
}
OPTIONS |= {
    "iql with goals, as on D4RL": (
        "iql",
        "goals",
        {"policy": "tanh", "advantage": "target", "activation": "relu", "critic_norm": False},
    ),
    "fql with goals": ("fql", "goals", {"combine": "min"}),
    "rebrac with goals": ("rebrac", "goals", {}),
    "fmpc with goals": ("fmpc", "goals", {"value": "bce", "policy_chunk": 0}),
    "fmpc as released, with goals": (
        "fmpc",
        "goals",
        {"value": "bce", "policy_chunk": 1, "release_bce": True},
    ),
    "fmpc as released": ("fmpc", "reward", {"policy_chunk": 1, "release_return_to_go": True}),
    "leq with goals": ("leq", "goals", {"expectile": 0.1, "lam": 1.0}),
    "leq as released": ("leq", "reward", {"release_critic": True, "release_members": True}),
    "leq as in its own code": (
        "leq",
        "reward",
        {"expansion": 2, "rollout_starts": 6, "symlog": True, "norm_first": True, "activation": "relu"},
    ),
    "leq that expands the data, with goals": ("leq", "goals", {"expansion": 2, "rollout_starts": 6}),
    "sharsa with mean": ("sharsa", "goals", {"combine": "mean", "ends_count": False}),
    "mopo with few real steps": ("mopo", "goals", {"penalty": 0.1, "real_fraction": 0.25, "model_batch": 5}),
    "mopo as published on D4RL": (
        "mopo",
        "reward",
        {
            "joint_reward": True,
            "model_std": "learned",
            "entropy_in_target": True,
            "actor_combine": "min",
            "temperature_limit": 0.2,
            "model_decay": (0.5, 2.0),
        },
    ),
    "mopo penalised at the rollout": ("mopo", "reward", {"penalty_at": "rollout", "combine": "mean"}),
    "tap as released": ("tap", "reward", {"window": 9, "horizon": 9, "release_hidden_steps": True}),
    "mobile without goals": ("mobile", "reward", {}),
    "mobile as published": (
        "mobile",
        "reward",
        {
            "penalty_combine": "min",
            "unbiased_std": True,
            "joint_reward": True,
            "model_std": "learned",
            "target_range": (0.0, np.inf),
            "temperature": 0.2,
        },
    ),
    "diffuser that predicts noise": ("diffuser", "goals", {"predict": "noise"}),
    "hd_da that predicts noise": ("hd_da", "goals", {"predict": "noise", "execute": 1}),
}
QUICK = {"iql", "fql", "rebrac", "sharsa", "cql", "flow_bc", "fmpc", "fmpc with goals", "leq with goals"} | (
    {"leq as in its own code"}
    | {"mopo with few real steps", "mobile as published", "hd_da", "diffuser that predicts noise", "tap"}
    | (algorithms().keys() - REGISTRY.keys())
)
ORACLES = {*LOSSES, "mac", *(f"mac_{kind}" for kind in KINDS)}
"""Algorithms whose losses are written out in NumPy too."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(v, id=k, marks=[pytest.mark.slow] * (k not in QUICK)) for k, v in OPTIONS.items()],
)
def case(request: pytest.FixtureRequest) -> Case:
    name, mode, changes = request.param
    if name not in ORACLES:
        pytest.skip(f"no NumPy version of {name} in tests/helpers: its losses are its author's to test")
    return make_case(name, mode, **changes)


def test_every_algorithm_of_this_project_has_a_numpy_version():
    same = {"mac_nodistill": "mac_euler"}  # and `mac_regression`, by an option
    assert {same.get(name, name) for name in REGISTRY} <= ORACLES


@pytest.mark.parametrize("name", ["mine", "mine_with_goals"])
def test_an_algorithm_of_someone_else_needs_no_numpy_version(name: str, monkeypatch: pytest.MonkeyPatch):
    """It is built for the contract at those of the sizes that its configuration has."""
    monkeypatch.setattr(baselines, "_registered", {})
    entry = REGISTRY["sharsa" if name == "mine_with_goals" else "cql"]
    register_algorithm(name, entry.config, entry.algorithm)
    (mine,) = [param for param in registered(()) if param.values == (name,)]
    assert not mine.marks and name not in ORACLES
    mode = mode_of(name)
    assert mode == ("goals" if name == "mine_with_goals" else "reward")
    made: Any = make(name, mode, no_such_field=1)
    assert made.cfg.batch == 8


def test_losses_are_those_of_numpy(case: Case):
    want = case.by_hand(double(case.state.nets))
    got = {n: sum(float(case.metrics[m]) for m in METRICS[n] if m in case.metrics) for n in case.names}
    assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_gradient_of_the_total_is_each_networks_own_slope(case: Case):
    """Central differences of the slow version; a leak from another network's loss would add to it."""
    nets = double(case.state.nets)
    for name in case.names:
        for got, want in slopes_of(nets, name, getattr(case.grads, name), case.by_hand, count=2):
            assert got == pytest.approx(want, rel=1e-3, abs=1e-4), name


def test_update_follows_gradients_and_moves_target_networks(case: Case):
    before, after, online = case.state, case.after, case.algo.target_nets(case.state.nets)
    if case.name == "tap":
        assert_tap_followed(case)
        return
    assert_first_step_of_adam(before.nets, after.nets, case.grads, LR)
    if case.name == "idql":
        assert_followed(before.target["q"], after.target["q"], online["q"], TAU)
        assert_followed(before.target["actor"], after.target["actor"], online["actor"], TAU_ACTOR)
    elif case.name == "tt":  # quantiles, which stay
        chex.assert_trees_all_equal(before.target, after.target)
    else:
        assert_followed(before.target, after.target, online, TAU)


def assert_tap_followed(case: Case) -> None:
    """All networks followed Adam, but for the codebook, whose averages followed the batch's."""
    before, after, grads = (
        eqx.tree_at(lambda nets: nets.codebook, nets, None)
        for nets in (case.state.nets, case.after.nets, case.grads)
    )
    assert_first_step_of_adam(before, after, grads, LR)
    rate = 1 - case.algo.cfg.code_decay
    for x, y, g in zip(
        *(leaves(t.codebook) for t in (case.state.nets, case.after.nets, case.grads)), strict=True
    ):
        np.testing.assert_allclose(y, x - rate * g, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal(case.after.target, case.state.target)


def test_state_holds_arrays_only(case: Case):
    assert all(isinstance(leaf, jax.Array) for leaf in leaves(case.after))
    chex.assert_trees_all_equal_shapes_and_dtypes(case.state, case.after)


def situations(case: Case) -> tuple[np.ndarray, np.ndarray | None, jax.Array, jax.Array | None]:
    """States and goals, if there are any, and the same as JAX has them."""
    rng = np.random.default_rng(0)
    s, g = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    if case.algo.env.goal_dim is None:
        return s, None, jnp.asarray(s, jnp.float32), None
    return s, g, jnp.asarray(s, jnp.float32), jnp.asarray(g, jnp.float32)


def test_acting_is_that_of_numpy(case: Case):
    s, g, obs, goal = situations(case)
    got = jax.jit(case.algo.act)(case.state, obs, goal, jr.key(1))
    nets, target = double(case.state.nets), double(case.state.target)
    with jax.numpy_rank_promotion("allow"):
        want = act(case.name, nets, target, s, g, case.algo.cfg, jr.key(1))
    assert got.shape == (5, 1, 2) and np.ptp(want, axis=0).max() > 0.01
    np.testing.assert_allclose(got[:, 0], want, rtol=1e-3, atol=1e-4)


def test_expected_return_is_what_the_critics_say_of_the_action(case: Case):
    algo = case.algo
    s, g, obs, goal = situations(case)
    if case.name in ("flow_bc", "fmpc", "tap", "tt", *PLANNERS):
        assert algo.step_discount is None and algo.predict(case.state, obs, goal, jr.key(1)) is None
        return
    assert algo.step_discount == algo.cfg.discount
    got = jax.jit(algo.predict)(case.state, obs, goal, jr.key(1))
    nets, chosen = double(case.state.nets), np.asarray(algo.act(case.state, obs, goal, jr.key(1))[:, 0])
    with jax.numpy_rank_promotion("allow"):
        want = expect(case.name, nets, s, g, algo.cfg, chosen, jr.key(1))
    assert np.ptp(want) > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
