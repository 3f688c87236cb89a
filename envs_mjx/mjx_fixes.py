"""MJX-JAX 3.17.0 made to agree with MuJoCo C: four corrections, and a barrier for speed.

MJX-JAX 3.17.0 differs from C in four places that matter to OGBench's models (see `Corrections`).
`forward` and `step` below are built from MJX's own stages with the corrections between them as
plain functions, so nothing in the installed package changes and other users of MJX in the same
process are unaffected. The single exception is `barriers`, which wraps MJX's tree scan while one of
our functions is being traced, and which changes no arithmetic.

Sensors, cameras and lights are left out: OGBench's manipulation tasks read none of them.
"""

import contextlib
import functools
import importlib.metadata
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
from jaxtyping import Array, Float
from mujoco import mjx
from mujoco.mjx._src import forward as mjx_forward
from mujoco.mjx._src import scan, support

from envs_mjx import mjx_solver
from mac.errors import UserError

MJX_VERSION = "3.17.0"
"""The only mujoco-mjx version these corrections are written and tested for."""

_trace_lock = threading.RLock()


class Corrections(NamedTuple):
    """Which corrections apply: all of them, except in tests that show what each one does.

    Attributes:
        saturated_actuators: implicitfast's velocity derivative leaves out actuators whose force is
            clamped by `forcerange`.
        connect_acceleration: the reference acceleration of a connect constraint contains the
            acceleration that its anchors have from velocity alone, (Jdot(p1) - Jdot(p2)) qvel.
        tree_sparsity: implicitfast's derivative couples two dofs only if one is an ancestor of the
            other, which is the sparsity of the mass matrix.
        capsule_frames: the first tangent of a plane-capsule contact is the capsule's axis projected
            on the plane, however short the projection. A pyramidal friction cone depends on it.
    """

    saturated_actuators: bool = True
    connect_acceleration: bool = True
    tree_sparsity: bool = True
    capsule_frames: bool = True


ALL = Corrections()


def require_version(version: str | None = None) -> None:
    """Refuses any mujoco-mjx but the one the corrections were made for.

    Args:
        version: the version to judge; the installed one if None.
    Raises:
        UserError: if it is another version.
    """
    version = importlib.metadata.version("mujoco-mjx") if version is None else version
    if version != MJX_VERSION:
        raise UserError(
            f"engine mjx corrects the physics of mujoco-mjx {MJX_VERSION} but {version} is installed; "
            f"run `pip install mujoco-mjx=={MJX_VERSION} mujoco=={MJX_VERSION}` or use engine c"
        )


def step(model: mjx.Model, data: mjx.Data, on: Corrections = ALL) -> mjx.Data:
    """One substep of `model.opt.timestep` seconds, as `mj_step`: positions derived from `qpos` (site
    poses, contacts) belong to the substep's start.

    Raises:
        NotImplementedError: for an integrator other than Euler or implicitfast.
    """
    data = forward(model, data, on)
    match model.opt.integrator:
        case mujoco.mjtIntegrator.mjINT_IMPLICITFAST:
            return implicitfast(model, data, on)
        case mujoco.mjtIntegrator.mjINT_EULER:
            return mjx.euler(model, data)
    raise NotImplementedError(f"integrator {model.opt.integrator!r}")


def forward(model: mjx.Model, data: mjx.Data, on: Corrections = ALL) -> mjx.Data:
    """Everything up to `qacc` from `qpos`, `qvel` and `ctrl`, as `mj_forward` without sensors."""
    with barriers():
        data = _forward_position(model, data, on)
        data = mjx.fwd_velocity(model, data)
        if on.connect_acceleration:
            data = add_connect_acceleration(model, data)
        data = mjx.fwd_actuation(model, data)
        data = mjx.fwd_acceleration(model, data)
        if data._impl.efc_J.size == 0:
            return data.replace(qacc=data.qacc_smooth)
        return (mjx_solver if mjx_solver.supports(model, data) else mjx).solve(model, data)


def _forward_position(model: mjx.Model, data: mjx.Data, on: Corrections) -> mjx.Data:
    inertia = (mjx.kinematics, mjx.com_pos, mjx.tendon, mjx.crb, mjx.tendon_armature, mjx.factor_m)
    for stage in (*inertia, mjx.collision):
        data = stage(model, data)
    if on.capsule_frames:
        data = align_capsule_frames(model, data)
    return mjx.transmission(model, mjx.make_constraint(model, data))


def implicitfast(model: mjx.Model, data: mjx.Data, on: Corrections) -> mjx.Data:
    """Velocity update by (M - h dF/dv) qacc = F after `forward`, then positions with the new velocity."""
    derivative = velocity_derivative(model, data, on)
    mass = mjx.full_m(model, data) - model.opt.timestep * derivative
    factor = jax.scipy.linalg.cho_factor(mass)
    qacc = jax.scipy.linalg.cho_solve(factor, data.qfrc_smooth + data.qfrc_constraint)
    return mjx_forward._advance(model, data, data.act_dot, qacc)


def velocity_derivative(model: mjx.Model, data: mjx.Data, on: Corrections = ALL) -> Float[Array, "nv nv"]:
    """d(actuator and passive force)/d(qvel) as C's implicitfast keeps it."""
    if on.saturated_actuators:
        low, high = model.actuator_forcerange.T
        force = data.actuator_force
        clamped = model.actuator_forcelimited.astype(bool) & ((force <= low) | (force >= high))
        moment = jnp.where(clamped[:, None], 0, data._impl.actuator_moment)
        data = data.tree_replace({"_impl.actuator_moment": moment})
    derivative = mjx.deriv_smooth_vel(model, data)
    if derivative is None:
        return jnp.zeros((model.nv, model.nv), data.qvel.dtype)
    return jnp.where(tree_mask(model.dof_parentid), derivative, 0) if on.tree_sparsity else derivative


def tree_mask(parents: np.ndarray) -> np.ndarray:
    """Which pairs of dofs lie on one path to the root; `parents[i]` is the dof above i, or -1."""
    mask = np.eye(len(parents), dtype=bool)
    for i, parent in enumerate(parents):
        while parent >= 0:
            mask[i, parent] = mask[parent, i] = True
            parent = parents[parent]
    return mask


def add_connect_acceleration(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Lowers `efc_aref` of every connect constraint by (Jdot(p1) - Jdot(p2)) qvel.

    Needs body velocities. The rows of connect constraints are the first of the constraint matrix.
    """
    ids = np.flatnonzero(model.eq_type == mujoco.mjtEq.mjEQ_CONNECT)
    if not ids.size or model.opt.disableflags & mujoco.mjtDisableBit.mjDSBL_EQUALITY:
        return data
    drift = [data.eq_active[i] * _anchor_drift(model, data, int(i)) for i in ids]
    aref = data._impl.efc_aref.at[: 3 * ids.size].add(-jnp.concatenate(drift))
    return data.tree_replace({"_impl.efc_aref": aref})


def _anchor_drift(model: mjx.Model, data: mjx.Data, eq: int) -> Float[Array, " 3"]:
    """Relative acceleration of the two anchors of equality `eq` at zero `qacc`."""
    ends = []
    for k, obj in enumerate((model.eq_obj1id[eq], model.eq_obj2id[eq])):
        if model.eq_objtype[eq] == mujoco.mjtObj.mjOBJ_SITE:
            body, point = int(model.site_bodyid[obj]), data.site_xpos[obj]
        else:
            body = int(obj)
            point = data.xmat[body] @ model.eq_data[eq, 3 * k : 3 * k + 3] + data.xpos[body]
        drift, _ = support.jac_dot(model, data, point, jnp.asarray(body))
        ends.append(data.qvel @ drift)
    return ends[0] - ends[1]


def align_capsule_frames(model: mjx.Model, data: mjx.Data) -> mjx.Data:
    """Turns the tangents of plane-capsule contacts along the capsule, as `mjc_PlaneCapsule` does."""
    plane, capsule = int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)
    if data._impl.ncon == 0 or not {plane, capsule} <= set(np.unique(model.geom_type)):
        return data
    contact = data._impl.contact
    kind = jnp.asarray(model.geom_type)[contact.geom]
    axis = data.geom_xmat[contact.geom[:, 1], :, 2]
    aligned = jax.vmap(_capsule_frame)(contact.frame[:, 0], axis)
    hit = (kind[:, 0] == plane) & (kind[:, 1] == capsule)
    frame = jnp.where(hit[:, None, None], aligned, contact.frame)
    return data.tree_replace({"_impl.contact": contact.replace(frame=frame)})


def _capsule_frame(normal: Float[Array, " 3"], axis: Float[Array, " 3"]) -> Float[Array, "3 3"]:
    """Contact frame (rows: normal and two tangents) with the first tangent along `axis`."""
    upright = jnp.linalg.norm(axis - normal * (normal @ axis)) < 1e-6
    fallback = jnp.where(jnp.abs(normal[1]) < 0.5, jnp.array([0.0, 1, 0]), jnp.array([0.0, 0, 1]))
    tangent = jnp.where(upright, fallback, axis)
    tangent = tangent - normal * (normal @ tangent)
    tangent = tangent / jnp.linalg.norm(tangent)
    return jnp.stack([normal, tangent, jnp.cross(normal, tangent)])


@contextlib.contextmanager
def barriers() -> Iterator[None]:
    """While entered, MJX's scan over the body tree ends each level with an optimisation barrier.

    Without it XLA fuses the levels of the tree and computes each parent again for every child: on
    CPU the kinematics of the arm at batch 16 take 30 times longer. A barrier is an identity, so a
    program traced elsewhere at the same moment computes the same numbers. Entered while tracing;
    the lock keeps concurrent traces from restoring each other's wrapper.
    """
    with _trace_lock:
        original = scan.body_tree
        scan.body_tree = functools.partial(_body_tree_with_barriers, original)
        try:
            yield
        finally:
            scan.body_tree = original


def _body_tree_with_barriers(
    body_tree: Callable[..., Any], model: mjx.Model, f: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    def level(*operands: Any) -> Any:
        return jax.lax.optimization_barrier(f(*operands))

    return body_tree(model, level, *args, **kwargs)
