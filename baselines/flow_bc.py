"""Flow behaviour cloning: the policy that does what the data do, and so the baseline for all others.

A flow-matching policy (Lipman et al. 2023, arXiv 2210.02747) fitted to single actions, with no notion of
reward. With goals it imitates the trajectories that reach the goal: the goal-conditioned behaviour cloning
of OGBench (Park et al. 2025, arXiv 2410.20092), with a flow in place of a Gaussian.
"""

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.actor_critic import ActorCriticConfig, Goal, single_steps
from mac.algorithm import AbstractLossAlgorithm, TrainState
from mac.nn.mlp import MLP
from mac.ops.flow import euler, flow_matching_loss
from mac.ops.losses import sum_losses
from mac.types import Batch, Metrics, SampleSpec


class FlowBCConfig(ActorCriticConfig):
    """Hyperparameters of flow behaviour cloning."""

    flow_steps: int = 10
    """Euler steps of the flow policy while acting"""

    ACTING = ("flow_steps",)

    def __check_init__(self):
        self._require_positive("flow_steps")
        self._require_default("tau_ema", "critic_norm", reason="there are no critics")


class Nets(eqx.Module):
    """The policy."""

    flow: MLP  # s, g, x, time -> velocity of x


class FlowBC(AbstractLossAlgorithm[FlowBCConfig, Nets]):
    """Behaviour cloning with a flow policy; it has no critics, and predicts nothing."""

    @property
    def sample(self) -> SampleSpec:
        return single_steps(self.cfg, self.env)

    def nets(self, key: Key[Array, ""]) -> Nets:
        cfg, env = self.cfg, self.env
        inputs = (env.obs_dim, env.goal_dim, env.action_dim, 1)
        return Nets(MLP(inputs, cfg.hidden, env.action_dim, key=key, style=cfg.actor_style))

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
        return sum_losses({"policy/flow_loss": flow_loss})

    def act(self, state: TrainState, obs: Array, goal: Goal, key: Key[Array, ""]) -> Float[Array, "E 1 A"]:
        noise = jr.normal(key, (len(obs), self.env.action_dim))
        action = euler(lambda x, t: state.nets.flow(obs, goal, x, t), noise, self.cfg.flow_steps)
        return jnp.clip(action, -1, 1)[:, None]
