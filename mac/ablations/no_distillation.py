"""MAC without distillation (Park et al. 2025, arXiv 2512.08108, table 15).

The network that makes a chunk in one step learns from the data and not from a flow of many steps. The
best it can do by the squared error of one step is the mean of the data's chunks at a state, whatever
the noise, so samples lose their variety and the choice among them its use.

The paper's text leaves open how the network learns; `one_step` has both readings.
"""

from dataclasses import dataclass
from typing import Any, Literal

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.config import Config
from mac.mac import MAC, Goal, Nets, States, integrate
from mac.ops.flow import flow_matching_loss
from mac.ops.losses import Losses, mse


@dataclass(frozen=True)
class NoDistillConfig(Config):
    """Hyperparameters of MAC, and the kind of one-step policy."""

    flow_steps: int = 1
    """Euler steps of the flow policy (one_step euler); with more it is MAC that pays for every step"""
    one_step: Literal["euler", "regression"] = "euler"
    """what makes a chunk of noise: one Euler step of the flow policy, from time 0; or a network trained to
    return the data's chunk from any noise"""

    def __post_init__(self):
        super().__post_init__()
        self._require_default("flow_steps_test", reason="what acts is what chooses in rollouts")
        if self.one_step == "regression":
            self._require_default("flow_steps", reason="--hp.one-step=regression has no flow")


class MACNoDistill(MAC):
    """MAC whose one-step policy is trained on the data alone."""

    cfg: NoDistillConfig = eqx.field(static=True)

    def policy_nets(self, sizes: tuple[int, int | None, int], key: Key[Array, ""]) -> tuple[Any, Any]:
        flow, policy = super().policy_nets(sizes, key)
        return (flow, None) if self.cfg.one_step == "euler" else (None, policy)

    def behavior_loss(self, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]) -> Losses:
        if nets.flow is not None:
            return {"policy/flow_loss": flow_matching_loss(lambda x, t: nets.flow(s, g, x, t), a, key)}
        return {"policy/regression_loss": mse(nets.policy(s, g, jr.normal(key, a.shape)), a)}

    def sample_chunks(
        self, nets: Nets, s: States, g: Goal, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Float[Array, "n B A"]:
        if nets.flow is None:
            return super().sample_chunks(nets, s, g, key, n, acting=acting)
        noise = jr.normal(key, (n, len(s), self.cfg.chunk * self.env.action_dim))
        return integrate(nets.flow, s, g, noise, self.cfg.flow_steps)
