"""SAC's losses and updates, compared with NumPy."""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from scipy.stats import norm

from experiments.expert_training.sac import (
    Learner,
    SacConfig,
    Transitions,
    actor_loss,
    initial_learner,
    sac_critic_loss,
    update_actor,
    update_critics,
)

CFG = SacConfig(hidden=(8, 8), lr=1e-2, discount=0.9, entropy=-0.5, temperature=0.3)
OBS, ACTION, BATCH = 3, 2, 5


@pytest.fixture(scope="module")
def learner() -> Learner:
    """Networks whose target critics differ from the critics."""
    made = initial_learner(CFG, OBS, ACTION, jr.key(0))
    other = initial_learner(CFG, OBS, ACTION, jr.key(1)).critics
    return eqx.tree_at(lambda x: x.target, made, other)


@pytest.fixture(scope="module")
def batch() -> Transitions:
    keys = jr.split(jr.key(2), 5)
    obs, next_obs = (jr.normal(key, (BATCH, OBS)) for key in keys[:2])
    action = jr.uniform(keys[2], (BATCH, ACTION), minval=-0.9, maxval=0.9)
    mask = jnp.asarray([1.0, 1.0, 0.0, 1.0, 0.0])
    return Transitions(obs, action, jr.normal(keys[3], (BATCH,)), next_obs, mask, mask == 1)


def drawn(learner: Learner, obs: jax.Array, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Action and its log density, by the change of variables a = tanh(x)."""
    mean, log_std = (np.asarray(x, np.float64) for x in learner.policy(obs))
    x = mean + np.exp(log_std) * noise
    density = norm.logpdf(x, mean, np.exp(log_std)) - np.log(1 - np.tanh(x) ** 2)
    return np.tanh(x).astype(np.float32), density.sum(axis=1)


def values(critics: tuple, obs: jax.Array, action: np.ndarray) -> np.ndarray:
    return np.stack([np.asarray(q(obs, jnp.asarray(action)))[:, 0] for q in critics]).astype(np.float64)


def test_critic_loss_is_the_squared_error_to_the_soft_target(learner: Learner, batch: Transitions) -> None:
    noise = np.random.default_rng(0).normal(size=(BATCH, ACTION)).astype(np.float32)
    action, density = drawn(learner, batch.next_obs, noise)
    future = values(learner.target, batch.next_obs, action).min(axis=0) - 0.3 * density
    target = np.asarray(batch.reward) + 0.9 * np.asarray(batch.mask) * future
    error = values(learner.critics, batch.obs, np.asarray(batch.action)) - target
    loss, metrics = sac_critic_loss(learner.critics, learner, batch, jnp.asarray(noise), 0.9)
    np.testing.assert_allclose(float(loss), (error**2).mean(axis=1).sum(), rtol=1e-4)
    np.testing.assert_allclose(float(metrics["critic/target"]), target.mean(), rtol=1e-4)


def test_actor_loss_is_the_soft_value(learner: Learner, batch: Transitions) -> None:
    noise = np.random.default_rng(1).normal(size=(BATCH, ACTION)).astype(np.float32)
    action, density = drawn(learner, batch.obs, noise)
    expected = (0.3 * density - values(learner.critics, batch.obs, action).min(axis=0)).mean()
    loss, entropy = actor_loss(learner.policy, learner, batch.obs, jnp.asarray(noise))
    np.testing.assert_allclose(float(loss), expected, rtol=1e-4)
    np.testing.assert_allclose(float(entropy), -density.mean(), rtol=1e-4)


def test_critics_learn_and_targets_follow_slowly(learner: Learner, batch: Transitions) -> None:
    new, _ = update_critics(CFG, learner, batch, jr.key(3))
    for target, old, online in zip(
        *map(jax.tree.leaves, (new.target, learner.target, new.critics)), strict=True
    ):
        np.testing.assert_allclose(target, 0.995 * old + 0.005 * online, atol=1e-6)
    moved = [
        np.abs(np.asarray(a - b)).max()
        for a, b in zip(jax.tree.leaves(new.critics), jax.tree.leaves(learner.critics), strict=True)
    ]
    assert max(moved) == pytest.approx(CFG.lr, rel=1e-3)  # Adam's first step
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(new.policy), jax.tree.leaves(learner.policy), strict=True)
    )


@pytest.mark.parametrize(("target", "rises"), [(-50.0, False), (50.0, True)])
def test_temperature_rises_while_entropy_is_too_low(
    learner: Learner, batch: Transitions, target: float, rises: bool
) -> None:
    new, metrics = update_actor(CFG._replace(entropy=target), learner, batch.obs, jr.key(4))
    assert (float(metrics["actor/temperature"]) > 0.3) == rises
    np.testing.assert_allclose(abs(float(new.log_temperature - learner.log_temperature)), CFG.lr, rtol=1e-3)
    assert all(
        (a == b).all()
        for a, b in zip(jax.tree.leaves(new.critics), jax.tree.leaves(learner.critics), strict=True)
    )
