"""Small states with everything that a training state may hold."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array


class Layer(eqx.Module):
    """Part of a state: `name` is static and is not saved."""

    weight: Array
    bias: Array | None
    name: str = eqx.field(static=True)


class State(eqx.Module):
    """A pytree with what training states have: modules, tuples, dicts, None, counters, seed axis."""

    layers: tuple[Layer, ...]
    extra: dict[str, Array]
    count: Array


def make_state(seed: int = 0, width: int = 5, seeds: int = 2) -> State:
    k1, k2 = jax.random.split(jax.random.key(seed))
    weight = jax.random.normal(k1, (seeds, 3, width)).at[0, 0, 0].set(-0.0).at[0, 0, 1].set(jnp.inf)
    return State(
        layers=(Layer(weight, None, "a"), Layer(weight[..., :1] * 1e-42, jnp.ones((seeds, 1)), "b")),
        extra={
            "half": jax.random.normal(k2, (seeds, 4)).astype(jnp.bfloat16),
            "flag": jnp.array([True, False]),
            "empty": jnp.zeros((seeds, 0)),
            "bits": jnp.array([2**32 - 1, 0], jnp.uint32),
        },
        count=jnp.array(7, jnp.int32),
    )


def assert_same_bits(got: State, want: State) -> None:
    """Bytes, since -0.0 equals 0.0."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
