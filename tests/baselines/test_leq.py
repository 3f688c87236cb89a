"""LEQ: mixtures of returns by hand, gradients of actions, and the known bugs that are options."""

import dataclasses
import operator
from itertools import pairwise
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.leq import LEQ, LEQConfig
from mac.actor_critic import one_step
from mac.errors import UserError
from mac.ops.returns import lambda_mixture, mixture_shares
from mac.types import Batch
from tests.helpers.algorithm_cases import SIZES, make, make_case
from tests.helpers.numpy_ablations import MODES, normal
from tests.helpers.numpy_baselines import net
from tests.helpers.numpy_leq import act, dealt, densities, draws, mixture, rollout, slopes
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import FALL_SPEC, falling_window, window

MODES_TOO = {**MODES, "terminations": FALL_SPEC}


def mixture_of(q: list[float], r: list[float], m: list[float], discount: float, lam: float) -> np.ndarray:
    shares = mixture_shares(lam, len(r))
    return np.asarray(
        lambda_mixture(jnp.asarray(q), jnp.asarray(r), jnp.asarray(m), discount=discount, shares=shares)
    )


def test_mixtures_of_returns_are_those_worked_out_by_hand():
    got = mixture_of([1.0, 2.0, 3.0], [0.5, 0.25], [1.0, 1.0], 0.9, 0.95)
    # From the last: 3; (2 + .95 (.25 + 2.7)) / 1.95; (1 + .95 * 1.95 (.5 + .9 * 2.4628...)) / 2.8525.
    np.testing.assert_allclose(got, [2.1147721297, 2.4628205128, 3], rtol=1e-6)
    # Of the returns 0, 1 and 2 the mean is 1; of 0 and 1 it is 1/2.
    np.testing.assert_allclose(mixture_of([0.0] * 3, [1.0, 1.0], [1.0, 1.0], 1.0, 1.0), [1, 0.5, 0])


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_mixture_weighs_the_return_of_k_steps_by_the_kth_power(lam: float):
    rng = np.random.default_rng(0)
    q, r, m = list(rng.normal(size=6)), list(rng.normal(size=5)), list(rng.uniform(size=5))
    got = mixture_of(q, r, m, 0.9, lam)
    np.testing.assert_allclose(got, mixture(q, r, m, 0.9, lam), rtol=1e-5, atol=1e-6)


def made(mode: str) -> Any:
    """LEQ at the sizes of `SIZES`."""
    small: Any = make("leq", "reward")
    return LEQ(small.cfg, MODES_TOO[mode])


def wide(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float64)), tree)


def in_float64(mode: str) -> tuple[Any, Any, jax.Array, Any, jax.Array]:
    """LEQ with perturbed float64 networks, states, and goals if there are any; with 64 bits on."""
    algo = made(mode)
    nets = wide(perturb(algo.nets(jr.key(0)), seed=1))
    s, g = np.random.default_rng(2).normal(size=(2, 5, 2))
    return algo, nets, jnp.asarray(s), jnp.asarray(g) if mode == "goals" else None, jr.key(3)


@pytest.mark.parametrize("mode", slow_except(["terminations"], MODES_TOO))
def test_action_gradients_are_the_diagonal_of_the_jacobian(mode: str):
    with jax.enable_x64(True):
        algo, nets, s, g, key = in_float64(mode)
        got, _ = jax.jit(algo.action_gradients)(nets, s, g, key)

        def of_one_row(nudge: jax.Array) -> jax.Array:
            # Plain derivatives: of a mixture through which gradients pass from every return to the next.
            return plain(algo, nets, s, g, key, nudge)

        zeros = jnp.zeros((algo.cfg.rollout + 1, len(s), 2))
        jacobian = np.asarray(jax.jit(jax.jacobian(of_one_row))(zeros))  # H1 B, H1 B A
        want = np.einsum("ibiba->iba", jacobian)
        alive = np.asarray(jax.jit(algo.imagine)(nets, s, g, key).alive)
    assert got.dtype == np.float64 and (mode != "goals" or alive.min() == 0)
    assert np.abs(want[:-2]).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def plain(algo: Any, nets: Any, s: jax.Array, g: Any, key: jax.Array, nudge: jax.Array) -> jax.Array:
    """Mixtures of a rollout written out, all of which is differentiable."""
    cfg, obs, actions, rewards, masks, live = algo.cfg, [s], [], [], [], jnp.ones(len(s))
    for i, k in enumerate(jr.split(key, cfg.rollout)):
        actions.append(jnp.tanh(nets.actor(obs[-1], g)) + nudge[i])
        after = nets.model.imagine(obs[-1], g, actions[-1], k)
        goes_on = (live > 0).astype(live.dtype)
        rewards.append(after.reward * goes_on)
        masks.append(after.mask * goes_on)
        live = live * after.mask
        obs.append(after.next_obs)
    actions.append(jnp.tanh(nets.actor(obs[-1], g)) + nudge[-1])
    q = [nets.q[0](x, g, a)[:, 0] for x, a in zip(obs, actions, strict=True)]
    ret: list[Any] = [None] * len(q)
    ret[-1], weight = q[-1], 1.0
    for i in reversed(range(cfg.rollout)):
        later = rewards[i] + cfg.discount * masks[i] * ret[i + 1]
        ret[i] = (q[i] + cfg.lam * weight * later) / (1 + cfg.lam * weight)
        weight = 1 + cfg.lam * weight
    return jnp.stack(ret)


@pytest.mark.parametrize("mode", MODES)
def test_action_gradients_are_those_of_central_differences(mode: str):
    with jax.enable_x64(True):
        algo, nets, s, g, key = in_float64(mode)
        got, _ = jax.jit(algo.action_gradients)(nets, s, g, key)
        slow, s, g = double(nets), np.asarray(s), None if g is None else np.asarray(g)
        with jax.numpy_rank_promotion("allow"):
            drawn = draws(key, algo.cfg, s.shape)
            path = rollout(slow, s, act(slow, s, g), g, drawn, algo.cfg)
            want = slopes(slow, path, g, drawn, algo.cfg)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("mode", slow_except(["goals"], MODES))
def test_imagined_steps_train_the_critic_unless_as_released(mode: str):
    for released in (False, True):
        case = make_case("leq", mode, release_critic=released)

        def imagined(nets: Any, case: Any = case) -> jax.Array:
            return case.algo.loss(nets, case.state.target, case.batch, case.key)[1]["critic/imagined_loss"]

        value, grads = jax.jit(jax.value_and_grad(imagined))(case.state.nets)
        assert value > 0
        assert any(np.any(x) for x in jax.tree.leaves(grads.q)) == (not released)
        assert not any(np.any(x) for x in jax.tree.leaves((grads.model, grads.actor)))


def test_released_members_change_within_a_state():
    """Members that predict 0 and 10 everywhere: the entries of a state agree but for the released ones."""
    made: Any = make("leq", "reward", members=2, release_members=True, rollout=1)
    bias, where = (
        jnp.asarray([[0.0, 0.0, -50.0, -50.0], [10.0, 10.0, -50.0, -50.0]]),
        operator.attrgetter("model.dynamics.members"),
    )
    for released in (False, True):
        algo: Any = dataclasses.replace(made, cfg=dataclasses.replace(made.cfg, release_members=released))
        nets = algo.nets(jr.key(0))
        nets = eqx.tree_at(where, nets, jax.tree.map(jnp.zeros_like, where(nets)))
        nets = eqx.tree_at(lambda n: where(n).dense[-1].bias, nets, bias)
        after = np.asarray(jax.jit(algo.imagine)(nets, jnp.zeros((64, 2)), None, jr.key(1)).obs[1])
        high = np.round(after / 10)
        assert set(high.ravel()) == {0, 1} and np.all(high[:, 0] == high[:, 1]) == (not released)


def test_weights_of_soft_masks_are_survival_probabilities():
    algo = made("terminations")
    nets = perturb(algo.nets(jr.key(0)), seed=1)
    tau = jax.jit(algo.imagine)(nets, jnp.zeros((4, 2)), None, jr.key(1))
    assert np.all((tau.mask > 0) & (tau.mask < 1)) and np.all(np.asarray(tau.alive[0]) == 1)
    np.testing.assert_allclose(tau.alive[1:], np.cumprod(tau.mask, axis=0)[:-1], rtol=1e-6)
    # Each step's mask enters its mixture once.
    q, r, m = (list(np.asarray(x[:, 0])) for x in (tau.q, tau.reward, tau.mask))
    want = mixture(q, r, m, algo.cfg.discount, algo.cfg.lam)
    np.testing.assert_allclose(tau.ret[:, 0], want, rtol=1e-5)


def test_nothing_is_earned_after_an_imagined_goal():
    algo: Any = make("leq", "goals", rollout=4)
    nets = perturb(algo.nets(jr.key(0)), seed=1)
    s, g = jr.normal(jr.key(2), (2, 64, 2))
    tau = jax.jit(algo.imagine)(nets, s, g, jr.key(1))
    dead = np.asarray(tau.alive) == 0
    assert 0 < dead.mean() < 1
    assert not np.any(np.asarray(tau.reward)[dead]) and not np.any(np.asarray(tau.mask)[dead])


def test_critic_learns_on_goals_of_values_and_policy_on_its_own():
    """The other kind of goal changes neither loss."""
    algo: Any = make("leq", "goals")
    nets, target = perturb(algo.nets(jr.key(0)), 1), perturb(algo.target_nets(algo.nets(jr.key(4))), 2)
    batch: Batch = make_case("leq", "goals").batch
    assert batch.goals is not None
    loss = jax.jit(
        lambda goals: algo.loss(nets, target, dataclasses.replace(batch, goals=goals), jr.key(5))[1]
    )
    first = loss(batch.goals)
    other_actor = loss(dataclasses.replace(batch.goals, actor=batch.goals.actor + 1))
    other_value = loss(dataclasses.replace(batch.goals, value=batch.goals.value + 1))
    for name, value in first.items():
        policy = name.startswith("policy/")
        assert (value == other_actor[name]) == (not policy), name
        assert (value == other_value[name]) == (policy or name == "model/dynamics_loss"), name


def expanding(mode: str, **changes: Any) -> Any:
    return make("leq", mode, expansion=3, rollout_starts=5, rollout_every=2, rollouts_kept=2, **changes)


@pytest.mark.parametrize("mode", MODES)
def test_expansion_visits_what_numpy_does(mode: str):
    """The policy with noise, one model step after the other from states of the data; goals stay."""
    algo, data, key = expanding(mode), window(1), jr.key(3)
    state = jax.jit(algo.init)(jr.key(0)).without_memory()
    state = dataclasses.replace(state, nets=perturb(state.nets, 1))
    rows, count = jax.jit(algo.rollout)(state, data, jnp.asarray(1), key)
    assert int(count) == 15 == algo.replay.rows and algo.replay.batch == 8
    nets, x = double(state.nets), [np.asarray(s, np.float64) for s in np.split(np.asarray(rows.obs), 3)]
    goals = [None if g is None else np.split(np.asarray(g, np.float64), 3) for g in rows[1:]]
    assert all((goal is None) == (mode == "reward") for goal in goals)
    real = np.asarray(data.obs[np.arange(len(data.obs))])
    assert all((real == start).all(axis=1).any() for start in x[0].astype(np.float32))
    with jax.numpy_rank_promotion("allow"):
        for i, k in enumerate(jr.split(jr.split(key)[1], 3)[:2]):
            k_action, k_model = jr.split(k)
            g = None if goals[0] is None else goals[0][i]
            a = np.tanh(net(nets.actor, x[i], g) + normal(k_action, (5, 2)))
            mean, log_std = densities(nets.model.dynamics, x[i], a)
            k_member, k_noise = jr.split(k_model)
            member, noise = dealt(k_member, 5, algo.cfg.members), normal(k_noise, (5, 2))
            after = [mean[e, row] + np.exp(log_std[e, row]) * noise[row] for row, e in enumerate(member)]
            np.testing.assert_allclose(x[i + 1], after, rtol=1e-3, atol=1e-3)
            assert all(goal is None or np.array_equal(goal[0], goal[i + 1]) for goal in goals)


def test_without_expansion_there_is_no_memory():
    assert make("leq", "reward").replay is None
    with pytest.raises(TypeError, match="needs a batch with imagined states"):
        expanding("reward").starts(one_step(make_case("leq", "reward").batch), None)


def test_imagined_steps_terminate_by_the_rule_in_the_datas_units():
    def beyond(obs: jax.Array) -> jax.Array:
        return obs[..., 0] > 0.5

    cfg = dataclasses.replace(make("leq", "reward").cfg, termination="rule")  # pyright: ignore
    algo = LEQ(cfg, FALL_SPEC._replace(terminal=beyond))
    data = falling_window(1)
    data = eqx.tree_at(lambda w: (w.obs.center, w.obs.width), data, (jnp.full(2, 0.25), jnp.full(2, 2.0)))
    state = jax.jit(lambda key: algo.prepare(algo.init(key), data))(jr.key(0))
    nets, s = perturb(state.nets, 1), jr.normal(jr.key(2), (64, 2))
    imagine = jax.jit(lambda scale: algo.imagine(nets, s, None, jr.key(1), scale=scale))
    tau = imagine(state.target.scale)
    lives = np.cumprod(1.0 - beyond(np.asarray(tau.obs[1:]) * 2.0 + 0.25), axis=0)
    assert 0 < lives[0].mean() < 1
    np.testing.assert_array_equal(tau.alive[1:], lives[:-1])
    np.testing.assert_array_equal(tau.mask, lives)
    with pytest.raises(UserError, match="has no rule that observations tell"):
        make("leq", "reward", termination="rule")


def test_models_are_trained_beforehand_and_rest_then():
    """Their best weights imagine; the policy's rate then falls to 0 at the run's end."""
    sizes = {"pretrain": 2, "elites": 2, "actor_cosine": True, "actor_lr": 1e-2, "model_lr": 1e-2}
    algo: Any = make("leq", "reward", 4, **sizes)
    batch = make_case("leq", "reward").batch
    states = [jax.jit(algo.init)(jr.key(0))]
    for step in range(4):
        states.append(jax.jit(algo.update)(states[-1], batch, jnp.asarray(step), jr.key(step))[0])

    def moved(name: str) -> list[float]:
        nets = [jax.tree.leaves(getattr(state.nets, name)) for state in states]
        return [
            max(float(jnp.abs(x - y).max()) for x, y in zip(*pair, strict=True)) for pair in pairwise(nets)
        ]

    model, q, actor = (moved(name) for name in ("model", "q", "actor"))
    assert min(model[:2]) > 0 and not any(model[2:])
    assert not any(q[:2]) and min(q[2:]) > 0
    assert not any(actor[:2]) and actor[2] == pytest.approx(1e-2, rel=1e-3)
    assert 0 < actor[3] < 0.6 * actor[2]  # half a cosine wave of two updates: 1, 1/2


def test_rewards_of_the_dynamics_ensemble_train_too():
    algo: Any = make("leq", "reward", joint_reward=True)
    case = make_case("leq", "reward", joint_reward=True)
    assert "model/reward_loss" not in case.metrics and all(np.isfinite(x) for x in case.metrics.values())
    with pytest.raises(UserError, match="joint-reward: toy-point-goals has goals instead of rewards"):
        make("leq", "goals", joint_reward=True)
    assert algo.nets(jr.key(0)).model.reward is None


@pytest.mark.parametrize(
    ("field", "value"), [("expectile", 0.0), ("expectile", 1.0), ("lam", 1.1), ("imagined_weight", -0.1)]
)
def test_settings_out_of_range_are_refused(field: str, value: Any):
    with pytest.raises(UserError, match=f"--hp.{field.replace('_', '-')}={value}: must be in"):
        make("leq", "reward", 0, **{field: value})


def test_sizes_of_the_tests_differ_from_the_defaults():
    """Else a constant in place of a setting would go unnoticed."""
    default = LEQConfig()
    assert all(getattr(default, name) != value for name, value in SIZES["leq"].items())
