"""The fused kernel, interpreted on a CPU, against the network layer by layer."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.nn import fused_mlp
from mac.nn.frozen import Numerics
from mac.nn.fused_mlp import FusedMLP, can_fuse
from mac.nn.gaussian_policy import GaussianPolicy
from mac.nn.mlp import MLP, STANDARD, Style, scalar, value_net
from mac.ops.flow import euler
from mac.run.cost.flops import matmul_flops
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from tests.helpers.algorithm_cases import make
from tests.helpers.jaxprs import equations
from tests.helpers.platforms import mesh_of
from tests.helpers.toy_env import window

ROUNDING = {"float32": 2e-6, "tf32": 1e-4, "bf16": 1e-3}
"""Of outputs of size 1: sums in another order, which now and then round an operand to its other neighbour."""


def perturbed(net: Any, seed: int = 0) -> Any:
    """The network with no trivial bias, scale or shift."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), net)


def network(
    widths: tuple[int | None, ...], hidden: tuple[int, ...], out: int, style: Style = STANDARD
) -> MLP:
    return perturbed(MLP(widths, hidden, out, key=jr.key(0), style=style))


def normal(seed: int, *shape: int) -> jax.Array:
    return jr.normal(jr.key(seed), shape)


def both(net: Any, precision: Any, call: Callable[[Any], Any]) -> tuple[Any, Any]:
    """What `call` gives for the frozen network, layer by layer and by the kernel."""

    def result(kernels: Any) -> Any:
        return jax.jit(lambda net: call(Numerics(precision, kernels).freeze(net)))(net)

    return result("plain"), result("fused")


def assert_equal(net: Any, call: Callable[[Any], Any], precision: Any = "float32") -> None:
    plain, fused = both(net, precision, call)
    assert plain.shape == fused.shape and fused.dtype == jnp.float32
    size = np.sqrt(np.mean(np.square(plain)))
    assert np.sqrt(np.mean(np.square(plain - fused))) < ROUNDING[precision] * size
    assert np.max(np.abs(plain - fused)) < 300 * ROUNDING[precision] * size


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize(
    ("hidden", "out", "rows"), [((16, 16), 16, 64), ((24, 5, 40), 3, 37), ((33,), 1, 1), ((17, 130), 20, 2)]
)
def test_values_are_those_of_the_layers(precision: Any, hidden: tuple[int, ...], out: int, rows: int):
    """Widths that are powers of two and others; batches that fill tiles and others."""
    net = network((7, 3), hidden, out)
    assert_equal(net, lambda net: net(normal(1, rows, 7), normal(2, rows, 3)), precision)


@pytest.mark.parametrize("style", [Style("gelu", False), Style("relu", True), Style("mish", False)])
def test_every_style_is_that_of_the_layers(style: Style):
    assert_equal(network((6,), (12, 20), 4, style), lambda net: net(normal(1, 9, 6)))


def test_leading_axes_broadcast_and_missing_inputs_stay_missing():
    net = network((3, None, 2), (8, 8), 4)
    assert_equal(net, lambda net: net(normal(1, 5, 3), None, normal(2, 4, 5, 2)))
    assert_equal(net, lambda net: net(normal(1, 3), None, normal(2, 2)))


def test_large_batches_have_several_tiles():
    net = network((3,), (8, 8), 4)
    assert fused_mlp._rows(2500, 16) == 64  # 2500 rows in 40 tiles, the last of which is not full
    assert_equal(net, lambda net: net(normal(1, 2500, 3)))


def test_tiles_have_as_many_rows_as_registers_allow():
    rows = fused_mlp._rows
    assert [rows(count, 512) for count in (1, 256, 2048, 10**6)] == [16, 16, 32, 64]
    assert rows(10**6, 1024) == 32 and rows(10**6, 128) == 128


def test_seeds_are_mapped():
    nets = jax.vmap(lambda k: MLP((3, 2), (8, 12), 4, key=k))(jr.split(jr.key(0), 3))
    x, y = normal(1, 3, 5, 3), normal(2, 3, 4, 5, 2)

    def call(kernels: Any) -> Any:
        return jax.jit(jax.vmap(lambda net, x, y: Numerics("bf16", kernels).freeze(net)(x, y)))(nets, x, y)

    np.testing.assert_allclose(call("fused"), call("plain"), rtol=1e-4, atol=1e-4)
    alone = Numerics("bf16", "fused").freeze(jax.tree.map(lambda leaf: leaf[1], nets))(x[1], y[1])
    np.testing.assert_allclose(call("fused")[1], alone, rtol=1e-5, atol=1e-5)


def test_a_flow_is_integrated_within_a_scan():
    flow = network((3, 4, 1), (16, 16), 4)
    assert_equal(flow, lambda net: euler(lambda x, t: net(normal(1, 6, 3), x, t), normal(2, 6, 4), 5))


def test_trunk_and_heads_of_a_gaussian_policy():
    policy = perturbed(GaussianPolicy((3,), (16, 16), 2, key=jr.key(0)))
    assert_equal(policy, lambda net: net(normal(1, 9, 3)).log_std, "bf16")


def test_widths_beyond_the_registers_stay_layer_by_layer():
    wide = jax.eval_shape(lambda: MLP((3,), (1025,), 2, key=jr.key(0)))
    linear = MLP((3,), (), 2, key=jr.key(0))
    assert not can_fuse(wide) and not can_fuse(linear)
    assert can_fuse(jax.eval_shape(lambda: MLP((3,), (1024,) * 4, 2, key=jr.key(0))))
    assert isinstance(Numerics("bf16", "fused").freeze(linear), MLP)


def test_widths_of_inputs_are_checked():
    net = Numerics(kernels="fused").freeze(network((3, 2), (8,), 1))
    assert isinstance(net, FusedMLP)
    with pytest.raises(TypeError, match=r"widths \(2, 3\); this network reads \(3, 2\)"):
        net(normal(0, 5, 2), normal(0, 5, 3))


def test_gradients_of_inputs_are_those_of_the_layers():
    """A loss may judge an action that it improves by a target network, whose weights get no gradient."""
    q = perturbed(value_net((3, 2), (8, 8), key=jr.key(0)))
    s, a = normal(1, 5, 3), normal(2, 5, 2)

    def slope(kernels: Any) -> Any:
        return jax.grad(lambda q, a: jnp.sum(scalar(Numerics("bf16", kernels).freeze(q), s, a)), (0, 1))(q, a)

    (in_weights, fused), (_, plain) = slope("fused"), slope("plain")
    np.testing.assert_allclose(fused, plain, rtol=1e-5, atol=1e-6)
    assert np.any(fused) and not any(np.any(leaf) for leaf in jax.tree.leaves(in_weights))


def test_auto_is_layer_by_layer():
    net = network((3,), (8,), 1)
    for platform in ("cpu", "gpu"):
        with jax.sharding.use_abstract_mesh(mesh_of(platform)):
            assert Numerics().resolved().kernels == "plain" and isinstance(Numerics().freeze(net), MLP)


def test_operations_are_counted_by_tile():
    net, x = network((16,), (32, 32), 16), jax.ShapeDtypeStruct((64, 16), jnp.float32)
    frozen = Numerics(kernels="fused").freeze(net)
    assert matmul_flops(frozen, x) == matmul_flops(net, x) == 2 * 64 * (16 * 32 + 32 * 32 + 32 * 16)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mac", "mac_gaussian", "fql"])
def test_updates_with_the_kernel_are_those_without(name: str):
    """Of two seeds, each on a device of its own."""
    algo, mesh = make(name, "reward", batch=8, hidden=(8, 8)), seed_mesh(2)
    keys = place(mesh, seed_keys(0, 2), SEED)
    rows = place(mesh, window(algo.sample.chunk), ALL)
    ends = []
    for numerics in (Numerics(), Numerics(kernels="fused")):
        state = init(algo, mesh, keys)
        steps = place(mesh, np.arange(2, dtype=np.int32), ALL)
        ends.append(segment(algo.with_numerics(numerics), mesh, rows, keys, steps, state)[1])
    chex.assert_trees_all_close(*jax.device_get(ends), rtol=1e-3, atol=1e-4)


def test_a_gpu_launches_one_kernel_for_each_network():
    """Of two seeds on one device; as many as there are calls of networks without gradient."""
    algo = make("mac", "reward", batch=8, hidden=(8, 8)).with_numerics(Numerics("bf16", "fused"))
    device = mesh_of("gpu")
    with jax.sharding.use_abstract_mesh(device):
        state = jax.eval_shape(jax.vmap(algo.init), seed_keys(0, 2))
        rows, steps = jax.eval_shape(lambda: window(algo.sample.chunk)), jnp.arange(2, dtype=jnp.int32)
        traced = segment.trace(algo, device, rows, seed_keys(0, 2), steps, state)
    launched = [eqn for eqn, _ in equations(traced.jaxpr.jaxpr) if eqn.primitive.name == "pallas_call"]
    # Imagination's policy, Q and model; the flow teacher; rewards; V of the last states and the second ones.
    assert len(launched) == 3 + 1 + 1 + 2
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__gpu$xla.gpu.triton" in text
