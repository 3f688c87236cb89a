"""IQL: implicit Q-learning (Kostrikov et al. 2022, arXiv 2110.06169).

Values that never look beyond the data's actions, and a policy that imitates the data's actions, each
weighted by its advantage. The defaults are those of the runs on OGBench's single tasks (Park et al. 2025,
FQL, arXiv 2502.02538): a Gaussian of standard deviation 1 around an unbounded mean, online critics in the
advantage. On D4RL the mean is a tanh, standard deviations are learned, target critics give the advantage, and
the policy's learning rate falls to 0 as a cosine.

Not as in the D4RL runs: networks start as all others here do, target networks are updated one step later, and
the critics' errors are added rather than averaged (which Adam does not see).
"""

from typing import Any, Literal

import equinox as eqx
import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float, Key

from mac.actor_critic import Goal, Step
from mac.algorithm import TrainState
from mac.implicit_q import AbstractImplicit, ImplicitConfig, ImplicitNets
from mac.nn.critics import aggregate, q_values
from mac.nn.gaussian_policy import HEAD_VARIANCE, normal_log_prob
from mac.nn.mlp import MLP, scalar
from mac.ops.losses import Losses, advantage_weight


class IQLConfig(ImplicitConfig):
    """Hyperparameters of IQL."""

    alpha: float = 1.0
    """how strongly the advantage of an action weighs; 0 is behaviour cloning"""
    policy: Literal["unit", "tanh"] = "unit"
    """Gaussian: of standard deviation 1; or of learned ones, the same in all states, around a tanh"""
    advantage: Literal["online", "target"] = "online"
    """critics whose values make the advantage: those that learn, or their target networks"""

    def __check_init__(self):
        self._require_at_least_0("alpha")


class Actor(eqx.Module):
    """A Gaussian policy; `log_std` is None where standard deviations are 1."""

    mean: MLP  # s, g -> mean of a
    log_std: Float[Array, " A"] | None


class IQL(AbstractImplicit[IQLConfig]):
    """Implicit Q-learning with advantage-weighted regression."""

    def actor_net(self, key: Key[Array, ""]) -> Actor:
        *given, action = self.inputs
        cfg, tanh = self.cfg, self.cfg.policy == "tanh"
        variance = 1.0 if tanh else HEAD_VARIANCE
        mean = MLP(given, cfg.hidden, action, key=key, style=cfg.actor_style, variance=variance)
        return Actor(mean, jnp.zeros(action) if tanh else None)

    def target_nets(self, nets: ImplicitNets) -> Any:
        return {"q": nets.q}

    def mean(self, actor: Actor, obs: Array, goal: Goal) -> Float[Array, "*B A"]:
        """The policy's mode."""
        mean = actor.mean(obs, goal)
        return jnp.tanh(mean) if self.cfg.policy == "tanh" else mean

    def actor_loss(self, nets: ImplicitNets, target: Any, step: Step, key: Key[Array, ""]) -> Losses:
        """Likelihood of the data's actions, weighted by how much better than V they are."""
        del key
        s, g, a = step.obs, step.actor_goal, step.action
        critics = nets.q if self.cfg.advantage == "online" else target["q"]
        advantage = aggregate(q_values(critics, s, g, a), "min") - scalar(nets.v, s, g)
        log_std = nets.actor.log_std
        log_std = None if log_std is None else jnp.clip(log_std, -20, 2)
        log_prob = normal_log_prob(a, self.mean(nets.actor, s, g), log_std)
        return {"policy/awr_loss": -jnp.mean(sg(advantage_weight(advantage, self.cfg.alpha)) * log_prob)}

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        del key
        return self.mean(state.nets.actor, obs, goal)
