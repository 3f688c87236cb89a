"""Engine `warp` of walkers: MuJoCo Warp, through MJX, on OGBench's and gym's models as they are. For NVIDIA
GPUs; on a CPU it gives the same numbers, slowly.

The models are complete. Two things differ from C. Numbers are float32. A capsule that stands on the floor
within 30 degrees of upright has other friction tangents, which moves an ant's control step by up to 4e-3 (m,
rad); all other steps agree to 1e-5. See `envs_mjx.engines.tabletop_warp` for compile times and
reproducibility. All walls of a maze stay in the model: warp finds the pairs that are near each other in a
kernel of its own.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from mujoco import mjx

from envs_mjx.engines import walker_control_step, warp_batch
from envs_mjx.engines.base import AbstractWalkerEngine, WalkerPhysics, where_active
from envs_mjx.engines.walker_mjx.pairs import WalkerPairs, read_pairs
from envs_mjx.engines.walker_mjx.step import touches
from envs_mjx.engines.warp_setup import require_warp
from envs_mjx.locomotion.walkers import Walker
from mac.errors import UserError

SLOTS = {"point": 8, "ant": 64, "humanoid": 160, "hopper": 16, "walker2d": 24, "walker2d-v5": 24}
SLOTS |= {"halfcheetah": 24}
"""Contact buffer by body, per walker of a batch; all walkers share it. A slot is taken by every contact, and
by every pair of solids whose bounding boxes touch.
"""


class WarpWalkerEngine(AbstractWalkerEngine):
    """MuJoCo Warp as a JAX program: any number of `vmap`s around `step` makes one batch of walkers.

    Numbers are float32, also under `jax.enable_x64`. The engine itself cannot be vmapped. `WalkerPhysics.raw`
    is the solver's warm start. The contact buffer is shared by the walkers of a batch, and warp does not say
    whose contacts were dropped when it was full. They are counted in `WalkerPhysics.dropped` of every walker
    of the batch.
    """

    name: str = eqx.field(static=True)
    walker: Walker = eqx.field(static=True)
    max_contacts: int = eqx.field(static=True)
    model: mjx.Model
    blank: mjx.Data
    sight: tuple[mjx.Model, mjx.Data]
    pairs: WalkerPairs = eqx.field(static=True)

    def __init__(self, walker: Walker, *, max_contacts: int | None = None, max_rows: int | None = None):
        """Puts a walker's model on the default device.

        Args:
            walker: compiled model and facts.
            max_contacts: contact slots per walker of a batch, None for `SLOTS`.
            max_rows: rows of constraints of each walker: four per contact, one per active joint limit. None
                reserves enough for 40 contacts, or for all slots.
        Raises:
            UserError: if warp is missing or does not load, or an argument is less than 1.
        """
        require_warp()
        slots = SLOTS[walker.body] if max_contacts is None else max_contacts
        rows = 4 * min(slots, 40) + int(walker.model.nv) if max_rows is None else max_rows
        if slots < 1 or rows < 1:
            raise UserError(f"max_contacts={max_contacts} and max_rows={max_rows} must be at least 1")
        self.name = "warp"
        self.walker = walker
        self.max_contacts = slots
        self.model, self.blank = warp_batch.put_model(walker.model, rows)
        self.sight = walker_control_step.contact_free_model(walker)
        self.pairs = read_pairs(walker.model)

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> WalkerPhysics:
        """Loads the given state; the solver's warm start is zero, as after `mj_resetData`."""
        qpos, qvel = qpos.astype(jnp.float32), qvel.astype(jnp.float32)
        seen = walker_control_step.read_seen(self.walker, self.sight, qpos, qvel, jnp.zeros((), jnp.float32))
        return WalkerPhysics(
            qpos=qpos, qvel=qvel, seen=seen, dropped=jnp.zeros((), jnp.int32), raw=jnp.zeros_like(qvel)
        )

    def step(
        self, physics: WalkerPhysics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]
    ) -> WalkerPhysics:
        """Takes one control step; returns `physics` itself where not `active`. The work is done all the same,
        because a batch advances in lockstep.
        """
        started = walker_control_step.start_control_step(self.walker, physics.qpos, physics.qvel, ctrl)
        qpos, qvel, warm, missing = warp_batch.over_scenes(
            _advance, self, started.qpos, started.qvel, physics.raw, started.ctrl
        )
        qpos, moved = walker_control_step.finish_control_step(started, qpos)
        seen = walker_control_step.read_seen(self.walker, self.sight, qpos, qvel, moved)
        after = WalkerPhysics(qpos=qpos, qvel=qvel, seen=seen, dropped=physics.dropped + missing, raw=warm)
        return where_active(active, after, physics)

    def touches(self, qpos: Float[Array, " nq"]) -> Bool[Array, ""]:
        """Returns whether a walker at `qpos` touches anything, as engine `mjx` finds it."""
        return touches(self.pairs, self.walker.maze, *self.sight, qpos)


def _advance(
    engine: WarpWalkerEngine,
    walkers: int,
    qpos: Float[Array, " nq"],
    qvel: Float[Array, " nv"],
    warm: Float[Array, " nv"],
    ctrl: Float[Array, " nu"],
) -> tuple[Array, Array, Array, Array]:
    data = warp_batch.with_slots(engine.blank, walkers * engine.max_contacts, qpos, qvel)
    data = data.replace(qacc_warmstart=warm, ctrl=ctrl)
    data, missing = warp_batch.substeps(engine.model, data, engine.walker.substeps)
    return data.qpos, data.qvel, data.qacc_warmstart, jnp.maximum(missing, warp_batch.overflowed(data))
