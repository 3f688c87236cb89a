"""Implicit Q-learning's values, from which several methods extract policies of different kinds.

V is an expectile of Q over the actions of the data: near 1, the value of the best of them. No action that
the data do not hold is ever valued. Source: Kostrikov et al. 2022 (IQL), arXiv 2110.06169, eq. 5 and 6.
"""

import abc
from typing import Any, ClassVar, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jaxtyping import Array, Float, Key

from mac.actor_critic import AbstractActorCritic, ActorCriticConfig, Goal, Step, one_step
from mac.nn.critics import Critics, aggregate, critic_loss, q_values, twin_critics
from mac.nn.mlp import MLP, scalar, value_net
from mac.ops.best_of_n import best_of_n
from mac.ops.losses import Losses, expectile_loss, sum_losses
from mac.ops.optimisers import adam_by_network
from mac.types import Batch, Metrics

Cfg = TypeVar("Cfg", bound="ImplicitConfig")


class ImplicitConfig(ActorCriticConfig):
    """Hyperparameters of implicit Q-learning's values."""

    expectile: float = 0.9
    """expectile of Q that V is, in (0, 1): 0.5 is the mean over the data's actions, near 1 the best one"""
    actor_decay: bool = False
    """the policy's learning rate falls as a cosine, to 0 at the end of the run"""

    NEED_STEPS: ClassVar[tuple[str, ...]] = (*ActorCriticConfig.NEED_STEPS, "actor_decay")

    def __check_init__(self):
        self._require("expectile", 0 < self.expectile < 1, "must be in (0, 1)")


class ImplicitNets(eqx.Module):
    """Values, and the method's own policy."""

    v: MLP  # s, g -> value
    q: Critics  # s, g, a -> value
    actor: Any


class AbstractImplicit(AbstractActorCritic[Cfg, ImplicitNets]):
    """Implicit Q-learning, but for the policy."""

    @abc.abstractmethod
    def actor_net(self, key: Key[Array, ""]) -> Any:
        """The policy's networks."""

    @abc.abstractmethod
    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        """The policy's losses."""

    def nets(self, key: Key[Array, ""]) -> ImplicitNets:
        k_v, k_q, k_actor = jr.split(key, 3)
        hidden, style = self.cfg.hidden, self.cfg.critic_style
        return ImplicitNets(
            v=value_net(self.inputs[:2], hidden, key=k_v, style=style),
            q=twin_critics(self.inputs, hidden, key=k_q, style=style),
            actor=self.actor_net(k_actor),
        )

    def loss(
        self, nets: ImplicitNets, target: Any, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        step = one_step(batch)
        with jax.named_scope("value"):
            target_q = aggregate(q_values(target["q"], step.obs, step.goal, step.action), "min")
            v = scalar(nets.v, step.obs, step.goal)
            losses = {"value/loss": expectile_loss(target_q - v, self.cfg.expectile)}
        with jax.named_scope("critic"):
            next_v = scalar(nets.v, step.next_obs, step.goal)
            q = q_values(nets.q, step.obs, step.goal, step.action)
            backup = step.reward + self.cfg.discount * step.mask * next_v
            losses["critic/loss"] = len(q) * critic_loss(q, backup)  # a sum over critics, not their mean
        with jax.named_scope("policy"):
            losses |= self.actor_loss(nets, target, step, key)
        return sum_losses(losses, value__v_mean=v, critic__q_mean=q)

    def best_action(
        self, critics: Critics, obs: Float[Array, "E D"], goal: Goal, actions: Float[Array, "N E A"]
    ) -> Float[Array, "E A"]:
        """The best of N actions, clipped, under the more pessimistic critic."""
        actions = jnp.clip(actions, -1, 1)
        return best_of_n(actions, aggregate(q_values(critics, obs, goal, actions), "min"))

    def optimiser(self) -> optax.GradientTransformation:
        if not self.cfg.actor_decay:
            return optax.adam(self.rate)
        return adam_by_network({"actor": optax.cosine_decay_schedule(self.cfg.lr, self.steps)}, self.rate)
