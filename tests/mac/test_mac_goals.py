"""MAC with goals: its losses against Algorithm 1 written out in NumPy, and which goal goes where."""

import dataclasses
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.algorithm import TrainState
from mac.config import Config
from mac.data.sampler import sample
from mac.errors import UserError
from mac.mac import MAC, Nets
from mac.types import Batch, EnvSpec, Goals
from tests.helpers.mac_cases import Case, leaves, make_case, own_losses, touched
from tests.helpers.numpy_mac import choose, double, fresh
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import GOAL_SPEC, SPEC, goal_mac, window

BCE = {"value": "bce", "lam": 0.7}


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case(goal_mac())


@pytest.fixture(
    scope="module",
    params=[pytest.param({}, id="squared", marks=pytest.mark.slow), pytest.param(BCE, id="bce")],
)
def sloped(request: pytest.FixtureRequest) -> tuple[Case, dict[str, Nets]]:
    case = make_case(goal_mac(**request.param))
    return case, case.gradients()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, id="paper"),
        pytest.param({"lam": 0.7, "chunk": 3, "rollout_batch": 4}, id="lambda", marks=pytest.mark.slow),
        pytest.param({"rollout": 1}, id="one chunk", marks=pytest.mark.slow),
        pytest.param({"value": "bce", "rollout": 1}, id="bce", marks=pytest.mark.slow),
        pytest.param(
            {"value": "bce", "release_bce": True, "rollout_batch": 5}, id="release", marks=pytest.mark.slow
        ),
        pytest.param(BCE, id="bce and lambda"),
    ],
)
def test_losses_with_goals_are_those_of_algorithm_1(changes: dict[str, Any]):
    case = make_case(goal_mac(**changes))
    total, metrics = case.loss()
    got = {net: float(metrics[metric]) for net, metric in own_losses(case.algo).items()}
    assert got == pytest.approx(case.by_hand(double(case.nets)), rel=1e-4)
    assert float(total) == pytest.approx(sum(got.values()), rel=1e-6)
    # Some chunks of the imagination (the first, where it is the only one) reach their goal and some do not,
    # so that masks count.
    reached = float(metrics["imagined/reward"]) + (case.algo.cfg.value == "squared")
    assert 0 < reached < 1 and case.batch.goals is not None
    assert 0 < float(jnp.mean(case.batch.goals.reached)) < 1


@pytest.mark.slow
def test_releases_slip_changes_the_critics_loss_only():
    right, slip = (make_case(goal_mac(value="bce", release_bce=on)).loss()[1] for on in (False, True))
    assert {k for k in right if float(right[k]) != float(slip[k])} == {"critic/loss"}


@pytest.mark.parametrize("net", own_losses(goal_mac()))
def test_gradients_with_goals_are_the_slopes_of_algorithm_1(sloped: tuple[Case, dict[str, Nets]], net: str):
    """Central differences of the NumPy loss along random directions of the network that it trains."""
    case, gradients = sloped
    for got, want in case.slopes_along_random_directions(gradients, net):
        assert got == pytest.approx(want, rel=1e-3, abs=1e-4)


def test_no_loss_with_goals_reaches_another_network(sloped: tuple[Case, dict[str, Nets]]):
    assert touched(sloped[1]) == {loss: {loss} for loss in own_losses(goal_mac())}


# Which goal goes where.


def losses(case: Case, **changes: Any) -> dict[str, float]:
    """All metrics, with some of the batch's goals changed."""
    assert case.batch.goals is not None
    goals = dataclasses.replace(case.batch.goals, **changes)
    other = dataclasses.replace(case, batch=dataclasses.replace(case.batch, goals=goals))
    return {name: float(x) for name, x in other.loss()[1].items()}


def changed(case: Case, **changes: Any) -> set[str]:
    before, after = losses(case), losses(case, **changes)
    return {name for name, x in before.items() if x != after[name]}


def test_each_goal_goes_to_its_own_losses(case: Case):
    goals = case.batch.goals
    assert goals is not None
    assert changed(case, actor=goals.actor + 1) == {"policy/flow_loss", "policy/distil_loss"}
    imagined = {"value/loss", "critic/loss", "value/v_mean", "critic/q_mean", "imagined/reward"}
    assert changed(case, value=goals.value + 1) == imagined | {"model/success_loss"}
    assert changed(case, reached=1 - goals.reached) == {"model/success_loss"}


def test_rewards_of_the_data_do_not_matter_with_goals(case: Case):
    without = dataclasses.replace(case.batch, rewards=None, masks=None)
    got, want = (dataclasses.replace(case, batch=b).loss()[1] for b in (without, case.batch))
    assert {k: float(v) for k, v in got.items()} == {k: float(v) for k, v in want.items()}


def test_imagination_keeps_the_goal_of_its_start(case: Case):
    """Every rollout alone gives the mean over the batch; a goal from another row would show."""
    whole = losses(case)
    alone = []
    for b in range(case.algo.cfg.batch):
        # The noise of the imagination belongs to a row's place, so each row stays at its own.
        goals = case.batch.goals
        assert goals is not None
        value = goals.value.at[b].add(1.0)
        alone.append(losses(case, value=value)["critic/q_mean"] - whole["critic/q_mean"])
    together = losses(case, value=case.batch.goals.value + 1)["critic/q_mean"] - whole["critic/q_mean"]  # pyright: ignore[reportOptionalMemberAccess]
    assert sum(alone) == pytest.approx(together, rel=1e-3, abs=1e-5) and min(map(abs, alone)) > 0


def test_act_chooses_for_each_environments_own_goal():
    algo = goal_mac(candidates_test=5)
    # Smaller actions than fresh networks': a clipped one would not show what it depends on.
    nets = eqx.tree_at(
        lambda n: n.policy.dense[-1].weight, fresh(goal_mac()).nets, replace_fn=lambda w: w / 9
    )
    rng = np.random.default_rng(0)
    obs, goal = (jnp.asarray(rng.normal(size=(6, 2)), jnp.float32) for _ in range(2))
    act = jax.jit(algo.act)
    got = act(TrainState(nets, nets.v, ()), obs, goal, jr.key(1))
    noise = np.asarray(jr.normal(jr.key(1), (5, 6, 4)))
    want = choose(double(nets), np.asarray(obs), noise, np.asarray(goal))
    np.testing.assert_allclose(got[:, 0], want[:, :2], rtol=1e-4, atol=1e-5)
    other = act(TrainState(nets, nets.v, ()), obs, goal.at[2].add(1.0), jr.key(1))
    assert np.flatnonzero(np.any(np.asarray(other != got), axis=(1, 2))).tolist() == [2]


@pytest.mark.slow
@pytest.mark.parametrize("size", slow_except([40.0], [40.0, -300.0]))
def test_cross_entropy_of_confident_values_is_finite(size: float):
    """Where a probability rounds to 0 or 1, its logarithm must not be taken as such."""
    case = make_case(goal_mac(value="bce"))

    def sure(net: Any) -> Any:
        return eqx.tree_at(lambda n: n.dense, net, replace_fn=lambda d: jax.tree.map(lambda x: size * x, d))

    nets = dataclasses.replace(case.nets, v=sure(case.nets.v), q=sure(case.nets.q))
    confident = dataclasses.replace(case, nets=dataclasses.replace(nets, success=sure(case.nets.success)))
    chex.assert_tree_all_finite((confident.loss(), confident.gradients()))


# What fits together.


def test_chances_need_goals():
    with pytest.raises(UserError, match=r"^--hp\.value=bce: toy-point has no goals"):
        MAC(Config(value="bce"), SPEC)


def test_goals_without_goal_data_are_a_mistake_at_trace_time(case: Case):
    batch = dataclasses.replace(case.batch, goals=None)
    with pytest.raises(TypeError):
        jax.eval_shape(case.algo.loss, case.nets, case.target, batch, case.key)


def test_sampler_gives_what_the_algorithm_asks_for():
    """Columns of the goal in the environment's order, laws of the configuration, one goal per chunk."""
    algo = goal_mac(value_goals=(0.1, 0.2, 0.7), discount=0.95)
    spec = algo.sample
    assert spec.goals is not None and spec.goals.columns == GOAL_SPEC.goal_columns
    assert spec.goals.value == algo.cfg.goal_distribution(
        "value"
    ) and spec.goals.actor == algo.cfg.goal_distribution("actor")
    assert spec.goals.value[:3] == (0.1, 0.2, 0.7) and spec.goals.actor.discount == 0.95
    batch = jax.eval_shape(lambda: sample(window(), spec, jr.key(0)))
    assert isinstance(batch, Batch) and isinstance(batch.goals, Goals)
    assert batch.goals.value.shape == batch.goals.actor.shape == (8, 2)


def size(algo: MAC) -> dict[str, int]:
    """Numbers of parameters, by network."""
    nets = jax.eval_shape(algo.nets, jr.key(0))
    return {net: sum(x.size for x in leaves(getattr(nets, net))) for net in own_losses(algo)}


def test_parameter_counts_are_those_of_the_authors_networks():
    """The release also has the outcome model that a mode does not use: of reward with goals, of success
    without; both are as large as Q.
    """
    puzzle = EnvSpec("puzzle-4x5", 99, 5, 20, (1,), 1000, 0.05, tuple(range(20)))
    small = size(MAC(Config(hidden=(256,) * 4), puzzle))
    want = {"model": 263267, "success": 243201, "flow": 256050, "policy": 255794, "v": 230401, "q": 243201}
    assert small == want
    assert sum(small.values()) + small["v"] + small["q"] == 1965516
    large = size(MAC(Config(hidden=(1024,) * 4), puzzle))
    assert sum(large.values()) + large["v"] + large["q"] == 26735820
    cubes = size(MAC(Config(), EnvSpec("cube-double", 37, 5, None, (1,), 500, 0.05)))
    assert sum(cubes.values()) + cubes["v"] + cubes["q"] == 6719118
