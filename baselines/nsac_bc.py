"""n-step SAC+BC with goals (Park et al. 2025, horizon reduction, arXiv 2506.04168, section 5).

Soft actor-critic whose critics look n steps of the data ahead, and whose policy is held near the data by
the squared distance of its samples. Critics are logits of the discounted chance to reach the goal; the
target has no entropy bonus. The policy climbs the logits, which the weight of the distance is scaled by.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.algorithm import TrainState
from mac.model_free import AbstractModelFree, Goal, NStepConfig, n_step, one_step, require_goals
from mac.nn.critics import Critics, aggregate, q_values, twin_critics
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.losses import cross_entropy, mse, total
from mac.ops.returns import return_of_chance
from mac.types import Batch, EnvSpec, Metrics, SampleSpec


@dataclass(frozen=True)
class NStepSACBCConfig(NStepConfig):
    """Hyperparameters of n-step SAC+BC."""

    alpha: float = 0.1
    """weight of the policy's squared distance from the data, relative to the mean size of the logits"""
    entropy: float = 0.5
    """entropy that the policy is held at, times minus the number of an action's entries"""

    def __post_init__(self):
        super().__post_init__()
        self._require_at_least_0("alpha")


class Nets(eqx.Module):
    """Critics, the policy, and the logarithm of the entropy's weight."""

    q: Critics  # s, g, a -> logit of the discounted chance to reach g
    actor: GaussianPolicy  # s, g -> distribution of a
    log_weight: Float[Array, ""]


class NStepSACBC(AbstractModelFree[Nets]):
    """Soft actor-critic over n steps, near the data."""

    cfg: NStepSACBCConfig = eqx.field(static=True)

    def __init__(self, cfg: NStepSACBCConfig, env: EnvSpec, steps: int = 0):
        """As `AbstractModelFree`; raises UserError where the environment has no goals."""
        require_goals("nsac_bc", env)
        super().__init__(cfg, env, steps)

    def sample_spec(self, sample: SampleSpec, cfg: Any) -> SampleSpec:
        return sample._replace(subgoals=cfg.subgoals)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_actor = jr.split(key)
        cfg, (*given, action) = self.cfg, self.inputs
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=GaussianPolicy(given, cfg.hidden, action, key=k_actor, style=cfg.actor_style),
            log_weight=jnp.zeros(()),
        )

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_next, k_now = jr.split(key)
        step, run, cfg = one_step(batch), n_step(batch, self.cfg.discount), self.cfg
        with jax.named_scope("critic"):
            noise = jr.normal(k_next, step.action.shape)
            chosen = nets.actor(run.next_obs, step.goal).at(noise)
            logits = q_values(target, run.next_obs, step.goal, chosen)
            after = aggregate(jax.nn.sigmoid(logits), cfg.combine)
            backup = sg(jnp.clip(run.reached + run.carry * after, 0, 1))
            q = q_values(nets.q, step.obs, step.goal, step.action)
            losses = {"critic/loss": cross_entropy(q, jnp.broadcast_to(backup, q.shape))}
        with jax.named_scope("policy"):
            policy = nets.actor(step.obs, step.actor_goal)
            mine, log_prob = policy.sample(jr.normal(k_now, step.action.shape))
            worth = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, mine), "mean")
            weight = jnp.exp(nets.log_weight)
            losses["policy/sac_loss"] = jnp.mean(sg(weight) * log_prob - worth)
            scale = cfg.alpha * self.env.action_dim * sg(jnp.mean(jnp.abs(worth)))
            losses["policy/bc_loss"] = scale * mse(mine, step.action)
            surplus = -jnp.mean(log_prob) + cfg.entropy * self.env.action_dim
            losses["policy/entropy_loss"] = weight * sg(surplus)
        return total(losses, critic__chance=jax.nn.sigmoid(q), policy__weight=weight)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal).mean)

    def predict(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, " E"]:
        logits = q_values(state.nets.q, obs, goal, self.action(state, obs, goal, key))
        return return_of_chance(aggregate(logits, "min"), self.cfg.discount)
