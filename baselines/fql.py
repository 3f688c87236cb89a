"""FQL: flow Q-learning (Park et al. 2025, arXiv 2502.02538).

A flow policy clones the data; a one-step policy is distilled from it and maximizes Q. Only the
one-step policy acts, so that no gradient passes through the flow's many steps. Critics take the
mean of their target networks, and the policy samples while acting, too.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import AbstractActorCritic, ActorCriticConfig, Goal, one_step
from mac.algorithm import TrainState
from mac.nn.critics import Combine, Critics, aggregate, critic_loss, q_values, twin_critics
from mac.nn.mlp import MLP
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import mse, scale_normalised_q, sum_losses
from mac.types import Batch, Metrics


class FQLConfig(ActorCriticConfig):
    """Hyperparameters of FQL."""

    alpha: float = 10.0
    """weight of staying near the flow policy, against raising Q"""
    flow_steps: int = 10
    """Euler steps of the flow policy that the one-step policy imitates"""
    combine: Combine = "mean"
    """how the target aggregates the two target critics"""
    normalise_q: bool = False
    """divide Q by its mean size, so that `alpha` does not depend on the rewards' units"""

    def __check_init__(self):
        self._require_positive("flow_steps")
        self._require_at_least_0("alpha")


class Nets(eqx.Module):
    """FQL's networks."""

    q: Critics  # s, g, a -> value
    flow: MLP  # s, g, x, time -> velocity of x
    policy: MLP  # s, g, noise -> a, in one step


class FQL(AbstractActorCritic[FQLConfig, Nets]):
    """Flow Q-learning."""

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_flow, k_policy = jr.split(key, 3)
        cfg, action = self.cfg, self.env.action_dim
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            flow=MLP((*self.inputs, 1), cfg.hidden, action, key=k_flow, style=cfg.actor_style),
            policy=MLP(self.inputs, cfg.hidden, action, key=k_policy, style=cfg.actor_style),
        )

    def target_nets(self, nets: Nets) -> Critics:
        return nets.q

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_next, k_flow, k_distil = jr.split(key, 3)
        step, cfg, frozen = one_step(batch), self.cfg, self.numerics.freeze(nets)
        with jax.named_scope("critic"):
            noise = jr.normal(k_next, step.action.shape)
            next_action = jnp.clip(frozen.policy(step.next_obs, step.goal, noise), -1, 1)
            next_q = aggregate(q_values(target, step.next_obs, step.goal, next_action), cfg.combine)
            q = q_values(nets.q, step.obs, step.goal, step.action)
            losses = {"critic/loss": critic_loss(q, step.reward + cfg.discount * step.mask * next_q)}
        with jax.named_scope("policy"):
            s, g = step.obs, step.actor_goal
            losses["policy/flow_loss"] = flow_matching_loss(
                lambda x, t: nets.flow(s, g, x, t), step.action, k_flow
            )
            noise = jr.normal(k_distil, step.action.shape)
            unroll = self.numerics.unrolls()
            teacher = euler(lambda x, t: frozen.flow(s, g, x, t), noise, cfg.flow_steps, unroll=unroll)
            action = nets.policy(s, g, noise)
            losses["policy/distil_loss"] = cfg.alpha * mse(action, jnp.clip(teacher, -1, 1))
            actor_q = aggregate(q_values(sg(nets.q), s, g, jnp.clip(action, -1, 1)), "mean")
            losses["policy/q_loss"] = -(scale_normalised_q(actor_q) if cfg.normalise_q else jnp.mean(actor_q))
        return sum_losses(losses, critic__q_mean=q)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        return state.nets.policy(obs, goal, jr.normal(key, (len(obs), self.env.action_dim)))
