"""The baselines: losses, gradients and updates against NumPy, and what acts in them."""

from typing import Any

import jax
import numpy as np
import pytest

from baselines import REGISTRY
from tests.algorithm_1 import double
from tests.baseline_cases import GOALS_ONLY, LR, METRICS, TAU, Case, make_case
from tests.mac_cases import leaves, slopes_of

OPTIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: (name, "goals" if name in (*GOALS_ONLY, "gciql") else "reward", {})
    for name in REGISTRY
    if not name.startswith("mac")
}
OPTIONS |= {
    "iql with goals, as on D4RL": (
        "iql",
        "goals",
        {"policy": "tanh", "advantage": "slow", "activation": "relu", "critic_norm": False},
    ),
    "fql with goals": ("fql", "goals", {"combine": "min"}),
    "rebrac with goals": ("rebrac", "goals", {}),
    "sharsa with mean": ("sharsa", "goals", {"combine": "mean", "ends_count": False}),
}
SLOW = ("rebrac with goals", "fql with goals")


@pytest.fixture(
    scope="module",
    params=[pytest.param(v, id=k, marks=[pytest.mark.slow] * (k in SLOW)) for k, v in OPTIONS.items()],
)
def case(request: pytest.FixtureRequest) -> Case:
    name, mode, changes = request.param
    return make_case(name, mode, **changes)


def test_losses_are_those_of_the_slow_version(case: Case):
    want = case.by_hand(double(case.state.nets))
    got = {n: sum(float(case.metrics[m]) for m in METRICS[n] if m in case.metrics) for n in case.names}
    assert got == pytest.approx(want, rel=1e-4, abs=1e-5)


def test_gradient_of_the_total_is_the_slope_of_each_networks_own_loss(case: Case):
    """Central differences of the slow version; a leak from another network's loss would add to it."""
    nets = double(case.state.nets)
    for name in case.names:
        for got, want in slopes_of(nets, name, getattr(case.grads, name), case.by_hand, count=2):
            assert got == pytest.approx(want, rel=1e-3, abs=1e-4), name


def test_update_moves_each_weight_against_its_gradient_and_slow_copies_by_their_rates(case: Case):
    """Adam's first step is the learning rate, whatever the size of the gradient."""
    before, after = case.state, case.after
    for x, y, g in zip(leaves(before.nets), leaves(after.nets), leaves(case.grads), strict=True):
        clear = np.abs(g) > 1e-5
        np.testing.assert_allclose(np.asarray(y - x)[clear], -LR * np.sign(g)[clear], rtol=2e-3)
        assert np.max(np.abs(y - x)) <= 1.001 * LR
    rates = {"q": TAU, "actor": 0.001} if case.name == "idql" else {}
    online = case.algo.targeted(before.nets)
    for name in rates or [None]:
        slow, now, fast = ((x if name is None else x[name]) for x in (before.target, after.target, online))
        rate = rates.get(name, TAU)
        for t, got, v in zip(leaves(slow), leaves(now), leaves(fast), strict=True):
            np.testing.assert_allclose(got, (1 - rate) * t + rate * v, rtol=1e-5, atol=1e-6)


def test_state_holds_arrays_only(case: Case):
    assert all(isinstance(leaf, jax.Array) for leaf in leaves(case.after))
    assert jax.tree.structure(case.after) == jax.tree.structure(case.state)
    assert [x.aval for x in leaves(case.state)] == [x.aval for x in leaves(case.after)]
