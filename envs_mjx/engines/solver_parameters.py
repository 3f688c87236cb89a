"""MuJoCo's solver parameters: constraint stiffness, damping and impedance from `solref` and `solimp`.

Source: MuJoCo's documentation, chapter "Modeling", section "Solver parameters".
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

IMPEDANCE_RANGE = 1e-4, 0.9999
"""Least and greatest impedance that MuJoCo allows."""


def stiffness_damping(
    solref: np.ndarray, solimp: np.ndarray, timestep: float
) -> tuple[np.ndarray, np.ndarray]:
    """Returns stiffness and damping of constraints, from positive (time constant, damping ratio)."""
    time, ratio = np.maximum(solref[:, 0], 2 * timestep), solref[:, 1]
    top = np.clip(solimp[:, 1], *IMPEDANCE_RANGE)
    return 1 / (top * time * ratio) ** 2, 2 / (top * time)


def impedance(solimp: Float[Array, "n 5 #B"], gap: Float[Array, " n #B"]) -> Float[Array, " n #B"]:
    """Returns d(r) for a power of 2, which all models have."""
    low, high, width, middle = (solimp[:, k] for k in range(4))
    x = jnp.minimum(jnp.abs(gap) / width, 1)
    y = jnp.where(x < middle, x * x / middle, 1 - (1 - x) ** 2 / (1 - middle))
    return low + y * (high - low)
