"""Models that are trained beforehand: held-out steps, best weights, patience, elites."""

import dataclasses
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.mopo import MOPO, MOPOConfig
from mac.data.sampler import sample
from mac.errors import UserError
from mac.nn.dynamics_ensemble import DynamicsEnsemble
from mac.pretraining import EPOCH, ModelRecord, fresh_record, held_out, judge
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from tests.helpers.algorithm_cases import imagined_steps, make
from tests.helpers.toy_env import FALL_SPEC, SPEC, falling_window, window

SHARE, PATIENCE = 0.3, 2
STEPS = np.random.default_rng(0).normal(size=(3, 64, 2)).astype(np.float32)
"""States, actions and next states."""


def ensemble(key: int = 0) -> DynamicsEnsemble:
    return DynamicsEnsemble(2, 2, (4,), 3, key=jr.key(key))


def errors_of(dynamics: DynamicsEnsemble, rows: np.ndarray) -> np.ndarray:
    """Each member's mean squared error on some of the steps, a member and a step at a time."""
    s, a, after = STEPS
    found = []
    for member in range(3):
        net = jax.tree.map(lambda x, member=member: x[member], dynamics.members)
        guess = [np.asarray(net(jnp.asarray(s[i]), jnp.asarray(a[i])))[:2] + s[i] for i in rows]
        found.append(np.mean([(x - after[i]) ** 2 for x, i in zip(guess, rows, strict=True)]))
    return np.asarray(found)


def end_of_epoch(record: ModelRecord, dynamics: DynamicsEnsemble) -> ModelRecord:
    s, a, after = (jnp.asarray(x) for x in STEPS)
    return judge(record, dynamics, s, a, after, jnp.asarray(EPOCH - 1), share=SHARE, patience=PATIENCE)


def test_a_step_is_held_out_in_every_batch_or_in_none():
    obs = jnp.asarray(np.random.default_rng(1).normal(size=(20_000, 3)), jnp.float32)
    held = np.asarray(held_out(obs, 0.02))
    assert held.mean() == pytest.approx(0.02, abs=0.004)
    order = np.random.default_rng(2).permutation(len(obs))
    np.testing.assert_array_equal(held_out(obs[order], 0.02), held[order])
    assert held[np.asarray(held_out(obs, 0.01))].all()  # a smaller share is a part of a larger one


def test_errors_are_those_of_held_out_steps_by_hand():
    dynamics = ensemble()
    rows = np.flatnonzero(held_out(jnp.asarray(STEPS[0]), SHARE))
    assert 5 < len(rows) < 40
    record = end_of_epoch(fresh_record(dynamics), dynamics)
    np.testing.assert_allclose(record.error, errors_of(dynamics, rows), rtol=1e-5)


def test_within_an_epoch_errors_only_add_up():
    s, a, after = (jnp.asarray(x) for x in STEPS)
    dynamics, record = ensemble(), fresh_record(ensemble())
    for step in (0, 1):
        step = jnp.asarray(step)
        record = judge(record, dynamics, s, a, after, step, share=SHARE, patience=PATIENCE)
    ended = end_of_epoch(record, dynamics)
    once = end_of_epoch(fresh_record(dynamics), dynamics)
    assert float(record.count) == 2 * int(np.sum(held_out(s, SHARE))) and float(ended.count) == 0
    np.testing.assert_allclose(ended.error, once.error, rtol=1e-5)  # a mean over three equal batches


def test_each_member_keeps_its_own_best_weights():
    """A second ensemble is better than the first in some members and worse in others."""
    first, second = ensemble(0), ensemble(3)
    rows = np.flatnonzero(held_out(jnp.asarray(STEPS[0]), SHARE))
    one, two = errors_of(first, rows), errors_of(second, rows)
    better = two < 0.99 * one
    assert better.any() and not better.all()
    record = end_of_epoch(end_of_epoch(fresh_record(first), first), second)
    np.testing.assert_allclose(record.error, np.where(better, two, one), rtol=1e-5)
    for member, source in enumerate(np.where(better, "second", "first")):
        want = second if source == "second" else first
        got, want = (jax.tree.map(lambda x: x[member], e.members) for e in (record.best, want))  # noqa: B023
        chex.assert_trees_all_equal(got, want)


def test_elites_are_the_members_with_the_least_error():
    dynamics = ensemble()
    record = end_of_epoch(fresh_record(dynamics), dynamics)
    order = np.argsort(np.asarray(record.error))
    for count in (2, 0):
        chosen = order[: count or None]
        want = jax.tree.map(lambda x: x[chosen], dynamics.members)  # noqa: B023
        chex.assert_trees_all_equal(record.elites(count).members, want)


def test_members_stop_after_epochs_without_improvement():
    dynamics, seen = ensemble(), []
    record = fresh_record(dynamics)
    for _ in range(4):
        record = end_of_epoch(record, dynamics)
        seen.append((int(record.stale), bool(record.learning)))
    assert seen == [(0, True), (1, True), (2, False), (2, False)]
    better = ensemble(3)
    chex.assert_trees_all_equal(end_of_epoch(record, better).best, record.best)


# MOPO with such models.

SIZES = {
    "pretrain": 2,
    "members": 3,
    "elites": 2,
    "rollout_starts": 8,
    "rollout_every": 2,
    "rollouts_kept": 2,
}


def test_policy_waits_for_the_models_which_then_rest():
    algo: Any = make("mopo", "reward", joint_reward=True, model_std="learned", **SIZES)
    state = jax.jit(algo.init)(jr.key(0))
    batch = batch_of(algo)
    states = [state]
    for step in range(4):
        state, _ = jax.jit(algo.update)(state, batch, jnp.asarray(step), jr.key(step))
        states.append(state)

    def same(name: str, i: int, j: int) -> bool:
        pair = (jax.tree.leaves(getattr(states[k].nets, name)) for k in (i, j))
        return all(np.array_equal(x, y) for x, y in zip(*pair, strict=True))

    assert not same("model", 0, 1) and not same("model", 1, 2) and same("model", 2, 3) and same("model", 3, 4)
    for name in ("q", "actor", "log_weight"):
        assert same(name, 0, 2) and not same(name, 2, 3) and not same(name, 3, 4), name


def batch_of(algo: Any) -> Any:
    batch = jax.jit(sample, static_argnums=1)(window(1), algo.sample, jr.key(2))
    return dataclasses.replace(batch, imagined=imagined_steps(algo))


def test_rollouts_begin_when_the_policy_does():
    assert make("mopo", "reward", **SIZES).replay.first == 2


def test_the_policy_imagines_with_the_elites():
    algo: Any = make("mopo", "reward", **SIZES)
    state = jax.jit(algo.init)(jr.key(0))
    error = jnp.asarray([3.0, 1.0, 2.0])
    target = state.target._replace(record=dataclasses.replace(state.target.record, error=error))
    dynamics = algo.trusted(state.nets, target.record).model.dynamics
    want = jax.tree.map(lambda x: x[jnp.asarray([1, 2])], target.record.best.members)
    chex.assert_trees_all_equal(dynamics.members, want)


# Termination by the environment's rule.


def beyond_a_half(obs: jax.Array) -> jax.Array:
    return obs[..., 0] > 0.5


def test_imagined_steps_terminate_by_the_rule_in_the_datas_units():
    sizes = {"rollout_starts": 64, "rollout": 3, "members": 2, "hidden": (8,), "batch": 8}
    cfg = MOPOConfig(**sizes, termination="rule", penalty=0.0)
    algo = MOPO(cfg, FALL_SPEC._replace(terminal=beyond_a_half))
    state = jax.jit(algo.init)(jr.key(0))
    data = falling_window(1)
    shift = eqx.tree_at(lambda w: (w.obs.center, w.obs.width), data, (jnp.full(2, 0.25), jnp.full(2, 2.0)))
    rows, count = jax.jit(algo.rollout)(state.without_memory(), shift, jnp.asarray(0), jr.key(1))
    real = np.asarray(rows.next_obs) * 2.0 + 0.25
    np.testing.assert_array_equal(rows.mask, 1.0 - beyond_a_half(real))
    # A rollout stops after its termination; what would have followed stands behind the valid rows.
    followed = {tuple(x) for x in np.asarray(rows.next_obs)[np.asarray(rows.mask) == 0]}
    valid = np.asarray(rows.obs)[: int(count)]
    assert 64 < int(count) < 192 and not any(tuple(x) in followed for x in valid[64:])


def test_loop_trains_where_data_record_terminations():
    """Models first, then the policy with rollouts that stop: in the loop, where seeds are mapped."""
    sizes = {
        "rollout": 2,
        "members": 2,
        "hidden": (4,),
        "batch": 8,
        "termination": "rule",
        "joint_reward": True,
    }
    algo: Any = MOPO(MOPOConfig(**SIZES | sizes), FALL_SPEC._replace(terminal=beyond_a_half))
    mesh = seed_mesh(1)
    keys = place(mesh, seed_keys(0, 1), SEED)
    data = place(mesh, falling_window(1), ALL)
    steps = place(mesh, np.arange(5, dtype=np.int32), ALL)
    state, metrics = segment(algo, mesh, data, keys, steps, init(algo, mesh, keys))
    chex.assert_tree_all_finite((state, metrics))
    count = np.asarray(state.memory.count)
    assert ((count >= 8) & (count <= 16)).all()  # rollouts of updates 2 and 4
    loss = np.asarray(metrics["model/dynamics_loss"])[:, 0]
    assert (loss[:2] != 0).all() and (loss[2:] == 0).all()


def test_a_rule_needs_an_environment_that_has_one():
    with pytest.raises(UserError, match="no rule that observations tell"):
        make("mopo", "reward", termination="rule")
    assert SPEC.terminal is None
