"""MAC without distillation (Park et al. 2025, arXiv 2512.08108, table 15).

The network that makes a chunk in one step learns from the data and not from a flow of many steps. The
best it can do by the squared error of one step is the mean of the data's chunks at a state, whatever
the noise, so samples lose their variety and best-of-N its use.

The paper's text leaves open how the network learns; `one_step` has both readings.
"""

from typing import Any, Literal

import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.config import Config
from mac.mac import MAC, AbstractChunkPolicy, Goal, Nets, States, flow_and_student, integrate_flow
from mac.nn.mlp import MLP
from mac.ops.flow import flow_matching_loss
from mac.ops.losses import Losses, mse
from mac.types import EnvSpec


class NoDistillConfig(Config):
    """Hyperparameters of MAC, and the kind of one-step policy."""

    flow_steps: int = 1
    """Euler steps of the flow policy (one_step euler); with more it is MAC that pays for every step"""
    one_step: Literal["euler", "regression"] = "euler"
    """what makes a chunk of noise: one Euler step of the flow policy, from time 0; or a network trained to
    return the data's chunk from any noise"""

    def __check_init__(self):
        self._require_default("flow_steps_test", reason="what acts is what chooses in rollouts")
        if self.one_step == "regression":
            self._require_default("flow_steps", reason="--hp.one-step=regression has no flow")


class UndistilledFlow(AbstractChunkPolicy[NoDistillConfig]):
    """A flow that clones the data's chunks, followed in few Euler steps; there is no `policy` network."""

    def nets(
        self, cfg: NoDistillConfig, sizes: tuple[int, int | None, int], key: Key[Array, ""]
    ) -> tuple[MLP, Any]:
        flow, _ = flow_and_student(cfg, sizes, key)
        return flow, None

    def behavior_loss(
        self, cfg: NoDistillConfig, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]
    ) -> Losses:
        del cfg
        return {"policy/flow_loss": flow_matching_loss(lambda x, t: nets.flow(s, g, x, t), a, key)}

    def chunks(
        self,
        cfg: NoDistillConfig,
        nets: Nets,
        s: States,
        g: Goal,
        noise: Float[Array, "n B A"],
        *,
        acting: bool,
    ) -> Float[Array, "n B A"]:
        del acting
        return integrate_flow(nets.flow, s, g, noise, cfg.flow_steps)


class RegressedChunks(AbstractChunkPolicy[NoDistillConfig]):
    """A network that returns the data's chunk from any noise, `policy`; there is no flow."""

    def nets(
        self, cfg: NoDistillConfig, sizes: tuple[int, int | None, int], key: Key[Array, ""]
    ) -> tuple[Any, MLP]:
        _, policy = flow_and_student(cfg, sizes, key)
        return None, policy

    def behavior_loss(
        self, cfg: NoDistillConfig, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]
    ) -> Losses:
        del cfg
        return {"policy/regression_loss": mse(nets.policy(s, g, jr.normal(key, a.shape)), a)}

    def chunks(
        self,
        cfg: NoDistillConfig,
        nets: Nets,
        s: States,
        g: Goal,
        noise: Float[Array, "n B A"],
        *,
        acting: bool,
    ) -> Float[Array, "n B A"]:
        del cfg, acting
        return nets.policy(s, g, noise)


def mac_nodistill(cfg: NoDistillConfig, env: EnvSpec, steps: int = 0) -> MAC:
    """MAC with a one-step policy trained on the data alone; the arguments are those of `MAC`."""
    return MAC(cfg, env, steps, UndistilledFlow() if cfg.one_step == "euler" else RegressedChunks())
