"""SHARSA: horizon reduction by a hierarchy (Park et al. 2025, arXiv 2506.04168).

Two flow policies clone the data: one proposes subgoals n steps ahead, the other acts to reach them. Critics
value subgoals only: Q of a subgoal n steps ahead, after SARSA, so that it is the data's own subgoals that are
valued. While acting, the best of many sampled subgoals is followed for one step.

V and Q are logits of the discounted probability to reach the goal.
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import (
    AbstractActorCritic,
    FlowChoiceConfig,
    Goal,
    NStepConfig,
    n_step,
    one_step,
    require_goals,
)
from mac.algorithm import TrainState
from mac.nn.critics import Critics, aggregate, q_values, twin_critics
from mac.nn.mlp import MLP, scalar, value_net
from mac.ops.best_of_n import best_of_n
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import cross_entropy, sum_losses
from mac.ops.returns import return_of_probability
from mac.types import Batch, Metrics, SampleSpec


class SHARSAConfig(NStepConfig, FlowChoiceConfig):
    """Hyperparameters of SHARSA: those of its values over n steps and of best-of-N."""

    # In a dataclass the first base's fields, its inherited ones too, replace those of the second.


class Nets(eqx.Module):
    """SHARSA's networks; `w` is a subgoal n steps ahead, in a goal's coordinates."""

    v: MLP  # s, g -> logit of the discounted probability to reach g
    q: Critics  # s, g, w -> that logit, through w
    high: MLP  # s, g, x, time -> velocity of x, which becomes w
    low: MLP  # s, w, x, time -> velocity of x, which becomes a


class SHARSA(AbstractActorCritic[SHARSAConfig, Nets]):
    """SARSA over subgoals, with flow policies for subgoals and for actions."""

    def __check_init__(self):
        require_goals("sharsa", self.env)

    def sample_spec(self, steps: SampleSpec) -> SampleSpec:
        return steps._replace(subgoals=self.cfg.subgoals)

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

    def target_nets(self, nets: Nets) -> Critics:
        return nets.q

    def loss(
        self, nets: Nets, target: Critics, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        k_high, k_low = jr.split(key)
        step, run = one_step(batch), n_step(batch, self.cfg.discount)
        s, g, subgoals = step.obs, step.goal, run.subgoals
        with jax.named_scope("value"):
            reach_prob = aggregate(jax.nn.sigmoid(q_values(target, s, g, subgoals.value)), self.cfg.combine)
            v = scalar(nets.v, s, g)
            losses = {"value/loss": cross_entropy(v, reach_prob)}
        with jax.named_scope("critic"):
            next_prob = jax.nn.sigmoid(scalar(nets.v, run.next_obs, g))
            q = q_values(nets.q, s, g, subgoals.value)
            backup = jnp.broadcast_to(sg(run.reached + run.bootstrap_discount * next_prob), q.shape)
            losses["critic/loss"] = len(q) * cross_entropy(q, backup)
        with jax.named_scope("policy"):
            losses["policy/high_loss"] = flow_matching_loss(
                lambda x, t: nets.high(s, step.actor_goal, x, t), subgoals.actor, k_high
            )
            losses["policy/low_loss"] = flow_matching_loss(
                lambda x, t: nets.low(s, subgoals.ahead, x, t), step.action, k_low
            )
        return sum_losses(losses, value__probability=jax.nn.sigmoid(v), critic__probability=jax.nn.sigmoid(q))

    def best_subgoal(
        self, nets: Nets, obs: Array, goal: Goal, key: Key[Array, ""]
    ) -> tuple[Float[Array, "E G"], Float[Array, " E"]]:
        """Returns the best of N sampled subgoals, and the logit of reaching the goal through it."""
        assert goal is not None
        noise = jr.normal(key, (self.cfg.candidates, *goal.shape))
        subgoals = euler(lambda x, t: nets.high(obs, goal, x, t), noise, self.cfg.flow_steps)
        logits = aggregate(q_values(nets.q, obs, goal, subgoals), "min")
        return best_of_n(subgoals, logits), jnp.max(logits, axis=0)

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        k_high, k_low = jr.split(key)
        nets = state.nets
        subgoal, _ = self.best_subgoal(nets, obs, goal, k_high)
        noise = jr.normal(k_low, (len(obs), self.env.action_dim))
        return euler(lambda x, t: nets.low(obs, subgoal, x, t), noise, self.cfg.flow_steps)

    def policy_q(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, " E"]:
        _, logit = self.best_subgoal(state.nets, obs, goal, jr.split(key)[0])
        return logit

    def to_return(self, q: Float[Array, " E"]) -> Float[Array, " E"]:
        return return_of_probability(q, self.cfg.discount)
