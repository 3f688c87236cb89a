"""ReBRAC: behaviour-regularised actor-critic, revisited (Tarasov et al. 2023, arXiv 2305.09836).

TD3 with a penalty for leaving the data, in the policy's loss and in the critics' target: in the target for
the distance between the policy's next action and the data's.

The policy learns, and all target networks follow, at every second update only. In between, two published
versions differ, and so do the weights that were tuned for them:

    OGBench (Park et al. 2025, arXiv 2502.02538), the default: Adam continues with gradients of 0, and its
    momentum moves the policy on; the policy first learns at the second update.

    D4RL (Tarasov et al. 2023): the policy and its optimiser rest; it first learns at the first update.

Where an episode ends without a next action in the data, its last one stands for it. Not as in the D4RL runs:
the policy's loss uses the critics from before the update; in the D4RL runs it uses those from after it.
"""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Bool, Float, Int, Key

from mac.actor_critic import AbstractActorCritic, ActorCriticConfig, Goal, one_step
from mac.algorithm import TrainState
from mac.nn.critics import Critics, aggregate, critic_loss, q_values, twin_critics
from mac.nn.gaussian_policy import HEAD_VARIANCE
from mac.nn.mlp import MLP
from mac.ops.losses import scale_normalised_q, sum_losses
from mac.ops.optimisers import Rate, at_some_updates, by_network, polyak
from mac.types import Batch, Metrics, SampleSpec


class ReBRACConfig(ActorCriticConfig):
    """Hyperparameters of ReBRAC."""

    alpha_actor: float = 0.1
    """weight of the policy's distance from the data, against its normalised Q"""
    alpha_critic: float = 0.0
    """penalty in the critics' target for the next action's squared distance from the data's"""
    noise: float = 0.2
    """standard deviation of the noise on the next action in the target"""
    noise_clip: float = 0.5
    """bound of that noise"""
    actor_every: int = 2
    """updates per update of the policy and of the target networks"""
    actor_coasts: bool = True
    """at other updates Adam's momentum moves the policy on, as on OGBench; else the policy rests (D4RL)"""
    actor_first: bool = False
    """the policy learns at the first of each `actor_every` updates, as on D4RL; else at the last (OGBench)"""

    def __check_init__(self):
        self._require_at_least_0("alpha_actor", "alpha_critic", "noise", "noise_clip")
        self._require_positive("actor_every")


class Nets(eqx.Module):
    """ReBRAC's networks."""

    q: Critics  # s, g, a -> value
    actor: MLP  # s, g -> a before the tanh


class ReBRAC(AbstractActorCritic[ReBRACConfig, Nets]):
    """Behaviour-regularised actor-critic."""

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        return steps._replace(next_action=True)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_actor = jr.split(key)
        cfg, (*given, action) = self.cfg, self.inputs
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=MLP(given, cfg.hidden, action, key=k_actor, style=cfg.actor_style, variance=HEAD_VARIANCE),
        )

    def target_nets(self, nets: Nets) -> Nets:
        return nets

    def loss(
        self, nets: Nets, target: Nets, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        step, cfg = one_step(batch), self.cfg
        with jax.named_scope("critic"):
            noise = cfg.noise * jr.normal(key, step.action.shape)
            noise = jnp.clip(noise, -cfg.noise_clip, cfg.noise_clip)
            next_action = jnp.clip(jnp.tanh(target.actor(step.next_obs, step.goal)) + noise, -1, 1)
            next_q = aggregate(q_values(target.q, step.next_obs, step.goal, next_action), "min")
            assert batch.next_action is not None
            next_q = next_q - cfg.alpha_critic * distance(next_action, batch.next_action)
            q = q_values(nets.q, step.obs, step.goal, step.action)
            losses = {"critic/loss": critic_loss(q, step.reward + cfg.discount * step.mask * next_q)}
        with jax.named_scope("policy"):
            action = jnp.tanh(nets.actor(step.obs, step.actor_goal))
            actor_q = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, action), "min")
            losses["policy/q_loss"] = -scale_normalised_q(actor_q)
            losses["policy/bc_loss"] = cfg.alpha_actor * jnp.mean(distance(action, step.action))
        return sum_losses(losses, critic__q_mean=q)

    @property
    def first_actor_update(self) -> int:
        """Update, from 0, in which the policy learns first."""
        return 0 if self.cfg.actor_first else self.cfg.actor_every - 1

    def updates_actor(self, step: Int[Array, ""]) -> Bool[Array, ""]:
        """Returns whether the policy learns at update number `step`, from 0."""
        return step % self.cfg.actor_every == self.first_actor_update

    def update_target(self, target: Any, online: Any, batch: Batch, step: Int[Array, ""]) -> Any:
        del batch
        moved, follows = polyak(target, online, self.cfg.tau_ema), self.updates_actor(step)
        return jax.tree.map(lambda new, old: jnp.where(follows, new, old), moved, target)

    def optimiser(self) -> optax.GradientTransformation:
        adam = optax.adam(self.actor_rate)
        actor = at_some_updates(adam, self.updates_actor, coast=self.cfg.actor_coasts)
        return by_network({"actor": actor}, optax.adam(self.rate))

    @property
    def actor_rate(self) -> Rate:
        """Learning rate of the policy: at each update that of the critics."""
        if self.cfg.actor_coasts:
            return self.rate
        return self.rate_of(self.cfg.lr, self.first_actor_update, self.cfg.actor_every)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal))


def distance(x: Float[Array, "B A"], y: Float[Array, "B A"]) -> Float[Array, " B"]:
    """Squared distance of actions."""
    return jnp.sum(jnp.square(x - y), axis=-1)
