"""Flow behaviour cloning: the policy that does what the data do, and so the yardstick for all others.

A flow-matching policy (Lipman et al. 2023, arXiv 2210.02747) fitted to single actions, with no notion of
reward. With goals it is told one, and imitates those who went there: the goal-conditioned behaviour
cloning of OGBench (Park et al. 2025, arXiv 2410.20092), with a flow in place of a Gaussian.
"""

from dataclasses import dataclass

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.algorithm import TrainState
from mac.model_free import AbstractModelFree, Goal, ModelFreeConfig
from mac.nn.mlp import MLP
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import total
from mac.types import Batch, Metrics


@dataclass(frozen=True)
class FlowBCConfig(ModelFreeConfig):
    """Hyperparameters of flow behaviour cloning."""

    flow_steps: int = 10
    """Euler steps of the flow policy while acting"""

    ACTING = ("flow_steps",)

    def __post_init__(self):
        super().__post_init__()
        self._require_positive("flow_steps")


class Nets(eqx.Module):
    """The policy."""

    flow: MLP  # s, g, x, time -> velocity of x


class FlowBC(AbstractModelFree[Nets]):
    """Behaviour cloning with a flow policy."""

    cfg: FlowBCConfig = eqx.field(static=True)

    def nets(self, key: Key[Array, ""]) -> Nets:
        cfg, action = self.cfg, self.env.action_dim
        return Nets(MLP((*self.inputs, 1), cfg.hidden, action, key=key, style=cfg.actor_style))

    def target_nets(self, nets: Nets) -> tuple[()]:
        del nets
        return ()

    def loss(
        self, nets: Nets, target: tuple[()], batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target
        goal = batch.goals and batch.goals.actor
        flow_loss = flow_matching_loss(
            lambda x, t: nets.flow(batch.obs, goal, x, t), batch.actions[:, 0], key
        )
        return total({"policy/flow_loss": flow_loss})

    @property
    def step_discount(self) -> None:
        """None: it has no critics, and predicts nothing."""

    def action(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E A"]:
        noise = jr.normal(key, (len(obs), self.env.action_dim))
        return euler(lambda x, t: state.nets.flow(obs, goal, x, t), noise, self.cfg.flow_steps)
