"""n-step SAC+BC with goals (Park et al. 2025, horizon reduction, arXiv 2506.04168, section 5).

Soft actor-critic whose critics look n steps of the data ahead, and whose policy is held near the data by
the squared distance of its samples. Critics are logits of the discounted probability to reach the goal; the
target has no entropy bonus. The policy maximizes the logits, which the weight of the distance is scaled by.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import AbstractActorCritic, Goal, NStepConfig, n_step, one_step, require_goals
from mac.algorithm import TrainState
from mac.nn.critics import Critics, aggregate, q_values, twin_critics
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.losses import cross_entropy, entropy_loss, mse, sac_loss, sum_losses
from mac.ops.returns import return_of_probability
from mac.types import Batch, Metrics, SampleSpec


class NStepSACBCConfig(NStepConfig):
    """Hyperparameters of n-step SAC+BC."""

    alpha: float = 0.1
    """weight of the policy's squared distance from the data, relative to the mean size of the logits"""
    entropy: float = 0.5
    """the policy's target entropy is minus this times the number of an action's entries (SAC's own: 1)"""

    def __check_init__(self):
        self._require_at_least_0("alpha")


class Nets(eqx.Module):
    """Critics, the policy, and the logarithm of SAC's temperature α, the entropy's weight."""

    q: Critics  # s, g, a -> logit of the discounted probability to reach g
    actor: GaussianPolicy  # s, g -> distribution of a
    log_weight: Float[Array, ""]


class NStepSACBC(AbstractActorCritic[NStepSACBCConfig, Nets]):
    """Soft actor-critic over n steps, near the data."""

    def __check_init__(self):
        require_goals("nsac_bc", self.env)

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        return steps._replace(subgoals=self.cfg.subgoals)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_actor = jr.split(key)
        cfg, (*given, action) = self.cfg, self.inputs
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=GaussianPolicy(given, cfg.hidden, action, key=k_actor, style=cfg.actor_style),
            log_weight=jnp.zeros(()),
        )

    def target_nets(self, nets: Nets) -> Critics:
        return nets.q

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_next, k_now = jr.split(key)
        step, run, cfg = one_step(batch), n_step(batch, self.cfg.discount), self.cfg
        with jax.named_scope("critic"):
            noise = jr.normal(k_next, step.action.shape)
            next_action = nets.actor(run.next_obs, step.goal).at(noise)
            logits = q_values(target, run.next_obs, step.goal, next_action)
            next_prob = aggregate(jax.nn.sigmoid(logits), cfg.combine)
            backup = sg(jnp.clip(run.reached + run.bootstrap_discount * next_prob, 0, 1))
            q = q_values(nets.q, step.obs, step.goal, step.action)
            losses = {"critic/loss": cross_entropy(q, jnp.broadcast_to(backup, q.shape))}
        with jax.named_scope("policy"):
            policy = nets.actor(step.obs, step.actor_goal)
            action, log_prob = policy.sample(jr.normal(k_now, step.action.shape))
            actor_q = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, action), "mean")
            weight = jnp.exp(nets.log_weight)
            losses["policy/sac_loss"] = sac_loss(weight, log_prob, actor_q)
            scale = cfg.alpha * self.env.action_dim * sg(jnp.mean(jnp.abs(actor_q)))
            losses["policy/bc_loss"] = scale * mse(action, step.action)
            least = -cfg.entropy * self.env.action_dim
            losses["policy/entropy_loss"] = entropy_loss(weight, log_prob, least)
        return sum_losses(losses, critic__probability=jax.nn.sigmoid(q), policy__temperature=weight)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal).mean)

    def to_return(self, q: Float[Array, " E"]) -> Float[Array, " E"]:
        return return_of_probability(q, self.cfg.discount)
