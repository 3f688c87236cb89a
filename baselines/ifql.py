"""IFQL: implicit Q-learning with a flow policy (Park et al. 2025, FQL, arXiv 2502.02538, appendix).

IDQL with a flow in place of the diffusion:

    V      an expectile of the lesser target Q(s, a), over the data's actions
    Q      r + γ m V(s'), of two critics
    flow   velocity along straight paths from noise to the data's actions
    act    the best of N actions of the flow, under the lesser Q

Best-of-N uses the online critics, not their target networks. The policy's loss does not depend on the values,
so reward enters by best-of-N alone; and training values no action outside the data. With goals, the flow
clones the trajectories that reach the goal, and values are those of GCIQL.
"""

from typing import Any

import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.actor_critic import FlowChoiceConfig, Goal, Step
from mac.algorithm import TrainState
from mac.implicit_q import AbstractImplicit, ImplicitConfig, ImplicitNets
from mac.nn.mlp import MLP
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import Losses


class IFQLConfig(FlowChoiceConfig, ImplicitConfig):
    """Hyperparameters of IFQL: those of its values and of best-of-N."""


class IFQL(AbstractImplicit[IFQLConfig]):
    """Implicit Q-learning with a flow policy and best-of-N among its samples."""

    def actor_net(self, key: Key[Array, ""]) -> MLP:
        cfg, action = self.cfg, self.env.action_dim
        return MLP((*self.inputs, 1), cfg.hidden, action, key=key, style=cfg.actor_style)

    def target_nets(self, nets: ImplicitNets) -> Any:
        return {"q": nets.q}

    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        del target
        given = step.obs, step.actor_goal
        return {
            "policy/flow_loss": flow_matching_loss(lambda x, t: nets.actor(*given, x, t), step.action, key)
        }

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        noise = jr.normal(key, (self.cfg.candidates, len(obs), self.env.action_dim))
        actions = euler(lambda x, t: state.nets.actor(obs, goal, x, t), noise, self.cfg.flow_steps)
        return self.best_action(state.nets.q, obs, goal, actions)
