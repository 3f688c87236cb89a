"""Soft actor-critic, which trains our own experts.

Two critics have LayerNorm, and the minimum of both is the target. The temperature is adapted to keep the
policy's entropy at a given value. Networks are those of `mac.nn`; the loop is in `online_training.py`.

Source: Haarnoja et al. 2018, "Soft Actor-Critic Algorithms and Applications".
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.nn.critics import Critics, aggregate, q_values, twin_critics
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.optimisers import polyak
from mac.types import Metrics


class SacConfig(NamedTuple):
    """Hyperparameters.

    Attributes:
        hidden: widths of hidden layers, of all networks.
        lr: Adam's learning rate, of all parts.
        discount: factor per control step.
        tau_ema: Polyak rate of the target networks.
        entropy: target entropy of the policy, nats per entry of an action.
        temperature: initial temperature.
    """

    hidden: tuple[int, ...] = (256, 256)
    lr: float = 3e-4
    discount: float = 0.99
    tau_ema: float = 0.005
    entropy: float = -0.5
    temperature: float = 0.1


class Transitions(NamedTuple):
    """Transitions; leading axes, if any, are time and environments.

    Attributes:
        obs, next_obs: observations before and after the action, of the same episode.
        mask: 1 - termination; a time limit is no termination.
        cut: whether a time limit truncated the episode.
    """

    obs: Float[Array, "*batch D"]
    action: Float[Array, "*batch A"]
    reward: Float[Array, "*batch"]
    next_obs: Float[Array, "*batch D"]
    mask: Float[Array, "*batch"]
    cut: Any


class Learner(eqx.Module):
    """Networks and optimiser states, arrays only.

    Attributes:
        log_temperature: logarithm of the temperature, the weight of entropy.
    """

    policy: GaussianPolicy
    critics: Critics
    target: Critics
    log_temperature: Float[Array, ""]
    actor_state: optax.OptState
    critic_state: optax.OptState
    temperature_state: optax.OptState


def initial_learner(cfg: SacConfig, obs_dim: int, action_dim: int, key: Key[Array, ""]) -> Learner:
    """Returns a learner before the first update."""
    policy_key, critic_key = jr.split(key)
    policy = GaussianPolicy([obs_dim], cfg.hidden, action_dim, key=policy_key)
    critics = twin_critics([obs_dim, action_dim], cfg.hidden, key=critic_key)
    log_temperature = jnp.log(jnp.asarray(cfg.temperature))
    adam = optax.adam(cfg.lr)
    states = (adam.init(eqx.filter(x, eqx.is_array)) for x in (policy, critics, log_temperature))
    return Learner(policy, critics, jax.tree.map(jnp.copy, critics), log_temperature, *states)


def sac_critic_loss(
    critics: Critics, learner: Learner, batch: Transitions, noise: Float[Array, "B A"], discount: float
) -> tuple[Float[Array, ""], Metrics]:
    """Computes the squared error to `r + γ m (min Q'(s', a') - α log π(a'|s'))`, summed over the critics."""
    action, log_prob = learner.policy(batch.next_obs).sample(noise)
    value = aggregate(q_values(learner.target, batch.next_obs, action), "min")
    value = value - jnp.exp(learner.log_temperature) * log_prob
    target = sg(batch.reward + discount * batch.mask * value)
    values = q_values(critics, batch.obs, batch.action)
    loss = jnp.sum(jnp.mean(jnp.square(values - target[None]), axis=1))
    return loss, {"critic/loss": loss, "critic/target": jnp.mean(target)}


def actor_loss(
    policy: GaussianPolicy, learner: Learner, obs: Float[Array, "B D"], noise: Float[Array, "B A"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes `α log π(a|s) - min Q(s, a)`, and the policy's entropy."""
    action, log_prob = policy(obs).sample(noise)
    value = aggregate(q_values(learner.critics, obs, action), "min")
    loss = jnp.mean(jnp.exp(learner.log_temperature) * log_prob - value)
    return loss, -jnp.mean(log_prob)


def update_critics(
    cfg: SacConfig, learner: Learner, batch: Transitions, key: Key[Array, ""]
) -> tuple[Learner, Metrics]:
    """Updates the critics, then their target networks."""
    noise = jr.normal(key, batch.action.shape)
    grads, metrics = eqx.filter_grad(sac_critic_loss, has_aux=True)(
        learner.critics, learner, batch, noise, cfg.discount
    )
    critics, state = _descend(cfg, learner.critics, grads, learner.critic_state)
    target = polyak(learner.target, critics, cfg.tau_ema)
    new = lambda x: (x.critics, x.target, x.critic_state)  # noqa: E731
    return eqx.tree_at(new, learner, (critics, target, state)), metrics


def update_actor(
    cfg: SacConfig, learner: Learner, obs: Float[Array, "B D"], key: Key[Array, ""]
) -> tuple[Learner, Metrics]:
    """Updates the policy and its temperature."""
    width = learner.policy.mean.bias.shape[0]
    noise = jr.normal(key, (len(obs), width))
    grads, entropy = eqx.filter_grad(actor_loss, has_aux=True)(learner.policy, learner, obs, noise)
    policy, actor_state = _descend(cfg, learner.policy, grads, learner.actor_state)
    # Gradient of α (entropy - its target) by log α.
    log_temperature = learner.log_temperature
    slope = jnp.exp(log_temperature) * (entropy - cfg.entropy * width)
    log_temperature, temperature_state = _descend(cfg, log_temperature, slope, learner.temperature_state)
    new = lambda x: (x.policy, x.log_temperature, x.actor_state, x.temperature_state)  # noqa: E731
    learner = eqx.tree_at(new, learner, (policy, log_temperature, actor_state, temperature_state))
    return learner, {"actor/entropy": entropy, "actor/temperature": jnp.exp(log_temperature)}


def _descend(cfg: SacConfig, part: Any, grads: Any, state: optax.OptState) -> tuple[Any, optax.OptState]:
    """Takes one step of Adam."""
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer count
        updates, state = optax.adam(cfg.lr).update(grads, state)
    return eqx.apply_updates(part, updates), state
