"""Engine `mjx`: MuJoCo's physics as a JAX program for batches, on CPUs and accelerators."""

from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jaxtyping import Array, Bool, Float

from envs_mjx.engines.base import AbstractTabletopEngine, StepState, TabletopPhysics, where_active
from envs_mjx.engines.matmul_precision import full_precision
from envs_mjx.engines.newton_line_search import StoppingCriteria, require_positive
from envs_mjx.engines.tabletop_mjx import model as mjx_model
from envs_mjx.engines.tabletop_mjx import step
from envs_mjx.engines.tabletop_mjx.collision import collision_model, detection
from envs_mjx.engines.tabletop_mjx.collision.detection import TabletopContactCapacity
from envs_mjx.engines.tabletop_mjx.step import TabletopSim
from envs_mjx.manipulation.scenes import Scene

SLOTS = {
    "cube-single": TabletopContactCapacity(20, 1, 26),
    "cube-double": TabletopContactCapacity(20, 1, 28),
    "cube-triple": TabletopContactCapacity(20, 1, 36),
    "cube-quadruple": TabletopContactCapacity(24, 1, 40),
    "cube-octuple": TabletopContactCapacity(26, 1, 64),
    "scene": TabletopContactCapacity(30, 16, 48),
    "puzzle-3x3": TabletopContactCapacity(24, 1, 30),
    "puzzle-4x4": TabletopContactCapacity(24, 1, 30),
    "puzzle-4x5": TabletopContactCapacity(24, 1, 30),
    "puzzle-4x6": TabletopContactCapacity(24, 1, 34),
}
"""Contact buffer by family: 1.25 times the maximum that C or the broad phase used under OGBench's experts and
under random, held and downward actions (300 to 600 control steps each).
"""


class MjxEngine(AbstractTabletopEngine):
    """MuJoCo's physics as a JAX program: runs, batches and compiles wherever JAX does.

    The physics is that of C within solver and float precision, on the collision model of
    `collision/collision_model.py`. Numbers are float32, or float64 if the engine is used under
    `jax.enable_x64` on float64 states. Any number of `vmap`s around `step` becomes one program over one batch
    axis.

    `TabletopPhysics.raw` is the acceleration of the last substep, from which the solver starts the next.
    """

    name: str = eqx.field(static=True)
    sim: TabletopSim = eqx.field(static=True)

    def __init__(
        self,
        scene: Scene,
        *,
        slots: TabletopContactCapacity | None = None,
        iterations: int = 20,
        ls_iterations: int = 20,
    ):
        """Reads a scene.

        Args:
            scene: compiled model and ids.
            slots: capacity for pairs and contacts; None takes `SLOTS`.
            iterations: most Newton iterations per substep. C needs 1 or 2 on average and 16 at most;
                4 make the physics explode during a grasp.
            ls_iterations: line-search iterations per Newton iteration.
        Raises:
            UserError: if a number is less than 1.
        """
        slots = SLOTS[scene.family] if slots is None else slots
        require_positive(iterations, ls_iterations, slots)
        constants = mjx_model.read_constants(scene)
        model = collision_model.collision_model(scene, constants)
        self.name = "mjx"
        self.sim = TabletopSim(
            constants=constants,
            collisions=model,
            table=detection.pair_table(model, constants.timestep),
            slots=slots,
            limits=StoppingCriteria(iterations, ls_iterations, constants.tolerance, constants.ls_tolerance),
            substeps=int(scene.substeps),
            slides=scene.slides,
            fresh=scene.fresh,
        )

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> TabletopPhysics:
        """Loads the given state. As after `mj_resetData` and `mj_forward`, the solver's warm start and the
        contact force are zero, and the site poses are those of `qpos`.
        """
        c = self.sim.constants
        sites = over_batches(lambda q: tuple(step.sites_of(c, q)))
        pos, mat = sites(qpos)
        zero = jnp.zeros((), jnp.int32)
        free = jnp.zeros(self.sim.slides, bool)
        return TabletopPhysics(
            qpos=qpos,
            qvel=qvel,
            site_pos=pos,
            site_mat=mat,
            touch=jnp.zeros(6, qpos.dtype),
            locked=free,
            dropped=zero,
            raw=jnp.zeros_like(qvel),
        )

    def step(
        self, physics: TabletopPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> TabletopPhysics:
        """Takes one control step under constant `ctrl`; returns `physics` itself where not `active`. The work
        is done all the same, because a batch advances in lockstep.
        """

        def batch(qpos: Array, qvel: Array, warm: Array, dropped: Array, ctrl: Array, locked: Array):
            state = StepState(qpos, qvel, warm, dropped)
            state, seen = step.control_step(self.sim, state, ctrl, locked)
            return (*state, *seen)

        p = physics
        results = over_batches(batch)(p.qpos, p.qvel, p.raw, p.dropped, ctrl.astype(p.qpos.dtype), p.locked)
        qpos, qvel, warm, dropped, site_pos, site_mat, touch = results
        after = TabletopPhysics(
            qpos=qpos,
            qvel=qvel,
            site_pos=site_pos,
            site_mat=site_mat,
            touch=touch,
            locked=p.locked,
            dropped=dropped,
            raw=warm,
        )
        return where_active(active, after, physics)


def over_batches(function: Callable[..., tuple[Array, ...]]) -> Callable[..., tuple[Array, ...]]:
    """Wraps `function`, which takes arrays that end with a batch axis, as a function of single examples.

    All `vmap`s around a call, however many, become the one batch axis.
    """

    @custom_vmap
    @full_precision  # here, because a `vmap` around a loop traces this function when the loop is batched
    def rows(*args: Array) -> tuple[Array, ...]:
        """The batch axis first."""
        results = function(*(jnp.moveaxis(x, 0, -1) for x in args))
        return tuple(jnp.moveaxis(x, -1, 0) for x in results)

    def stacked(size: int, batched: list[bool], args: tuple[Array, ...]) -> list[Array]:
        pairs = zip(args, batched, strict=True)
        return [x if is_batched else jnp.broadcast_to(x, (size, *x.shape)) for x, is_batched in pairs]

    @rows.def_vmap
    def _more(size: int, batched: list[bool], *args: Array):
        # not -1: an array may be empty
        flat = [x.reshape(size * x.shape[1], *x.shape[2:]) for x in stacked(size, batched, args)]
        results = rows(*flat)
        return tuple(x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results), (True,) * len(
            results
        )

    @custom_vmap
    def single(*args: Array) -> tuple[Array, ...]:
        return tuple(x[0] for x in rows(*(x[None] for x in args)))

    @single.def_vmap
    def _first(size: int, batched: list[bool], *args: Array):
        results = rows(*stacked(size, batched, args))
        return results, (True,) * len(results)

    return single
