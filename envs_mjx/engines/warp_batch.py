"""Shared parts of the MuJoCo Warp engines: one batch whatever the `vmap`s, and its contact buffer."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import mujoco
from jaxtyping import Array, Float, Int
from mujoco import mjx
from mujoco.mjx.warp import mjwp_types


def put_model(model: mujoco.MjModel, rows: int) -> tuple[mjx.Model, mjx.Data]:
    """Puts a model on the default device, with data of one scene with one slot for contacts.

    Args:
        rows: capacity of each scene for rows of constraints.
    """
    device = jnp.zeros(()).device
    put = mjx.put_model(model, device=device, impl="warp")
    # Under this flag warp finds the contacts of two boxes as C does with or without it; all else is the same.
    # Without it some grasps have other contact points, and the fingers are 1e-3 rad off.
    flags = int(put.opt.disableflags) | int(mujoco.mjtDisableBit.mjDSBL_NATIVECCD)
    # Overflows are counted below; warp would print several lines at each of them.
    put = put.tree_replace({"opt.disableflags": flags, "opt._impl.warn_overflow": 0})
    return put, mjx.make_data(model, device=device, impl="warp", naconmax=1, njmax=rows)


def with_slots(blank: mjx.Data, slots: int, qpos: Float[Array, " nq"], qvel: Float[Array, " nv"]) -> mjx.Data:
    """Returns data of one scene in the given state, with contact slots for its whole batch.

    Half as many may at any time be meshes or cylinders that penetrate something; each of these takes
    18 kB of working memory.
    """
    sizes = {"_impl.naconmax": slots, "_impl.naccdmax": (slots + 1) // 2}
    contacts = {
        f"_impl.{field}": jnp.broadcast_to(value[:1], (slots, *value.shape[1:]))
        for field, value in vars(blank._impl).items()
        if field.startswith("contact__") and value.size
    }
    data = blank.tree_replace(contacts | sizes)
    return data.replace(qpos=qpos.astype(jnp.float32), qvel=qvel.astype(jnp.float32))


def substeps(model: mjx.Model, data: mjx.Data, count: int) -> tuple[mjx.Data, Int[Array, ""]]:
    """Returns data after `count` steps, and the number of contacts dropped, as far as warp counts them."""

    def substep(data: mjx.Data, _: None) -> tuple[mjx.Data, Int[Array, ""]]:
        data = mjx.step(model, data)
        return data, missing_slots(data)

    data, missing = jax.lax.scan(substep, data, length=count)
    return data, missing.sum(dtype=jnp.int32)


def missing_slots(data: mjx.Data) -> Int[Array, ""]:
    """Returns the contacts dropped in the last substep: of the whole batch because the buffer of contacts or
    of candidate pairs was full, and of this scene because its constraint rows were.
    """
    impl: Any = data._impl
    slots = impl.naconmax
    contacts = jnp.maximum(impl.nacon[0] - slots, 0) + jnp.maximum(impl.ncollision[0] - slots, 0)
    rows = jnp.maximum(impl.nefc - impl.njmax, 0)
    return (contacts + (rows + 2) // 3).astype(jnp.int32)


def overflowed(data: mjx.Data) -> Int[Array, ""]:
    """Returns 1 if any substep dropped a contact because a buffer was full, also of kinds without a
    counter."""
    kinds = mjwp_types.OverflowType
    lost = kinds.NEFC | kinds.NJMAX_NNZ | kinds.BROADPHASE | kinds.NARROWPHASE | kinds.CCD | kinds.EPA_HORIZON
    return ((data._impl.overflow & int(lost)) != 0).astype(jnp.int32)


def over_scenes(function: Callable[..., Any], engine: eqx.Module, *args: Any) -> Any:
    """Calls `function(engine, scenes, *args)`, where `scenes` is the number of scenes in all `vmap`s around
    it.

    Contact slots are allotted for a whole batch, so the batch must be known where its data is made.
    """
    arrays, static = eqx.partition(engine, eqx.is_array)

    @jax.custom_batching.custom_vmap
    def batch(arrays, args):
        whole = eqx.combine(arrays, static)
        scenes = len(jax.tree.leaves(args)[0])
        return jax.vmap(lambda row: function(whole, scenes, *row))(args)

    @batch.def_vmap
    def merge(size: int, batched: list, arrays, args):
        if any(jax.tree.leaves(batched[0])):
            raise NotImplementedError("an engine's arrays cannot be vmapped; vmap its methods")
        wide = jax.tree.map(lambda x, b: x if b else jnp.broadcast_to(x, (size, *x.shape)), args, batched[1])
        flat = jax.tree.map(lambda x: x.reshape(size * x.shape[1], *x.shape[2:]), wide)
        out = batch(arrays, flat)
        out = jax.tree.map(lambda x: x.reshape(size, len(x) // size, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    out = batch(arrays, jax.tree.map(lambda x: x[None], args))
    return jax.tree.map(lambda x: x[0], out)
