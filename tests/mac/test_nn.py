"""The network against closed forms and an obvious NumPy version."""

from itertools import pairwise
from math import sqrt, tanh
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.sharding import use_abstract_mesh

from mac.config import Config
from mac.mac import MAC
from mac.nn import mlp
from mac.nn.mlp import MLP, Dense, broadcast_add, layer_norm, scalar, value_net
from mac.types import EnvSpec
from tests.helpers.platforms import mesh_of


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form (Hendrycks and Gimpel 2016)."""
    return 0.5 * x * (1 + np.tanh(sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def unit_norm(x: np.ndarray) -> np.ndarray:
    """Layer normalisation with scale 1 and shift 0."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def unit_layer_norm(x: list[float]) -> np.ndarray:
    return np.asarray(layer_norm(jnp.asarray(x), jnp.ones(len(x)), jnp.zeros(len(x))))


def hand_made_mlp(hidden: int) -> MLP:
    """Hidden layer = input, output = hidden layer: the network is then LayerNorm(GELU(x))."""
    mlp = MLP((hidden,), (hidden,), hidden, key=jr.key(0))
    eye = [jnp.eye(hidden), jnp.eye(hidden)]
    return jax.tree.unflatten(
        jax.tree.structure(mlp), [eye.pop() if leaf.ndim == 2 else leaf for leaf in jax.tree.leaves(mlp)]
    )


def count(tree: object) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def formula(*sizes: int) -> int:
    """Parameters of an MLP: weights, biases, and a scale and shift per hidden unit."""
    return sum(m * n + n for m, n in pairwise(sizes)) + 2 * sum(sizes[1:-1])


# Building blocks.


def test_gelu_is_the_tanh_form():
    x = jnp.asarray([1.0, -1.0])
    np.testing.assert_allclose(jax.nn.gelu(x, approximate=True), [0.8411919906, -0.1588080094], rtol=1e-6)
    assert gelu(np.ones(1))[0] == pytest.approx(0.5 * (1 + tanh(sqrt(2 / np.pi) * 1.044715)))


def test_layer_norm_epsilon_is_1e_6():
    # Variance 2.5e-7: ± 5e-4 / sqrt(2.5e-7 + 1e-6); with the more usual 1e-5 it would be ± 0.156.
    np.testing.assert_allclose(unit_layer_norm([0.0, 0.001]), [-0.4472136, 0.4472136], rtol=1e-4)


def test_layer_norm_of_a_constant_has_a_finite_gradient():
    def total(x):
        return jnp.sum(layer_norm(x, jnp.ones(3), jnp.zeros(3)))

    np.testing.assert_array_equal(unit_layer_norm([3.0, 3.0, 3.0]), np.zeros(3))
    assert np.all(np.isfinite(jax.grad(total)(jnp.full(3, 3.0))))


def test_layer_norm_scales_then_shifts_the_last_axis():
    x = np.random.default_rng(0).normal(2.0, 3.0, (4, 5, 6)).astype(np.float32)
    scale, shift = np.arange(6, dtype=np.float32), np.linspace(-1, 1, 6, dtype=np.float32)
    got = layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(shift))
    np.testing.assert_allclose(got, unit_norm(x) * scale + shift, rtol=1e-4, atol=1e-5)


def test_activation_comes_before_the_norm():
    mlp = hand_made_mlp(3)
    got = mlp(jnp.asarray([[1.0, -1.0, 2.0]]))[0]
    np.testing.assert_allclose(got, [-0.0437923, -1.2022606, 1.2460529], rtol=2e-6)


def test_add_broadcasts_leading_axes_only_as_numpy_does():
    x, y = np.ones((4, 1, 3)), np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(broadcast_add(jnp.asarray(x), jnp.asarray(y)), x + y)


# The whole network.


@pytest.fixture(params=["cpu", "gpu"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The platform whose form of network is traced and then runs here."""
    monkeypatch.setattr(mlp, "target_platform", lambda: request.param)
    return request.param


@pytest.mark.parametrize("seed", range(3))
def test_mlp_equals_concatenation_in_numpy(form: str, seed: int):
    rng = np.random.default_rng(seed)
    widths, hidden = tuple(rng.integers(1, 5, 3).tolist()), tuple(rng.integers(2, 9, 2).tolist())
    net = jax.jit(lambda k: MLP(widths, hidden, 3, key=k))(jr.key(seed))
    # Random biases, scales and shifts: the initial ones would hide a mistake in their place.
    net = jax.tree.map(lambda x: np.float32(x + 0.3 * rng.normal(size=x.shape)), net)
    inputs = [rng.normal(size=(6, w)).astype(np.float32) for w in widths]
    x = np.concatenate(inputs, -1).astype(np.float64)
    for dense, (scale, shift) in zip(net.dense, net.norm, strict=False):
        x = unit_norm(gelu(x @ dense.weight + dense.bias)) * scale + shift
    want = x @ net.dense[-1].weight + net.dense[-1].bias
    got = jax.jit(lambda net, xs: net(*xs))(net, inputs)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_state_shared_by_candidates_equals_a_copy_for_each(form: str):
    rng = np.random.default_rng(0)
    s, a = rng.normal(size=(5, 3)).astype(np.float32), rng.normal(size=(4, 5, 2)).astype(np.float32)
    value = jax.jit(lambda s, a: scalar(value_net((3, 2), (8, 8), key=jr.key(1)), s, a))
    shared, copied = value(s, a), value(np.broadcast_to(s, (4, 5, 3)), a)
    assert shared.shape == (4, 5)
    np.testing.assert_allclose(shared, copied, rtol=1e-5, atol=1e-6)


def test_shared_state_is_multiplied_once():
    q = value_net((3, 2), (8,), key=jr.key(1))
    jaxpr = jax.make_jaxpr(lambda s, a: scalar(q, s, a))(jnp.ones((5, 3)), jnp.ones((4, 5, 2)))
    products = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    # After the first layer the leading axes are one.
    assert products == [(5, 8), (4, 5, 8), (4 * 5, 1)]


def test_on_a_gpu_the_first_layer_is_one_matmul():
    q = value_net((3, 2), (8,), key=jr.key(1))
    with use_abstract_mesh(mesh_of("gpu")):
        jaxpr = jax.make_jaxpr(lambda s, a: scalar(q, s, a))(jnp.ones((5, 3)), jnp.ones((4, 5, 2)))
    products = [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]
    assert products == [(4 * 5, 8), (4 * 5, 1)]


def test_networks_of_both_platforms_have_equal_gradients(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        s, a = jnp.asarray(rng.normal(size=(5, 3))), jnp.asarray(rng.normal(size=(4, 5, 2)))
        net = MLP((3, None, 2), (8, 8), 2, key=jr.key(0))
        net = jax.tree.map(lambda x: jnp.asarray(x + 0.3 * rng.normal(size=x.shape)), net)

        def outcome(platform: str) -> Any:
            monkeypatch.setattr(mlp, "target_platform", lambda: platform)
            value = lambda net, s, a: jnp.sum(jnp.sin(net(s, None, a)))  # noqa: E731
            return jax.value_and_grad(value, argnums=(0, 1, 2))(net, s, a)

        chex.assert_trees_all_close(outcome("cpu"), outcome("gpu"), rtol=1e-11, atol=1e-12)


def test_two_passes_keep_the_variance_of_a_large_mean(monkeypatch: pytest.MonkeyPatch):
    x = [1000.0, 1001.0, 1002.0]  # mean of squares minus squared mean: rounding of 1e6 in float32 is 0.06
    monkeypatch.setattr(mlp, "target_platform", lambda: "gpu")
    np.testing.assert_allclose(unit_layer_norm(x), [-sqrt(1.5), 0, sqrt(1.5)], rtol=1e-5)


def test_inputs_in_the_wrong_order_are_refused():
    q = value_net((3, 2), (8,), key=jr.key(0))
    with pytest.raises(TypeError, match=r"widths \(2, 3\); this network reads \(3, 2\)"):
        q(jnp.ones((5, 2)), jnp.ones((5, 3)))


# Initialisation and sizes.


def test_weights_start_within_glorots_bound_and_biases_zero():
    dense = Dense(120, 80, key=jr.key(0))
    bound = sqrt(6 / 200)
    weight = np.asarray(dense.weight)
    assert 0.999 * bound < np.abs(weight).max() <= bound
    # 9600 draws: the standard deviation has a relative standard error of 0.45 / sqrt(9600), below 0.5%.
    assert weight.std() == pytest.approx(bound / sqrt(3), rel=0.02)
    assert abs(weight.mean()) < 4 * bound / sqrt(3 * weight.size)
    np.testing.assert_array_equal(dense.bias, np.zeros(80))


def test_first_layer_starts_as_that_of_the_concatenation():
    # The bound counts all inputs of the layer, not those of one share.
    mlp = MLP((30, 50), (40,), 5, key=jr.key(3))
    assert mlp.dense[0].weight.shape == (80, 40)
    assert np.abs(np.asarray(mlp.dense[0].weight)).max() == pytest.approx(sqrt(6 / 120), rel=0.01)
    scale, shift = mlp.norm[0]
    np.testing.assert_array_equal(scale, np.ones(40))
    np.testing.assert_array_equal(shift, np.zeros(40))


def test_layers_start_with_different_weights():
    mlp = MLP((8,), (8, 8), 8, key=jr.key(0))
    weights = [np.asarray(d.weight) for d in mlp.dense]
    assert not np.array_equal(weights[0], weights[1])
    assert not np.array_equal(weights[1], weights[2])


def test_parameter_counts_are_those_of_the_authors_networks():
    # Reward mode on cube-double (37 observations, 5 actions, chunks of 10), hidden 4 x 512.
    env = EnvSpec("cube-double", 37, 5, None, (1,), 500, 0.05)
    algo = MAC(Config(), env)
    nets = jax.eval_shape(algo.nets, jr.key(0))
    hidden = (512,) * 4
    want = {
        "model": formula(87, *hidden, 37),
        "reward": formula(87, *hidden, 1),
        "flow": formula(88, *hidden, 50),
        "policy": formula(87, *hidden, 50),
        "v": formula(37, *hidden, 1),
        "q": formula(87, *hidden, 1),
    }
    assert {name: count(getattr(nets, name)) for name in want} == want
    # Theirs has one network more, of the chunk's success; ours leaves it out (module docstring).
    assert count(nets) + count(nets.v) + formula(87, *hidden, 1) == 6_719_118


def test_parameter_counts_with_a_goal_are_the_authors():
    # puzzle-4x5 (99 observations, 20 goal entries, 5 actions, chunks of 10), hidden 4 x 256.
    def size(*widths: int, out: int) -> int:
        return count(jax.eval_shape(lambda k: MLP(widths, (256,) * 4, out, key=k), jr.key(0)))

    model, v, q = size(99, 50, out=99), size(99, 20, out=1), size(99, 20, 50, out=1)
    flow, policy = size(99, 20, 50, 1, out=50), size(99, 20, 50, out=50)
    assert (model, v, q, flow, policy) == (263267, 230401, 243201, 256050, 255794)
    assert model + 2 * v + 3 * q + flow + policy == 1_965_516  # V twice; Q, reward and success alike
