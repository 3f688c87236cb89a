"""Engine `warp`: MJX-Warp on the unmodified models, for NVIDIA GPUs; on CPU it runs for tests.

The only module that needs the package `warp` (extra `warp`). MJX imports it on its own when it is installed.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from mujoco import mjx

from envs_mjx.engine import AbstractEngine, Physics
from envs_mjx.scenes import FREE_DAMPING, LOCKED_DAMPING, Scene
from mac.errors import UserError


def available() -> bool:
    """Whether the package `warp` is installed. It is looked for, not imported."""
    return importlib.util.find_spec("warp") is not None


class WarpEngine(AbstractEngine):
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
        max_contacts = max_contacts or 64
        max_rows = max_rows or 160
        model = mjx.put_model(scene.model, impl="warp")
        self.model = model.tree_replace({"opt._impl.warn_overflow": 0})
        self.blank = mjx.make_data(scene.model, impl="warp", naconmax=1, njmax=max_rows)
        self.name = "warp"
        self.sites = tuple(int(s) for s in scene.sites)
        self.slide_dof = tuple(int(s) for s in scene.slide_dof)
        self.pad_body = int(scene.pad_body)
        self.substeps = int(scene.substeps)
        self.fresh = scene.fresh
        self.max_contacts = max_contacts

    def load(self, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> Physics:
        return _over_worlds(_load, self, qpos, qvel)

    def step(self, physics: Physics, ctrl: Float[Array, " nu"], active: Bool[Array, ""]) -> Physics:
        after = _over_worlds(_step, self, physics, ctrl)
        return jax.tree.map(lambda new, old: jnp.where(active, new, old), after, physics)

    def data(self, worlds: int) -> mjx.Data:
        """One world's data with room for the contacts of all of `worlds`."""
        impl = self.blank._impl
        rows = worlds * self.max_contacts
        contacts = {
            f"_impl.{field}": jnp.broadcast_to(old[:1], (rows, *old.shape[1:]))
            for field, old in vars(impl).items()
            if field.startswith("contact__") and old.size
        }
        return self.blank.tree_replace({**contacts, "_impl.naconmax": rows, "_impl.naccdmax": rows})


def _load(engine: WarpEngine, worlds: int, qpos, qvel) -> Physics:
    data = engine.data(worlds).replace(qpos=qpos, qvel=qvel)
    data = mjx.kinematics(engine.model, data)
    free = jnp.zeros(len(engine.slide_dof), bool)
    return _physics(engine, data, data, free, jnp.zeros((), jnp.int32))


def _step(engine: WarpEngine, worlds: int, physics: Physics, ctrl) -> Physics:
    damping = jnp.where(physics.locked, LOCKED_DAMPING, FREE_DAMPING)
    model = engine.model
    if engine.slide_dof:
        model = model.replace(dof_damping=model.dof_damping.at[jnp.array(engine.slide_dof)].set(damping))
    data = engine.data(worlds).replace(
        qpos=physics.qpos, qvel=physics.qvel, qacc_warmstart=physics.raw, ctrl=ctrl
    )

    def substep(model, data):
        data = mjx.step(model, data)
        impl = data._impl
        return data, jnp.maximum(jnp.maximum(impl.nacon[0], impl.ncollision[0]) - impl.naconmax, 0)

    data, dropped = jax.lax.scan(lambda d, _: substep(model, d), data, length=engine.substeps - 1)
    data, last = substep(model.tree_replace({"opt._impl.run_rne_postconstraint": True}), data)
    posed = mjx.kinematics(model, data) if engine.fresh else data
    return _physics(engine, data, posed, physics.locked, physics.dropped + dropped.sum() + last)


def _physics(engine, data, posed, locked, dropped) -> Physics:
    sites = jnp.array(engine.sites)
    return Physics(
        qpos=data.qpos,
        qvel=data.qvel,
        site_pos=posed.site_xpos[sites],
        site_mat=posed.site_xmat[sites],
        touch=data._impl.cfrc_ext[engine.pad_body],
        locked=locked,
        dropped=dropped,
        raw=data.qacc_warmstart,
    )


def _over_worlds(function: Callable[..., Any], engine: WarpEngine, *args):
    arrays, static = eqx.partition(engine, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def batch(arrays, args):
        whole = eqx.combine(arrays, static)
        worlds = len(jax.tree.leaves(args)[0])
        return jax.vmap(lambda a: function(whole, worlds, *a))(args)

    @batch.def_vmap
    def merge(size, batched, arrays, args):
        assert not any(jax.tree.leaves(batched[0])), "an engine cannot be vmapped"
        wide = jax.tree.map(
            lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), args, batched[1]
        )
        flat = jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), wide)
        out = batch(arrays, flat)
        return (
            jax.tree.map(lambda x: x.reshape(size, len(x) // size, *x.shape[1:]), out),
            jax.tree.map(lambda _: True, out),
        )

    out = batch(arrays, jax.tree.map(lambda x: x[None], args))
    return jax.tree.map(lambda x: x[0], out)
