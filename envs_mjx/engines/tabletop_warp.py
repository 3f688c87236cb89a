"""Engine `warp`: MuJoCo Warp, through MJX, on OGBench's models as they are. For NVIDIA GPUs; on a CPU it
gives the same numbers, slowly.

The models are complete and uncorrected: every pair of geoms collides as in C, and the only difference from C
is float32. The number of kernel launches per control step does not depend on the batch, so a GPU needs large
batches.

The first control step of each family compiles kernels for minutes. They are kept in warp's own cache
(`~/.cache/warp`, or the folder named by WARP_CACHE_PATH), not in JAX's. Kernels add up floats in the order in
which GPU threads arrive, so two runs agree to rounding, not bitwise.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from mujoco import mjx

from envs_mjx.engines import warp_batch
from envs_mjx.engines.base import AbstractTabletopEngine, TabletopPhysics, where_active
from envs_mjx.engines.warp_setup import require_warp
from envs_mjx.manipulation.scenes import FREE_DAMPING, LOCKED_DAMPING, Scene
from mac.errors import UserError


def contact_slots(scene: Scene) -> int:
    """Returns the capacity of the contact buffer per scene of a batch; the buffer is shared by all scenes.

    1.4 times what C needs at most, under experts and random actions alike: cubes alone 20, 24, 31 and 48
    (for 1, 2, 4 and 8 of them), `scene` 30, puzzles 41. On average it is about 9.
    """
    return 24 + 8 * scene.cubes + (40 if scene.buttons else 0)


class WarpEngine(AbstractTabletopEngine):
    """MuJoCo Warp as a JAX program: any number of `vmap`s around `step` makes one batch of scenes.

    Numbers are float32, also under `jax.enable_x64`. Arrays of model and data are leaves of the module, so
    they enter a compiled function as arguments when the engine does; the engine itself cannot be
    vmapped. `TabletopPhysics.raw` is the solver's warm start.

    The contact buffer is shared by the scenes of a batch, and warp does not say whose contacts were dropped
    when it was full. They are counted in `TabletopPhysics.dropped` of every scene of the batch.
    """

    name: str = eqx.field(static=True)
    model: mjx.Model
    blank: mjx.Data
    sites: tuple[int, ...] = eqx.field(static=True)
    slide_dof: tuple[int, ...] = eqx.field(static=True)
    pad_body: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)
    fresh: bool = eqx.field(static=True)
    max_contacts: int = eqx.field(static=True)

    def __init__(self, scene: Scene, *, max_contacts: int | None = None, max_rows: int | None = None):
        """Puts a scene's model on the default device.

        Args:
            scene: compiled model and ids.
            max_contacts: contact slots per scene of a batch, None for `contact_slots`.
            max_rows: rows of constraints of each scene: three per contact, one per active joint limit,
                friction and coupling. None reserves enough for all contact slots in one scene.
        Raises:
            UserError: if warp is missing or does not load, or an argument is less than 1.
        """
        require_warp()
        slots = contact_slots(scene) if max_contacts is None else max_contacts
        rows = 3 * slots + int(scene.model.nv) if max_rows is None else max_rows
        if slots < 1 or rows < 1:
            raise UserError(f"max_contacts={max_contacts} and max_rows={max_rows} must be at least 1")
        self.model, self.blank = warp_batch.put_model(scene.model, rows)
        self.name = "warp"
        self.sites = tuple(int(s) for s in scene.sites)
        self.slide_dof = tuple(int(s) for s in scene.slide_dof)
        self.pad_body = int(scene.pad_body)
        self.substeps = int(scene.substeps)
        self.fresh = scene.fresh
        self.max_contacts = slots

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> TabletopPhysics:
        """Loads the given state. As after `mj_resetData` and `mj_forward`, the solver's warm start and the
        contact force are zero, and the site poses are those of `qpos`.
        """
        return warp_batch.over_scenes(_load, self, qpos, qvel)

    def step(
        self, physics: TabletopPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> TabletopPhysics:
        """Takes one control step under constant `ctrl`; returns `physics` itself where not `active`. The work
        is done all the same, because a batch advances in lockstep.
        """
        after = warp_batch.over_scenes(_advance, self, physics, ctrl)
        return where_active(active, after, physics)


def _load(
    engine: WarpEngine, scenes: int, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]
) -> TabletopPhysics:
    data = mjx.kinematics(engine.model, _data(engine, scenes, qpos, qvel))
    free = jnp.zeros(len(engine.slide_dof), bool)
    return _physics(engine, data, free, jnp.zeros((), jnp.int32))


def _advance(
    engine: WarpEngine, scenes: int, physics: TabletopPhysics, ctrl: Float[Array, " nu"]
) -> TabletopPhysics:
    model = _locked(engine, physics.locked)
    data = _data(engine, scenes, physics.qpos, physics.qvel)
    data = data.replace(qacc_warmstart=physics.raw, ctrl=ctrl.astype(jnp.float32))

    # Forces on bodies are needed after the last substep only; they cost a quarter of a substep.
    data, missing = warp_batch.substeps(model, data, engine.substeps - 1)
    data = mjx.step(model.tree_replace({"opt._impl.run_rne_postconstraint": True}), data)
    missing = jnp.maximum(missing + warp_batch.missing_slots(data), warp_batch.overflowed(data))
    if engine.fresh:
        data = mjx.kinematics(model, data)
    return _physics(engine, data, physics.locked, physics.dropped + missing)


def _locked(engine: WarpEngine, locked: Bool[Array, " slides"]) -> mjx.Model:
    """The model with the damping of the slides in one scene: under `vmap` a field with a leading axis,
    which warp's kernels index by scene.
    """
    if not engine.slide_dof:
        return engine.model
    damping = jnp.where(locked, jnp.float32(LOCKED_DAMPING), jnp.float32(FREE_DAMPING))
    old = engine.model.dof_damping
    return engine.model.replace(dof_damping=old.at[jnp.array(engine.slide_dof)].set(damping))


def _data(engine: WarpEngine, scenes: int, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> mjx.Data:
    return warp_batch.with_slots(engine.blank, scenes * engine.max_contacts, qpos, qvel)


def _physics(
    engine: WarpEngine, data: mjx.Data, locked: Bool[Array, " slides"], dropped: Int[Array, ""]
) -> TabletopPhysics:
    sites = jnp.array(engine.sites)
    return TabletopPhysics(
        qpos=data.qpos,
        qvel=data.qvel,
        site_pos=data.site_xpos[sites],
        site_mat=data.site_xmat[sites],
        touch=data._impl.cfrc_ext[engine.pad_body],
        locked=locked,
        dropped=dropped,
        raw=data.qacc_warmstart,
    )
