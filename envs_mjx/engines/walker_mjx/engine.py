"""Engine `mjx` of walkers: MuJoCo's physics as a JAX program, whose cost does not grow with the maze."""

import importlib.metadata

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from mujoco import mjx

from envs_mjx.engines import walker_control_step
from envs_mjx.engines.base import AbstractWalkerEngine, StepState, WalkerPhysics, where_active
from envs_mjx.engines.matmul_precision import full_precision
from envs_mjx.engines.newton_line_search import StoppingCriteria, require_positive
from envs_mjx.engines.walker_mjx import step
from envs_mjx.engines.walker_mjx.contacts import WalkerContactCapacity, read_joint_limits
from envs_mjx.engines.walker_mjx.near_walls import require_reach
from envs_mjx.engines.walker_mjx.pairs import read_pairs
from envs_mjx.engines.walker_mjx.step import WalkerSim
from envs_mjx.locomotion.walkers import Walker
from mac.errors import UserError

MJX_VERSION = "3.17.0"
"""The only version of mujoco-mjx that the corrections were made and tested for."""

SLOTS = {
    "point": WalkerContactCapacity(5, 1),
    "ant": WalkerContactCapacity(16, 1),
    "humanoid": WalkerContactCapacity(20, 12),
    "hopper": WalkerContactCapacity(6, 3),
    "walker2d": WalkerContactCapacity(10, 1),
    "walker2d-v5": WalkerContactCapacity(10, 1),
    "halfcheetah": WalkerContactCapacity(10, 1),
}
"""Contact buffer by body: 1.5 times the maximum that C used in 18,000 physics steps of each: at walls, on the
ground and under torques of all strengths. A point's holds all that it can have.
"""


class MjxWalkerEngine(AbstractWalkerEngine):
    """MuJoCo's physics as a JAX program: runs, batches and compiles wherever JAX does.

    Smooth dynamics are those of MJX-JAX; contacts, solver and integration are ours and agree with C where
    MJX does not (`sphere_capsule`). Numbers are float32, or float64 if the engine is made and used under
    `jax.enable_x64`. `WalkerPhysics.raw` is the last acceleration, from which the solver starts.
    """

    name: str = eqx.field(static=True)
    walker: Walker = eqx.field(static=True)
    sim: WalkerSim = eqx.field(static=True)
    model: mjx.Model
    blank: mjx.Data

    def __init__(
        self,
        walker: Walker,
        *,
        slots: WalkerContactCapacity | None = None,
        iterations: int = 20,
        ls_iterations: int = 20,
        tolerance: float | None = None,
    ):
        """Puts a walker's model on the default device.

        Args:
            walker: compiled model and facts.
            slots: capacity for contacts; None takes `SLOTS`.
            iterations: most Newton iterations per evaluation of forces.
            ls_iterations: most line-search iterations per Newton iteration.
            tolerance: scaled improvement below which the solver stops; None takes the model's.
        Raises:
            UserError: for another version of mujoco-mjx, a number below 1, or an unknown kind of model.
        """
        require_version()
        slots = SLOTS[walker.body] if slots is None else slots
        require_positive(iterations, ls_iterations, slots)
        if walker.maze is not None:
            require_reach(walker.model)
        option = walker.model.opt
        enough = option.tolerance if tolerance is None else tolerance
        self.name = "mjx"
        self.walker = walker
        self.sim = WalkerSim(
            pairs=read_pairs(walker.model),
            limits=read_joint_limits(walker.model),
            slots=slots,
            maze=walker.maze,
            solver=StoppingCriteria(iterations, ls_iterations, enough, option.ls_tolerance),
        )
        self.model, self.blank = walker_control_step.contact_free_model(walker)

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> WalkerPhysics:
        """Loads the given state; the solver's warm start is zero, as after `mj_resetData`."""
        seen = walker_control_step.read_seen(
            self.walker, (self.model, self.blank), qpos, qvel, jnp.zeros((), qpos.dtype)
        )
        return WalkerPhysics(
            qpos=qpos, qvel=qvel, seen=seen, dropped=jnp.zeros((), jnp.int32), raw=jnp.zeros_like(qvel)
        )

    @full_precision
    def step(
        self, physics: WalkerPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> WalkerPhysics:
        """Takes one control step; returns `physics` itself where not `active`. The work is done all the same,
        because a batch advances in lockstep.
        """
        started = walker_control_step.start_control_step(self.walker, physics.qpos, physics.qvel, ctrl)
        blank = self.blank.replace(ctrl=started.ctrl)
        state = StepState(started.qpos, started.qvel, physics.raw, physics.dropped)

        def substep(state: StepState, _: None) -> tuple[StepState, None]:
            return step.step(self.sim, self.model, blank, state), None

        state, _ = jax.lax.scan(substep, state, length=self.walker.substeps)
        qpos, moved = walker_control_step.finish_control_step(started, state.qpos)
        seen = walker_control_step.read_seen(self.walker, (self.model, self.blank), qpos, state.qvel, moved)
        after = WalkerPhysics(qpos=qpos, qvel=state.qvel, seen=seen, dropped=state.dropped, raw=state.warm)
        return where_active(active, after, physics)

    def touches(self, qpos: Float[Array, " nq"]) -> Bool[Array, ""]:
        return step.touches(self.sim.pairs, self.sim.maze, self.model, self.blank, qpos)


def require_version(version: str | None = None) -> None:
    """Refuses any mujoco-mjx but the one that engine `mjx` of walkers was made for.

    Args:
        version: the version to judge; the installed one if None.
    Raises:
        UserError: if it is another version.
    """
    version = importlib.metadata.version("mujoco-mjx") if version is None else version
    if version != MJX_VERSION:
        raise UserError(
            f"engine mjx corrects the physics of mujoco-mjx {MJX_VERSION} but {version} is installed; "
            f"pip install mujoco-mjx=={MJX_VERSION} mujoco=={MJX_VERSION}, or use engine c"
        )
