"""The platform that a program is for, told by its mesh."""

import jax
import jax.numpy as jnp

from mac.run.mesh import map_seeds
from mac.target_platform import target_platform
from tests.helpers.platforms import mesh_of

GPU = mesh_of("gpu")


def test_without_a_mesh_it_is_the_default_platform():
    assert target_platform() == jax.default_backend()


def test_a_mesh_decides():
    with jax.sharding.use_abstract_mesh(GPU):
        assert target_platform() == "gpu"


def test_a_compiled_function_is_traced_for_each_platform():
    traced = []

    @jax.jit
    def f(x: jax.Array) -> jax.Array:
        traced.append(target_platform())
        return x + 1

    f.trace(jnp.zeros(3))
    with jax.sharding.use_abstract_mesh(GPU):
        f.trace(jnp.zeros(3))
        f.trace(jnp.zeros(3))
    f.trace(jnp.zeros(3))
    assert traced == [jax.default_backend(), "gpu"]


def test_seeds_are_a_batch_on_a_gpu_and_a_loop_on_a_cpu():
    def program(platform: str) -> str:
        traced = jax.jit(lambda x: map_seeds(jnp.dot, x, x)).trace(jnp.ones((3, 4)))
        return traced.lower(lowering_platforms=(platform,)).as_text()

    if jax.default_backend() == "cpu":
        assert "stablehlo.while" in program("cpu")
    with jax.sharding.use_abstract_mesh(GPU):
        assert "stablehlo.while" not in program("cuda")


def test_one_seed_on_a_gpu_is_no_batch():
    with jax.sharding.use_abstract_mesh(GPU):
        jaxpr = jax.make_jaxpr(lambda x: map_seeds(jnp.dot, x, x))(jnp.ones((1, 4)))
        (got,) = map_seeds(jnp.dot, jnp.full((1, 4), 2.0), jnp.ones((1, 4)))
    (product,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert product.invars[0].aval.ndim == 1 and got == 8.0
