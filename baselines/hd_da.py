"""HD-DA: hierarchical planning by diffusion with dense actions (Chen et al. 2024, arXiv 2401.02644).

Two diffusions as in Diffuser, trained side by side. The high level denoises every K-th state of a window
with the K actions that follow it, from the current state to the goal. The low level denoises the K + 1 states
from one of these states to the next, with their actions, given both. To act, a high-level plan is sampled,
then all its segments that will be executed, in one batch; their actions are executed open loop.

Low-level windows are the first K + 1 states of the drawn ones, so their starts are uniform over the data. The
last token of a segment is the first of the next, and counts once.
"""

import equinox as eqx
import jax.random as jr
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


class HDDAConfig(PlannerConfig):
    """Hyperparameters of HD-DA; the defaults are those of its maze of medium size, with dense actions."""

    horizon: int = 255
    """states that a plan spans; rounded up so that the U-Net can halve the number of high-level states"""
    action_weight: float = 10.0
    """weight of the first token's actions in the loss of the high level"""
    jump: int = 15
    """steps from one high-level state to the next, K"""
    low_diffusion_steps: int = 128
    """steps from noise to the steps between two high-level states"""

    def __check_init__(self):
        self._require_positive("jump", "low_diffusion_steps")
        fits = self.divisible(self.jump + 1)
        self._require(
            "jump", fits == self.jump + 1, f"jump + 1 steps cannot be halved by the U-Net; take {fits - 1}"
        )
        most = (self.tokens - 1) * self.jump
        self._require("execute", self.execute <= most, f"a plan has {most} actions; take fewer")

    @property
    def tokens(self) -> int:
        """High-level states of a plan, at least 2."""
        return self.divisible(max(-(-self.horizon // self.jump), 2))

    @property
    def segments(self) -> int:
        """Low-level plans that are executed, the last one maybe in part."""
        return -(-self.execute // self.jump)


class Nets(eqx.Module):
    """HD-DA's networks."""

    high: TemporalUNet
    low: TemporalUNet


class HDDA(AbstractPlanner[HDDAConfig, Nets]):
    """A diffusion of distant states with all actions between them, and one of the steps between two."""

    def __check_init__(self):
        require_goals("hd_da", self.env)

    @property
    def steps_of_a_window(self) -> int:
        return self.cfg.tokens * self.cfg.jump

    @property
    def high(self) -> TrajectoryDiffusion:
        """The diffusion of every K-th state, with the K actions that follow it."""
        cfg, env = self.cfg, self.env
        return TrajectoryDiffusion(
            cfg.tokens, cfg.jump * env.action_dim, env.obs_dim, env.goal_columns,
            cfg.diffusion_steps, cfg.predict, cfg.action_weight,
        )  # fmt: skip

    @property
    def low(self) -> TrajectoryDiffusion:
        """The diffusion of the steps from one of these states to the next."""
        cfg, env = self.cfg, self.env
        whole = tuple(range(env.obs_dim))
        return TrajectoryDiffusion(
            cfg.jump + 1, env.action_dim, env.obs_dim, whole, cfg.low_diffusion_steps, cfg.predict
        )

    def nets(self, key: Key[Array, ""]) -> Nets:
        k_high, k_low = jr.split(key)
        channels = self.cfg.hidden
        return Nets(self.high.net(channels, k_high), self.low.net(channels, k_low))

    def loss(
        self, nets: Nets, target: Nets, batch: Batch, key: Key[Array, ""]
    ) -> tuple[Float[Array, ""], Metrics]:
        del target
        k_high, k_low = jr.split(key)
        cfg, actions, states = self.cfg, batch.actions, batch.chunk_obs
        dense = actions.reshape(len(actions), cfg.tokens, -1)
        near = slice(cfg.jump + 1)
        return sum_losses({
            "planner/high_loss": self.high.loss(nets.high, dense, states[:, :: cfg.jump], k_high),
            "planner/low_loss": self.low.loss(nets.low, actions[:, near], states[:, near], k_low),
        })  # fmt: skip

    def plan(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"],
        key: Key[Array, ""],
        elapsed: Int[Array, " E"] | None = None,
    ) -> Plan:
        k_high, k_low = jr.split(key)
        nets, count, jump = state.target, self.cfg.segments, self.cfg.jump
        arrival = self.arrival(elapsed, self.cfg.tokens, jump)
        _, distant = self.high.sample(nets.high, obs, goal, k_high, arrival)
        starts, ends = (x.reshape(-1, obs.shape[-1]) for x in (distant[:, :count], distant[:, 1 : count + 1]))
        actions, states = self.low.sample(nets.low, starts, ends, k_low)

        def join(x: Array) -> Array:
            return x[:, :jump].reshape(len(obs), count * jump, -1)

        return Plan(join(actions), join(states), distant)
