"""CQL: conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779).

Soft actor-critic whose critics are pushed down where actions are sampled, by importance-weighted samples of
the policy and of the uniform distribution, and up where the data are. The settings are those of the
well-tuned runs on D4RL (Tarasov et al. 2022, CORL, arXiv 2210.07105): 10 actions of each kind, samples of
the policy at the next state judged in this one, densities without gradients, and no entropy in the target.

Not as in those runs: networks start as all others here do, and target networks are updated one step later.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import AbstractActorCritic, ActorCriticConfig, Goal, Step, one_step
from mac.algorithm import TrainState
from mac.nn.critics import Critics, aggregate, critic_loss, q_values, twin_critics
from mac.nn.gaussian_policy import GaussianPolicy
from mac.nn.mlp import Activation
from mac.ops.losses import entropy_loss, sac_loss, sum_losses
from mac.ops.optimisers import adam_by_network
from mac.types import Batch, Metrics


class CQLConfig(ActorCriticConfig):
    """Hyperparameters of CQL."""

    hidden: tuple[int, ...] = (256, 256, 256)
    """width of each hidden layer, of every network"""
    activation: Activation = "relu"
    """what follows each hidden layer's matmul"""
    critic_norm: bool = False
    """LayerNorm after the activations of values and critics"""
    actor_lr: float = 3e-5
    """learning rate of the policy and of the entropy's weight"""
    alpha: float = 10.0
    """weight of the conservative term"""
    samples: int = 10
    """actions of each of three kinds in that term"""

    def __check_init__(self):
        self._require_at_least_0("alpha", "actor_lr")
        self._require_positive("samples")


class Nets(eqx.Module):
    """Critics, the policy, and the logarithm of the entropy's weight."""

    q: Critics  # s, g, a -> value
    actor: GaussianPolicy  # s, g -> distribution of a
    log_weight: Float[Array, ""]


class CQL(AbstractActorCritic[CQLConfig, Nets]):
    """Conservative Q-learning."""

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_actor = jr.split(key)
        cfg, (*given, action) = self.cfg, self.inputs
        actor = GaussianPolicy(given, cfg.hidden, action, key=k_actor, style=cfg.actor_style)
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=eqx.tree_at(
                lambda p: p.log_std.bias, actor, -jnp.ones(action)
            ),  # standard deviations of 1/e
            log_weight=jnp.zeros(()),
        )

    def target_nets(self, nets: Nets) -> Critics:
        return nets.q

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_next, k_now, k_low = jr.split(key, 3)
        step, cfg, shape = one_step(batch), self.cfg, batch.actions[:, 0].shape
        with jax.named_scope("critic"):
            next_action = nets.actor(step.next_obs, step.goal).at(jr.normal(k_next, shape))
            next_q = aggregate(q_values(target, step.next_obs, step.goal, next_action), "min")
            q = q_values(nets.q, step.obs, step.goal, step.action)
            td_loss = critic_loss(q, step.reward + cfg.discount * step.mask * next_q)
            gap = self.sampled_q(nets, step, k_low) - q
            losses = {"critic/loss": len(q) * td_loss, "critic/gap_loss": len(q) * cfg.alpha * jnp.mean(gap)}
        with jax.named_scope("policy"):
            policy = nets.actor(step.obs, step.actor_goal)
            action, log_prob = policy.sample(jr.normal(k_now, shape))
            actor_q = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, action), "min")
            losses["policy/sac_loss"] = sac_loss(jnp.exp(nets.log_weight), log_prob, actor_q)
            losses["policy/entropy_loss"] = entropy_loss(nets.log_weight, log_prob, -float(shape[-1]))
        return sum_losses(losses, critic__q_mean=q, policy__temperature=jnp.exp(nets.log_weight))

    def sampled_q(self, nets: Nets, step: Step, key: Key[Array, ""]) -> Float[Array, "E B"]:
        """Logarithm of the sum of exp Q over sampled actions, each divided by its density."""
        k_uniform, k_now, k_next = jr.split(key, 3)
        shape = (self.cfg.samples, *step.action.shape)
        uniform = jr.uniform(k_uniform, shape, minval=-1, maxval=1)
        now, now_log_prob = nets.actor(step.obs, step.goal).sample(jr.normal(k_now, shape))
        following, next_log_prob = nets.actor(step.next_obs, step.goal).sample(jr.normal(k_next, shape))
        uniform_log_prob = jnp.full(shape[:-1], -shape[-1] * jnp.log(2.0))
        actions = sg(jnp.concatenate([uniform, following, now]))
        log_prob = sg(jnp.concatenate([uniform_log_prob, next_log_prob, now_log_prob]))
        q = q_values(nets.q, step.obs, step.goal, actions)
        return jax.nn.logsumexp(q - jnp.broadcast_to(log_prob, q.shape), axis=1)

    def optimiser(self) -> optax.GradientTransformation:
        actor = self.rate_of(self.cfg.actor_lr)
        return adam_by_network({name: actor for name in ("actor", "log_weight")}, self.rate)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal).mean)
