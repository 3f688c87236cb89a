"""The data-collecting policies: an environment with an expert acting in it, and the records of each step.

`simulate_episodes.Simulator` runs any `AbstractDataPolicy`. `TabletopDataPolicy` below is the one for
manipulation; `experts.maze_experts` holds the one for mazes.
"""

import abc
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from envs_mjx import experts
from envs_mjx.engines.base import AbstractTabletopEngine
from envs_mjx.manipulation.arm_controller import ACTION_DIM, build_arm
from envs_mjx.manipulation.observation import obs_dim
from envs_mjx.manipulation.scene_simulation import SceneState, Tabletop
from envs_mjx.manipulation.scenes import Scene


class StepRecords(NamedTuple):
    """Arrays that a dataset records of each state; leading axes, if any, are episodes and time."""

    observations: Float[Array | np.ndarray, "*batch D"]
    actions: Float[Array | np.ndarray, "*batch A"]
    qpos: Float[Array | np.ndarray, "*batch nq"]
    qvel: Float[Array | np.ndarray, "*batch nv"]
    button_states: Bool[Array | np.ndarray, "*batch buttons"]


class TargetEvents(NamedTuple):
    """Events of a control step: whether the expert finished with a target, and whether it reached it."""

    done: Bool[Array | np.ndarray, "*batch"]
    hit: Bool[Array | np.ndarray, "*batch"]


class ExpertDecision(NamedTuple):
    """The decision of an expert in one state.

    Attributes:
        row: the state, and the action in it.
        state: state of environment and expert, the latter one action further.
        done: whether the expert is finished with its target once the action is taken.
        healthy: whether OGBench keeps an episode with such a state.
    """

    row: StepRecords
    state: Any
    done: Bool[Array, ""]
    healthy: Bool[Array, ""]


class AbstractDataPolicy(eqx.Module):
    """An environment and its expert, as pure functions of one episode; the caller vmaps.

    `state`, an `eqx.Module`, is the state of both. An episode starts with `begin`; each control step is
    `decide`, then `advance`; a last `decide` records the final state.
    """

    rows: eqx.AbstractVar[int]
    """Rows of an episode."""

    @property
    @abc.abstractmethod
    def engine(self) -> str:
        """Name of the physics engine."""

    @property
    @abc.abstractmethod
    def widths(self) -> dict[str, int]:
        """Numbers per row of each field of `StepRecords`."""

    @abc.abstractmethod
    def begin(self, world_key: Key[Array, ""], expert_key: Key[Array, ""]) -> Any:
        """Returns a freshly reset environment, and an expert with its first target."""

    @abc.abstractmethod
    def decide(self, state: Any, key: Key[Array, ""]) -> ExpertDecision:
        """Returns the record of the current state, with the expert's action in it."""

    @abc.abstractmethod
    def advance(
        self,
        state: Any,
        action: Float[Array, " A"],
        done: Bool[Array, ""],
        active: Bool[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[Any, TargetEvents]:
        """Takes the action that `decide` gave, if `active`. An expert that is done gets a new target."""

    @abc.abstractmethod
    def dropped(self, state: Any) -> Int[Array, "..."]:
        """Returns the number of contacts that the engine dropped since the reset; `state` may be a batch."""


class TabletopEpisode(eqx.Module):
    """A scene with objects, and the state of the expert in it."""

    world: SceneState
    expert: experts.ExpertState


class TabletopDataPolicy(AbstractDataPolicy):
    """A scripted manipulation expert of one `style` (`experts.STYLES`) in one scene."""

    table: Tabletop
    style: str = eqx.field(static=True)
    rows: int = eqx.field(static=True)

    def __init__(self, style: str, scene: Scene, engine: AbstractTabletopEngine, rows: int):
        self.table = Tabletop(engine, scene, build_arm(scene))
        self.style, self.rows = style, rows

    @property
    def engine(self) -> str:
        return self.table.engine.name

    @property
    def widths(self) -> dict[str, int]:
        scene = self.table.scene
        sizes = obs_dim(scene), ACTION_DIM, int(scene.model.nq), int(scene.model.nv), scene.buttons
        return dict(zip(StepRecords._fields, sizes, strict=True))

    def begin(self, world_key: Key[Array, ""], expert_key: Key[Array, ""]) -> TabletopEpisode:
        world = self.table.reset_collect(world_key)
        expert = experts.begin(self.style, self.table.scene, expert_key, self.table.readings(world))
        return TabletopEpisode(world, expert)

    def decide(self, state: TabletopEpisode, key: Key[Array, ""]) -> ExpertDecision:
        table, world, physics = self.table, state.world, state.world.physics
        seen = table.readings(world)
        action, expert, done = experts.act(self.style, table.scene, state.expert, seen, key)
        row = StepRecords(table.observe(world), action, physics.qpos, physics.qvel, world.buttons)
        return ExpertDecision(row, TabletopEpisode(world, expert), done, experts.healthy(table.scene, seen))

    def advance(
        self,
        state: TabletopEpisode,
        action: Float[Array, " A"],
        done: Bool[Array, ""],
        active: Bool[Array, ""],
        key: Key[Array, ""],
    ) -> tuple[TabletopEpisode, TargetEvents]:
        table, expert = self.table, state.expert
        world = table.advance(state.world, action, active)
        seen = table.readings(world)
        hit = done & experts.achieved(table.scene, expert.target, seen)
        fresh = experts.retarget(self.style, table.scene, expert, seen, key)
        expert = jax.tree.map(lambda new, old: jnp.where(done, new, old), fresh, expert)
        return TabletopEpisode(world, expert), TargetEvents(done, hit)

    def dropped(self, state: TabletopEpisode) -> Int[Array, "..."]:
        return state.world.physics.dropped
