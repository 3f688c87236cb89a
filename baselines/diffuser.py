"""Diffuser: planning as denoising of whole trajectories (Janner et al. 2022, arXiv 2205.09991), with goals.

A temporal U-Net denoises windows of the data, [action, observation] at each of H steps, whose first and last
state are known. To act, a plan is sampled from the current state to the goal by inpainting: start and goal
are put back after every denoising step. Its first actions are executed open loop, then a new plan is made.
There are no rewards and no values.

What the published runs leave open for these tasks is an option or stated in docs/algorithms.md: generated
actions are executed (the published mazes follow generated positions with a controller); only the goal's
columns of the last state are inpainted; windows beyond an episode's end rest in its final state; the goal is
at the end of every new plan (`goal_at`).
"""

import equinox as eqx
from jaxtyping import Array, Float, Int, Key

from mac.actor_critic import require_goals
from mac.algorithm import TrainState
from mac.nn.temporal_unet import TemporalUNet
from mac.ops.losses import sum_losses
from mac.planning.diffusion import (
    AbstractPlanner,
    Plan,
    PlannerConfig,
    TrajectoryDiffusion,
)
from mac.types import Batch, Metrics


class DiffuserConfig(PlannerConfig):
    """Hyperparameters of Diffuser; the defaults are those of its maze of medium size."""

    def __check_init__(self):
        self._require("execute", self.execute <= self.tokens, f"a plan has {self.tokens} actions; take fewer")

    @property
    def tokens(self) -> int:
        """Tokens of a plan."""
        return self.divisible(self.horizon)


class Nets(eqx.Module):
    """Diffuser's network."""

    planner: TemporalUNet


class Diffuser(AbstractPlanner[DiffuserConfig, Nets]):
    """One diffusion of the steps of a plan."""

    def __check_init__(self):
        require_goals("diffuser", self.env)

    @property
    def steps_of_a_window(self) -> int:
        return self.cfg.tokens

    @property
    def diffusion(self) -> TrajectoryDiffusion:
        """The diffusion of plans."""
        cfg, env = self.cfg, self.env
        return TrajectoryDiffusion(
            cfg.tokens, env.action_dim, env.obs_dim, env.goal_columns,
            cfg.diffusion_steps, cfg.predict, cfg.action_weight,
        )  # fmt: skip

    def nets(self, key: Key[Array, ""]) -> Nets:
        return Nets(self.diffusion.net(self.cfg.hidden, key))

    def loss(
        self, nets: Nets, target: Nets, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target
        return sum_losses(
            {"planner/diffusion_loss": self.diffusion.loss(nets.planner, batch.actions, batch.chunk_obs, key)}
        )

    def plan(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"],
        key: Key[Array, ""],
        elapsed: Int[Array, " E"] | None = None,
    ) -> Plan:
        arrival = self.arrival(elapsed, self.cfg.tokens)
        return Plan(*self.diffusion.sample(state.target.planner, obs, goal, key, arrival))
