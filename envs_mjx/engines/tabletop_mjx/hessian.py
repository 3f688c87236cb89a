"""Second derivatives of the constraint problem, and its Newton step."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

from envs_mjx.engines.tabletop_mjx.batched_linalg import cholesky_solve, plus_outer, sum_leading
from envs_mjx.engines.tabletop_mjx.constraints import (
    ConstraintValues,
    TabletopProblem,
    cone_state,
    sum_by_dof,
)
from envs_mjx.engines.tabletop_mjx.xla_stages import stage


class QuadraticTerms(NamedTuple):
    """Mass matrix and equalities: the part of the Hessian that does not change."""

    core: Float[Array, "core core B"]


@stage
def with_equalities(p: TabletopProblem) -> QuadraticTerms:
    j, core = p.equalities.jacobian, p.mass.shape[0]
    tied = sum_leading([(p.equalities.weight[e] * j[e])[:, None] * j[e][None] for e in range(j.shape[0])])
    rest = core - tied.shape[0]
    return QuadraticTerms(p.mass + jnp.pad(tied, ((0, rest), (0, rest), (0, 0))))


@stage
def _curvatures(p: TabletopProblem, rows: ConstraintValues) -> Float[Array, "3 3 k B"]:
    """Hessian of every cone's penalty by its rows."""
    c = cone_state(p, rows.cones)
    mu, friction = p.cones.mu, p.cones.friction
    stiff = jnp.where(c.middle, c.stiff, 0)
    full = jnp.where(c.bottom, p.cones.weight, 0)
    out = [mu, -mu * friction * c.unit[0], -mu * friction * c.unit[1]]
    turn = [-friction * c.unit[1], friction * c.unit[0]]
    bend = -mu * c.gap / jnp.where(c.middle, c.radius, 1)

    def entry(i: int, j: int) -> Float[Array, "k B"]:
        value = out[i] * out[j]
        if i and j:
            value += bend * turn[i - 1] * turn[j - 1]
        value = stiff * value
        return value + full * (p.impratio if i else 1) if i == j else value

    return jnp.stack([jnp.stack([entry(i, j) for j in range(3)]) for i in range(3)])


@stage
def _weighted_rows(blocks: Float[Array, "3 3 k B"], j: Float[Array, "3 k nv B"]) -> Float[Array, "3 k nv B"]:
    return jnp.stack([sum_leading([blocks[r, s][:, None] * j[s] for s in range(3)]) for r in range(3)])


def weighted_rows(p: TabletopProblem, rows: ConstraintValues) -> Float[Array, "3 k nv B"]:
    """Hessians of the cones times their Jacobians."""
    return _weighted_rows(_curvatures(p, rows), p.cones.jacobian)


@stage
def joint_curvature(p: TabletopProblem, rows: ConstraintValues) -> Float[Array, "nv B"]:
    """Returns the terms that limits and friction losses add to the Hessian's diagonal."""
    slopes = p.joint_limits.weight * (rows.joint_limits < 0)
    held = jnp.abs(p.friction_losses.weight * rows.friction_losses) < p.friction_losses.bound
    return sum_by_dof(p, p.joint_limits.dof, slopes) + sum_by_dof(
        p, p.friction_losses.dof, p.friction_losses.weight * held
    )


_CHUNK = 4
"""Contacts that one fused loop adds to the Hessian."""


def newton_step(
    p: TabletopProblem, quadratic: QuadraticTerms, rows: ConstraintValues, gradient: Float[Array, "nv B"]
) -> Float[Array, "nv B"]:
    """Returns the Hessian's inverse times the gradient.

    Dofs of the rim are coupled only through the core: a press couples a button to the arm. So their part of
    the Hessian is diagonal, and they are eliminated one by one.
    """
    core = p.mass.shape[0]
    left, right = p.cones.jacobian, weighted_rows(p, rows)
    diagonal = joint_curvature(p, rows)
    hessian = _on_diagonal(quadratic.core, diagonal[:core])
    cross = jnp.zeros((core, p.rim_mass.shape[0], gradient.shape[-1]), gradient.dtype)
    for k in range(0, left.shape[1], _CHUNK):
        few = slice(k, min(k + _CHUNK, left.shape[1]))
        hessian = plus_outer(hessian, left[:, few, :core], right[:, few, :core])
        if cross.shape[1]:
            cross = plus_outer(cross, left[:, few, :core], right[:, few, core:])
    if not cross.shape[1]:
        return cholesky_solve(hessian, gradient)
    rim = _rim_diagonal(p, diagonal[core:], left[:, :, core:], right[:, :, core:])
    hessian, rest = _without_rim(hessian, cross, rim, gradient)
    return _with_rim(cholesky_solve(hessian, rest), cross, rim, gradient)


@stage
def _on_diagonal(
    matrix: Float[Array, "core core B"], diagonal: Float[Array, "core B"]
) -> Float[Array, "core core B"]:
    return matrix + jnp.eye(len(diagonal), dtype=diagonal.dtype)[..., None] * diagonal


@stage
def _rim_diagonal(
    p: TabletopProblem,
    joints: Float[Array, "rim B"],
    left: Float[Array, "3 k rim B"],
    right: Float[Array, "3 k rim B"],
) -> Float[Array, "rim B"]:
    touching = sum_leading([left[r, k] * right[r, k] for r in range(3) for k in range(left.shape[1])])
    return p.rim_mass + joints + touching


@stage
def _without_rim(
    hessian: Float[Array, "core core B"],
    cross: Float[Array, "core rim B"],
    rim: Float[Array, "rim B"],
    gradient: Float[Array, "nv B"],
) -> tuple[Float[Array, "core core B"], Float[Array, "core B"]]:
    """Schur complement of the rim, and the right side that goes with it."""
    core, share = cross.shape[0], cross / rim
    rows = range(rim.shape[0])
    hessian = hessian - sum_leading([share[:, None, k] * cross[None, :, k] for k in rows])
    return hessian, gradient[:core] - sum_leading([share[:, k] * gradient[core + k] for k in rows])


@stage
def _with_rim(
    inner: Float[Array, "core B"],
    cross: Float[Array, "core rim B"],
    rim: Float[Array, "rim B"],
    gradient: Float[Array, "nv B"],
) -> Float[Array, "nv B"]:
    core = cross.shape[0]
    outer = (gradient[core:] - sum_leading([cross[c] * inner[c] for c in range(core)])) / rim
    return jnp.concatenate([inner, outer])
