"""ReBRAC: behaviour-regularised actor-critic, revisited (Tarasov et al. 2023, arXiv 2305.09836).

TD3 with a penalty for leaving the data, in the policy's loss and in the critics' target: there for the
distance between the policy's next action and the data's.

The policy and all slow copies move at every second update only. Between its turns the policy rests
altogether; in the runs on OGBench (Park et al. 2025, arXiv 2502.02538) Adam's momentum moves it on. Where an
episode ends without a next action in the data, its last one stands for it.
"""

from dataclasses import dataclass, replace
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import TrainState, adam_by_network
from mac.modelfree import AbstractModelFree, Goal, ModelFreeConfig, one_step
from mac.nn.critics import Critics, combined, critic_loss, scores, twin_critics
from mac.nn.heads import HEAD_VARIANCE
from mac.nn.mlp import MLP
from mac.ops.losses import normalised, total
from mac.types import Batch, Metrics, SampleSpec


@dataclass(frozen=True)
class ReBRACConfig(ModelFreeConfig):
    """Hyperparameters of ReBRAC."""

    alpha_actor: float = 0.1
    """weight of the policy's distance from the data, against its normalised Q"""
    alpha_critic: float = 0.0
    """penalty in the critics' target for the next action's squared distance from the data's"""
    noise: float = 0.2
    """deviation of the noise on the next action in the target"""
    noise_clip: float = 0.5
    """bound of that noise"""
    actor_every: int = 2
    """updates per turn of the policy and of the slow copies"""

    def __post_init__(self):
        super().__post_init__()
        self._require_at_least_0("alpha_actor", "alpha_critic", "noise", "noise_clip")
        self._require_positive("actor_every")


class Nets(eqx.Module):
    """ReBRAC's networks."""

    q: Critics  # s, g, a -> value
    actor: MLP  # s, g -> a before the tanh


class ReBRAC(AbstractModelFree[Nets]):
    """Behaviour-regularised actor-critic."""

    cfg: ReBRACConfig = eqx.field(static=True)

    def wish(self, sample: SampleSpec, cfg: Any) -> SampleSpec:
        return sample._replace(next_action=True)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_q, k_actor = jr.split(key)
        cfg, (*given, action) = self.cfg, self.inputs
        style, share = cfg.actor_style, HEAD_VARIANCE
        return Nets(
            q=twin_critics(self.inputs, cfg.hidden, key=k_q, style=cfg.critic_style),
            actor=MLP(given, cfg.hidden, action, key=k_actor, style=style, variance=share),
        )

    def targeted(self, nets: Nets) -> Nets:
        return nets

    def loss(
        self, nets: Nets, target: Nets, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        step, cfg = one_step(batch), self.cfg
        with jax.named_scope("critic"):
            noise = cfg.noise * jr.normal(key, step.action.shape)
            noise = jnp.clip(noise, -cfg.noise_clip, cfg.noise_clip)
            chosen = jnp.clip(jnp.tanh(target.actor(step.next_obs, step.goal)) + noise, -1, 1)
            after = combined(scores(target.q, step.next_obs, step.goal, chosen), "min")
            assert batch.next_action is not None
            after = after - cfg.alpha_critic * distance(chosen, batch.next_action)
            q = scores(nets.q, step.obs, step.goal, step.action)
            losses = {"critic/loss": critic_loss(q, step.reward + cfg.discount * step.mask * after)}
        with jax.named_scope("policy"):
            mine = jnp.tanh(nets.actor(step.obs, step.actor_goal))
            worth = combined(scores(sg(nets.q), step.obs, step.actor_goal, mine), "min")
            losses["policy/q_loss"] = -normalised(worth)
            losses["policy/bc_loss"] = cfg.alpha_actor * jnp.mean(distance(mine, step.action))
        return total(losses, critic__q_mean=q)

    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        after, metrics = super().update(state, batch, step, key)
        turn = step % self.cfg.actor_every == 0

        def now_and_then(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jnp.where(turn, n, o), new, old)

        adam, before = after.opt_state.inner_states, state.opt_state.inner_states
        adam = adam | {"actor": now_and_then(adam["actor"], before["actor"])}
        actor = now_and_then(after.nets.actor, state.nets.actor)
        return TrainState(
            nets=replace(after.nets, actor=actor),
            target=now_and_then(after.target, state.target),
            opt_state=after.opt_state._replace(inner_states=adam),
        ), metrics

    def optimiser(self) -> optax.GradientTransformation:
        return adam_by_network({"actor": self.rate}, self.rate)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return jnp.tanh(state.nets.actor(obs, goal))


def distance(x: Float[Array, "B A"], y: Float[Array, "B A"]) -> Float[Array, " B"]:
    """Squared distance of actions."""
    return jnp.sum(jnp.square(x - y), axis=-1)
