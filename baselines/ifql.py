"""IFQL: implicit Q-learning with a flow policy (Park et al. 2025, FQL, arXiv 2502.02538, appendix).

IDQL with a flow in place of the diffusion: values that never look beyond the data's actions, a flow policy
that clones the data, and, while acting, the best of its samples under the critics.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.algorithm import TrainState
from mac.implicit import AbstractImplicit, ImplicitConfig, ImplicitNets
from mac.modelfree import Goal, Step
from mac.nn.mlp import MLP
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import Losses


@dataclass(frozen=True)
class IFQLConfig(ImplicitConfig):
    """Hyperparameters of IFQL."""

    candidates: int = 32
    """actions sampled per choice while acting"""
    flow_steps: int = 10
    """Euler steps of the flow policy while acting"""

    ACTING = ("candidates", "flow_steps")

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("candidates", "flow_steps")


class IFQL(AbstractImplicit):
    """Implicit Q-learning with a flow policy and a choice among its samples."""

    cfg: IFQLConfig = eqx.field(static=True)

    def actor_net(self, key: Key[Array, ""]) -> MLP:
        cfg, action = self.cfg, self.env.action_dim
        return MLP((*self.inputs, 1), cfg.hidden, action, key=key, style=cfg.actor_style)

    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        del target
        given = step.obs, step.actor_goal
        return {
            "policy/flow_loss": flow_matching_loss(lambda x, t: nets.actor(*given, x, t), step.action, key)
        }

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        noise = jr.normal(key, (self.cfg.candidates, len(obs), self.env.action_dim))
        actions = euler(lambda x, t: state.nets.actor(obs, goal, x, t), noise, self.cfg.flow_steps)
        return self.choose(state.nets.q, obs, goal, actions)
