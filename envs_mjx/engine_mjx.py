"""Engine `mjx`: MJX-JAX with corrected physics on a reduced collision model, for accelerators."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from mujoco import mjx

from envs_mjx import collisions, mjx_fixes
from envs_mjx.engine import AbstractEngine, Physics
from envs_mjx.scenes import Scene
from mac.errors import UserError


class MjxEngine(AbstractEngine):
    """MuJoCo's physics as a JAX program: runs, batches and compiles wherever JAX does.

    The physics is that of C within solver and float precision, except that contacts come from the
    reduced collision model of `collisions.py` and that a pair of boxes makes at most 4 contact points
    (C: 8). Numbers are float32, or float64 if the engine is built and used under `jax.enable_x64`.

    The model's arrays are leaves of the module, so they enter a compiled function as arguments when
    the engine does; the compiled program depends on the scene but not on them.
    """

    name: str = eqx.field(static=True)
    model: mjx.Model
    sites: tuple[int, ...] = eqx.field(static=True)
    pad_body: int = eqx.field(static=True)
    substeps: int = eqx.field(static=True)

    def __init__(
        self,
        scene: Scene,
        *,
        level: str = "lite",
        max_contacts: int | None = None,
        iterations: int = 10,
        ls_iterations: int = 20,
    ):
        """Puts a scene's model on the default device.

        Args:
            scene: compiled model and ids.
            level: collision level, see `collisions.collision_model`.
            max_contacts: contact slots; None takes `collisions.contact_cap`, half as many again for
                level `finger`.
            iterations: most Newton iterations per substep. C needs 1 or 2 on average and 14 at most;
                4 make the physics explode during a grasp, 10 equal 100 to float32 precision.
            ls_iterations: line-search iterations per Newton iteration.
        Raises:
            UserError: if another mujoco-mjx than the one corrected is installed, or an argument is
                out of range.
        """
        mjx_fixes.require_version()
        if iterations < 1 or ls_iterations < 1:
            raise UserError(f"iterations={iterations} and ls_iterations={ls_iterations} must be at least 1")
        if max_contacts is None:
            cap = collisions.contact_cap(scene.cubes)
            max_contacts = cap if level == "lite" else cap * 3 // 2
        model = collisions.put_collision_model(collisions.collision_model(scene.model, level), max_contacts)
        option = model.opt.replace(iterations=iterations, ls_iterations=ls_iterations)
        self.name = "mjx"
        self.model = model.replace(opt=option)
        self.sites = tuple(int(s) for s in scene.sites)
        self.pad_body = int(scene.pad_body)
        self.substeps = int(scene.substeps)

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> Physics:
        """A scene in the given state. As after `mj_resetData` and `mj_forward`, the solver's warm start
        and the contact force are zero, and the site poses are those of `qpos`.
        """
        with mjx_fixes.barriers():
            free = jnp.zeros(0, bool)
            return self._physics(mjx.kinematics(self.model, self._data(qpos, qvel)), free)

    def step(self, physics: Physics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]) -> Physics:
        """One control step under constant `ctrl`; `physics` itself where not `active` (the work is done
        all the same: a batch advances in lockstep).
        """
        data = self._data(physics.qpos, physics.qvel)
        data = data.replace(qacc_warmstart=physics.raw, ctrl=ctrl.astype(data.ctrl.dtype))
        data, _ = jax.lax.scan(lambda d, _: (self._substep(d), None), data, length=self.substeps)
        with mjx_fixes.barriers():
            after = self._physics(mjx.rne_postconstraint(self.model, data), physics.locked)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, physics)

    def _substep(self, data: mjx.Data) -> mjx.Data:
        new = mjx_fixes.step(self.model, data)
        # Under `jax.enable_x64` MJX turns some int32 fields of its data into int64.
        return jax.tree.map(lambda n, old: n.astype(old.dtype), new, data)

    def _data(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> mjx.Data:
        data = mjx.make_data(self.model)
        return data.replace(qpos=qpos.astype(data.qpos.dtype), qvel=qvel.astype(data.qvel.dtype))

    def _physics(self, data: mjx.Data, locked: Bool[Array, " slides"]) -> Physics:
        sites = jnp.array(self.sites)
        return Physics(
            qpos=data.qpos,
            qvel=data.qvel,
            site_pos=data.site_xpos[sites],
            site_mat=data.site_xmat[sites],
            touch=data._impl.cfrc_ext[self.pad_body],
            locked=locked,
            dropped=jnp.zeros((), jnp.int32),
            raw=data.qacc_warmstart,
        )
