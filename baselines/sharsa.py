"""SHARSA: horizon reduction by a hierarchy (Park et al. 2025, arXiv 2506.04168).

Two flow policies clone the data: one proposes where to be in n steps, the other acts to get there. Values
judge only proposals: Q of a goal to be at in n steps, after SARSA, so that it is the data's own proposals
that are valued. While acting, the best of many proposals is followed for one step.

V and Q are logits of the discounted chance to reach the goal.
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
from mac.model_free import (
    AbstractModelFree,
    FlowChoiceConfig,
    Goal,
    NStepConfig,
    n_step,
    one_step,
    require_goals,
)
from mac.nn.critics import Critics, aggregate, q_values, twin_critics
from mac.nn.mlp import MLP, scalar, value_net
from mac.ops.best_of_n import best_of_n
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import cross_entropy, total
from mac.ops.returns import return_of_chance
from mac.types import Batch, EnvSpec, Metrics, SampleSpec


@dataclass(frozen=True)
class SHARSAConfig(NStepConfig, FlowChoiceConfig):
    """Hyperparameters of SHARSA: those of its values over n steps and of its choice."""

    # In a dataclass the first base's fields, its inherited ones too, replace those of the second.


class Nets(eqx.Module):
    """SHARSA's networks; `w` is where to be in n steps, in a goal's terms."""

    v: MLP  # s, g -> logit of the discounted chance to reach g
    q: Critics  # s, g, w -> that, by way of w
    high: MLP  # s, g, x, time -> velocity of x, which becomes w
    low: MLP  # s, w, x, time -> velocity of x, which becomes a


class SHARSA(AbstractModelFree[Nets]):
    """SARSA over subgoals, with flow policies for subgoals and for actions."""

    cfg: SHARSAConfig = eqx.field(static=True)

    def __init__(self, cfg: SHARSAConfig, env: EnvSpec, steps: int = 0):
        """As `AbstractModelFree`; raises UserError where the environment has no goals."""
        require_goals("sharsa", env)
        super().__init__(cfg, env, steps)

    def sample_spec(self, sample: SampleSpec, cfg: Any) -> SampleSpec:
        return sample._replace(subgoals=cfg.subgoals)

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_v, k_q, k_high, k_low = jr.split(key, 4)
        cfg, (obs, goal, action) = self.cfg, self.inputs
        assert goal is not None
        critic, actor = cfg.critic_style, cfg.actor_style
        return Nets(
            v=value_net((obs, goal), cfg.hidden, key=k_v, style=critic),
            q=twin_critics((obs, goal, goal), cfg.hidden, key=k_q, style=critic),
            high=MLP((obs, goal, goal, 1), cfg.hidden, goal, key=k_high, style=actor),
            low=MLP((obs, goal, action, 1), cfg.hidden, action, key=k_low, style=actor),
        )

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_high, k_low = jr.split(key)
        step, run = one_step(batch), n_step(batch, self.cfg.discount)
        s, g, ways = step.obs, step.goal, run.subgoals
        with jax.named_scope("value"):
            chance = aggregate(jax.nn.sigmoid(q_values(target, s, g, ways.value)), self.cfg.combine)
            v = scalar(nets.v, s, g)
            losses = {"value/loss": cross_entropy(v, chance)}
        with jax.named_scope("critic"):
            after = jax.nn.sigmoid(scalar(nets.v, run.next_obs, g))
            q = q_values(nets.q, s, g, ways.value)
            backup = jnp.broadcast_to(sg(run.reached + run.carry * after), q.shape)
            losses["critic/loss"] = len(q) * cross_entropy(q, backup)
        with jax.named_scope("policy"):
            losses["policy/high_loss"] = flow_matching_loss(
                lambda x, t: nets.high(s, step.actor_goal, x, t), ways.actor, k_high
            )
            losses["policy/low_loss"] = flow_matching_loss(
                lambda x, t: nets.low(s, ways.ahead, x, t), step.action, k_low
            )
        return total(losses, value__chance=jax.nn.sigmoid(v), critic__chance=jax.nn.sigmoid(q))

    def choose(
        self, nets: Nets, obs: Array, goal: Goal, key: Key[Array, ""]
    ) -> tuple[Float[Array, "E G"], Float[Array, " E"]]:
        """The best of many proposals where to be, and the logit of the chance to reach the goal that way."""
        assert goal is not None
        noise = jr.normal(key, (self.cfg.candidates, *goal.shape))
        ways = euler(lambda x, t: nets.high(obs, goal, x, t), noise, self.cfg.flow_steps)
        logits = aggregate(q_values(nets.q, obs, goal, ways), "min")
        return best_of_n(ways, logits), jnp.max(logits, axis=0)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        k_high, k_low = jr.split(key)
        nets = state.nets
        way, _ = self.choose(nets, obs, goal, k_high)
        noise = jr.normal(k_low, (len(obs), self.env.action_dim))
        return euler(lambda x, t: nets.low(obs, way, x, t), noise, self.cfg.flow_steps)

    def predict(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, " E"]:
        _, logit = self.choose(state.nets, obs, goal, jr.split(key)[0])
        return return_of_chance(logit, self.cfg.discount)
