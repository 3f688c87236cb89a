"""GCIQL: goal-conditioned implicit Q-learning, with the policy of DDPG+BC (Park et al. 2025, OGBench, arXiv
2410.20092; as in Park et al. 2025, horizon reduction, arXiv 2506.04168).

Goal-conditioned IQL values, whose reward is -1 until the state of the data is the goal's; and a Gaussian
policy of standard deviation 1 that maximizes the normalised Q at its mean and stays likely to do what the
data do. It runs without goals, too.
"""

from typing import Any

import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import Goal, Step
from mac.algorithm import TrainState
from mac.implicit_q import AbstractImplicit, ImplicitConfig, ImplicitNets
from mac.nn.critics import aggregate, q_values
from mac.nn.gaussian_policy import HEAD_VARIANCE, normal_log_prob
from mac.nn.mlp import MLP
from mac.ops.losses import Losses, scale_normalised_q


class GCIQLConfig(ImplicitConfig):
    """Hyperparameters of GCIQL."""

    discount: float = 0.999
    """discount factor γ per environment step, in (0, 1)"""
    actor_norm: bool = True
    """LayerNorm after the activations of policies"""
    alpha: float = 1.0
    """weight of the data's likelihood, against the normalised Q"""

    def __check_init__(self):
        self._require_at_least_0("alpha")


class GCIQL(AbstractImplicit[GCIQLConfig]):
    """Implicit Q-learning with a policy by DDPG+BC."""

    def actor_net(self, key: Key[Array, ""]) -> MLP:
        *given, action = self.inputs
        cfg = self.cfg
        return MLP(given, cfg.hidden, action, key=key, style=cfg.actor_style, variance=HEAD_VARIANCE)

    def target_nets(self, nets: ImplicitNets) -> Any:
        return {"q": nets.q}

    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        del target, key
        mean = nets.actor(step.obs, step.actor_goal)
        q = aggregate(q_values(sg(nets.q), step.obs, step.actor_goal, jnp.clip(mean, -1, 1)), "min")
        bc_loss = -self.cfg.alpha * jnp.mean(normal_log_prob(step.action, mean))
        return {"policy/q_loss": -scale_normalised_q(q), "policy/bc_loss": bc_loss}

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return state.nets.actor(obs, goal)
