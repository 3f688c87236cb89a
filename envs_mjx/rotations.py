"""Unit quaternions (w, x, y, z) and yaw angles, written for one rotation; vmap for more."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def yaw_of_quat(quat: Float[Array, " 4"]) -> Float[Array, ""]:
    """Returns the rotation about the vertical axis, radians in (-pi, pi] (roll-pitch-yaw convention)."""
    w, x, y, z = quat
    return jnp.arctan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z))


def yaw_of_mat(mat: Float[Array, "3 3"]) -> Float[Array, ""]:
    """Returns the same angle from a rotation matrix."""
    return jnp.arctan2(mat[1, 0], mat[0, 0])


def quat_about_z(yaw: Float[Array, ""]) -> Float[Array, " 4"]:
    """Returns the rotation by `yaw` radians about the vertical axis."""
    zero = jnp.zeros_like(yaw)
    return jnp.stack([jnp.cos(yaw / 2), zero, zero, jnp.sin(yaw / 2)])


def quat_mul(a: Float[Array, " 4"], b: Float[Array, " 4"]) -> Float[Array, " 4"]:
    """Returns the Hamilton product: the rotation `b` followed by `a`."""
    aw, ax, ay, az = a
    bw, bx, by, bz = b
    return jnp.stack(
        [
            aw * bw - ax * bx - ay * by - az * bz,
            aw * bx + ax * bw + ay * bz - az * by,
            aw * by - ax * bz + ay * bw + az * bx,
            aw * bz + ax * by - ay * bx + az * bw,
        ]
    )


def quat_conj(quat: Float[Array, " 4"]) -> Float[Array, " 4"]:
    """Returns the inverse rotation."""
    return quat * jnp.asarray([1.0, -1.0, -1.0, -1.0], quat.dtype)


def rotate(quat: Float[Array, " 4"], vector: Float[Array, " 3"]) -> Float[Array, " 3"]:
    """Rotates `vector` by `quat`."""
    axis = quat[1:]
    twice = 2 * jnp.cross(axis, vector)
    return vector + quat[0] * twice + jnp.cross(axis, twice)


def rotation_vector(quat: Float[Array, " 4"]) -> Float[Array, " 3"]:
    """Returns axis times angle, the angle in (-pi, pi]; zero for the identity."""
    sine = jnp.sqrt(jnp.sum(quat[1:] ** 2))
    angle = 2 * jnp.arctan2(sine, quat[0])
    angle = jnp.where(angle > jnp.pi, angle - 2 * jnp.pi, angle)
    # sin(x) ~ x near zero, where the limit of angle / sine is 2 / w.
    scale = jnp.where(sine > 1e-12, angle / jnp.where(sine > 1e-12, sine, 1.0), 2 / quat[0])
    return quat[1:] * scale
