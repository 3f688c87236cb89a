"""Networks without gradient: their rounding, how often it is done, and that nothing else is rounded."""

import dataclasses
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend import core

from baselines import REGISTRY
from mac.algorithm import AbstractAlgorithm
from mac.data.sampler import sample
from mac.errors import UserError
from mac.mac import MAC
from mac.nn.diffusion_resnet import ResNet
from mac.nn.frozen import Numerics, RoundedWeight
from mac.nn.gaussian_policy import GaussianPolicy
from mac.nn.mlp import MLP, Dense
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.segment import init, segment
from mac.run.train import RunConfig
from tests.helpers.algorithm_cases import imagined_steps, make, mode_of
from tests.helpers.jaxprs import equations
from tests.helpers.mac_cases import draw_batch
from tests.helpers.numpy_mac import fresh
from tests.helpers.platforms import mesh_of
from tests.helpers.toy_algorithm import Walk, make_job, result, run
from tests.helpers.toy_env import window

BITS = {"bf16": 8, "tf32": 11}
"""Significant bits of an operand, the leading one included: rounding errs by 2**-BITS of it at most."""
BF16 = Numerics("bf16")
GPU = mesh_of("gpu")
leaves = jax.tree.leaves


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """Float32 numbers to the nearest with so many significant bits, ties to even, by their integers."""
    drop = 24 - bits
    whole = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    odd = (whole >> np.uint64(drop)) & np.uint64(1)
    near = (whole + np.uint64((1 << (drop - 1)) - 1) + odd) >> np.uint64(drop) << np.uint64(drop)
    return near.astype(np.uint32).view(np.float32)


def in_numpy(mlp: MLP, bits: int, *inputs: np.ndarray) -> np.ndarray:
    """The network in float64, but for operands of matmuls, which are rounded."""
    x = np.concatenate(inputs, -1)
    for number, dense in enumerate(mlp.dense):
        if number:
            scale, shift = (np.asarray(each, np.float64) for each in mlp.norm[number - 1] or ())
            x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
            x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift
        operands = [rounded(np.asarray(each), bits).astype(np.float64) for each in (x, dense.weight)]
        x = operands[0] @ operands[1] + np.asarray(dense.bias, np.float64)
    return x


def network(*widths: int, hidden: tuple[int, ...] = (24, 24), seed: int = 0) -> MLP:
    """A network with no trivial bias, scale or shift."""
    mlp = MLP(widths, hidden, 5, key=jr.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), jnp.float32), mlp)


@pytest.mark.parametrize("precision", BITS)
def test_a_matmul_errs_by_the_rounding_of_its_operands(precision: Any):
    """A term's two factors err by u = 2**-BITS each, so the sum by (2u + u²) of the terms' sizes at most."""
    dense, x = Dense(40, 30, key=jr.key(0)), jr.normal(jr.key(1), (50, 40))
    error = np.abs(Numerics(precision).freeze(dense)(x) - dense(x))
    unit = 2.0 ** -BITS[precision]
    bound = (2 * unit + unit**2) * (np.abs(x) @ np.abs(dense.weight))
    assert np.all(error <= bound + 1e-5)
    assert np.max(error / bound) > 0.1, "it is rounded at all"


@pytest.mark.parametrize("precision", BITS)
def test_emulated_rounding_is_that_of_the_format(precision: Any):
    mlp, rng = network(7, 3), np.random.default_rng(1)
    inputs = [rng.normal(size=(200, width)).astype(np.float32) for width in (7, 3)]
    want = in_numpy(mlp, BITS[precision], *inputs)
    got = Numerics(precision).freeze(mlp)(*map(jnp.asarray, inputs))
    plain = np.asarray(mlp(*map(jnp.asarray, inputs)))
    error, rounding = (np.sqrt(np.mean(np.square(np.asarray(x) - want))) for x in (got, plain))
    # Float32's own rounding moves a few operands across the middle between two neighbours.
    assert error < 0.1 * rounding
    assert np.median(np.abs(np.asarray(got) - want)) < 1e-6
    # Errors of layers are independent and add up: about u sqrt(2) each, of outputs of size 1.
    assert 0.1 < rounding / (2.0 ** -BITS[precision] * np.sqrt(2 * 3) * np.std(want)) < 3


def test_bfloat16_is_rounded_to_nearest_even():
    x = np.asarray([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8 - 2**-20, 3e38], np.float32)
    np.testing.assert_array_equal(rounded(x, 8), np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float32))
    emulated = jax.lax.reduce_precision(jnp.asarray(x), 8, 7)
    np.testing.assert_array_equal(rounded(x, 8), emulated)


def test_a_gpu_multiplies_bfloat16_and_sums_float32():
    with jax.sharding.use_abstract_mesh(GPU):
        frozen = BF16.freeze(Dense(4, 3, key=jr.key(0)))
        jaxpr = jax.make_jaxpr(frozen)(jnp.ones((2, 4)))
    assert isinstance(frozen.weight, RoundedWeight) and frozen.weight.value.dtype == jnp.bfloat16
    (product,) = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    assert {str(x.aval.dtype) for x in product.invars} == {"bfloat16"}
    assert jaxpr.out_avals[0].dtype == product.outvars[0].aval.dtype == jnp.float32


def test_every_kind_of_network_is_rounded():
    key, x = jr.key(0), jnp.linspace(-1, 1, 12).reshape(4, 3)
    gaussian = GaussianPolicy((3,), (8, 8), 2, key=key)
    resnet = ResNet((3,), (8, 8), 2, dropout=0.0, key=key)
    calls = {
        "gaussian": (gaussian, lambda net: net(x).log_std),
        "resnet": (resnet, lambda net: net(x, time=x[:, :1])),
    }
    for name, (net, call) in calls.items():
        difference = float(jnp.max(jnp.abs(call(BF16.freeze(net)) - call(net))))
        assert 0 < difference < 0.1, name


# What is rounded, and how often.


def test_without_a_choice_a_network_is_itself():
    mlp = network(3)
    for numerics in (Numerics(), Numerics("float32")):
        chex.assert_trees_all_equal(numerics.freeze(mlp), mlp)
    with jax.sharding.use_abstract_mesh(GPU):
        for numerics in (Numerics(), Numerics("float32"), Numerics("tf32")):
            assert jax.tree.structure(numerics.freeze(mlp)) == jax.tree.structure(mlp)
            chex.assert_trees_all_equal_dtypes(numerics.freeze(mlp), mlp)


def test_auto_is_tf32_on_a_gpu_and_float32_on_a_cpu():
    assert Numerics().resolved().precision == ("float32" if jax.default_backend() == "cpu" else "tf32")
    with jax.sharding.use_abstract_mesh(GPU):
        assert Numerics().resolved().precision == "tf32"
        assert BF16.resolved().precision == "bf16"


def test_no_gradient_passes_through_a_frozen_network():
    mlp, x = network(3), jnp.ones((2, 3))
    gradient = jax.grad(lambda mlp: jnp.sum(BF16.freeze(mlp)(x)))(mlp)
    assert not any(np.any(leaf) for leaf in leaves(gradient))


def small(**changes: Any) -> MAC:
    """MAC whose weights have shapes that no activations have."""
    algo = make("mac", "reward", **{"batch": 8, "hidden": (10, 12)} | changes)
    assert isinstance(algo, MAC)
    return algo


def test_networks_that_learn_are_not_rounded():
    """Losses on the data, and the gradients of the whole loss in networks that only those train."""
    algo = small()
    state, batch = fresh(algo), draw_batch(algo, jr.key(2))
    found = [
        jax.jit(jax.grad(each.loss, has_aux=True))(state.nets, state.target, batch, jr.key(5))
        for each in (algo, algo.with_numerics(BF16))
    ]
    (plain, plain_metrics), (rough, rough_metrics) = found
    for name in ("model", "reward", "flow"):
        chex.assert_trees_all_close(getattr(rough, name), getattr(plain, name), rtol=1e-6, atol=1e-7)
    for name in ("model/dynamics_loss", "model/reward_loss", "policy/flow_loss"):
        np.testing.assert_allclose(rough_metrics[name], plain_metrics[name], rtol=1e-6)
    for name in ("policy/distil_loss", "value/loss", "critic/loss"):
        assert rough_metrics[name] != plain_metrics[name], name
        assert rough_metrics[name] == pytest.approx(float(plain_metrics[name]), rel=0.2)


def update_of(algo: Any) -> core.Jaxpr:
    """The update as it is traced for a GPU, within the algorithm's choice of matmuls."""
    key = jax.eval_shape(lambda: jr.key(0))
    state = jax.eval_shape(algo.init, key)
    batch = jax.eval_shape(lambda: draw_batch(algo, jr.key(0)))
    with jax.sharding.use_abstract_mesh(GPU), algo.numerics.matmuls():
        return jax.make_jaxpr(algo.update)(state, batch, jnp.zeros((), jnp.int32), key).jaxpr


def test_weights_are_rounded_once_per_update():
    algo = small()
    nets = jax.eval_shape(algo.nets, jr.key(0))
    shapes = {leaf.shape for leaf in leaves(nets) if leaf.ndim == 2}
    casts = [
        inside
        for eqn, inside in equations(update_of(algo.with_numerics(BF16)))
        if eqn.primitive.name == "convert_element_type"
        and eqn.params["new_dtype"] == jnp.bfloat16
        and eqn.invars[0].aval.shape in shapes
    ]
    assert casts and not any(casts)


def matmuls_of(jaxpr: core.Jaxpr) -> list[Any]:
    return [eqn for eqn, _ in equations(jaxpr) if eqn.primitive.name == "dot_general"]


def test_float32_on_a_gpu_is_full_precision_in_every_matmul():
    highest = (jax.lax.Precision.HIGHEST,) * 2
    products = matmuls_of(update_of(small().with_numerics(Numerics("float32"))))
    assert products and {eqn.params["precision"] for eqn in products} == {highest}
    assert {eqn.params["precision"] for eqn in matmuls_of(update_of(small()))} == {None}


def test_bf16_on_a_gpu_is_for_networks_without_gradient():
    products = matmuls_of(update_of(small().with_numerics(BF16)))
    dtypes = [{x.aval.dtype.name for x in eqn.invars} for eqn in products]
    assert {"bfloat16"} in dtypes and {"float32"} in dtypes
    assert all(len(each) == 1 for each in dtypes)
    assert {eqn.outvars[0].aval.dtype.name for eqn in products} == {"float32"}


@pytest.mark.parametrize("name", REGISTRY)
def test_every_algorithm_is_updated_in_bf16(name: str):
    algo = make(name, mode_of(name))
    rough = algo.with_numerics(BF16)
    assert rough != algo and rough.numerics == BF16
    assert dataclasses.replace(rough, numerics=Numerics()).sample == algo.sample

    def update(algo: AbstractAlgorithm) -> Any:
        state = algo.init(jr.key(0)).without_memory()
        batch = sample(window(algo.sample.chunk), algo.sample, jr.key(1))
        if algo.replay:
            batch = dataclasses.replace(batch, imagined=imagined_steps(algo))
        return algo.update(state, batch, jnp.zeros((), jnp.int32), jr.key(2))

    chex.assert_trees_all_equal_shapes_and_dtypes(
        jax.eval_shape(lambda: update(rough)), jax.eval_shape(lambda: update(algo))
    )


# In a run.


@pytest.mark.slow
def test_the_choice_is_part_of_a_programs_key():
    algo = small()
    mesh, keys = seed_mesh(1), seed_keys(0, 1)
    ends = []
    for each in (algo, algo.with_numerics(BF16), algo):
        state = init(each, mesh, place(mesh, keys, SEED))
        rows = place(mesh, window(each.sample.chunk), ALL)
        args = (place(mesh, keys, SEED), np.arange(2, dtype=np.int32), state)
        ends.append(leaves(jax.device_get(segment(each, mesh, rows, *args)[0].nets)))
    assert any(np.any(x != y) for x, y in zip(ends[0], ends[1], strict=True))
    assert all(np.array_equal(x, y) for x, y in zip(ends[0], ends[2], strict=True))


@pytest.mark.slow
def test_a_run_in_bf16_resumes_with_the_same_bits(tmp_path: Path):
    config = RunConfig(segment=2, eval_every=100, checkpoint_every=2, keep=9, precision="bf16")
    run(make_job(6, algo=small(), run=config), tmp_path / "straight")
    run(make_job(4, algo=small(), run=config), tmp_path / "stopped")
    run(make_job(6, algo=small(), run=config), tmp_path / "stopped", resume=True)
    assert result(tmp_path / "stopped")["arrays"] == result(tmp_path / "straight")["arrays"]
    other = make_job(6, algo=small(), run=dataclasses.replace(config, precision="auto"))
    run(other, tmp_path / "plain")
    assert result(tmp_path / "plain")["arrays"] != result(tmp_path / "straight")["arrays"]


def test_an_algorithm_that_freezes_nothing_trains_as_before(tmp_path: Path):
    run(make_job(4), tmp_path / "plain")
    run(make_job(4, run=RunConfig(2, 8, 4, precision="bf16")), tmp_path / "rough")
    assert result(tmp_path / "plain")["arrays"] == result(tmp_path / "rough")["arrays"]


class Own(Walk):
    def __init__(self, size: int):
        self.size = size


def test_a_constructor_without_the_field_is_named():
    assert RunConfig().applied_to(Own(2)).numerics == Numerics()
    with pytest.raises(UserError, match="constructor of Own does not take `numerics`; leave them out"):
        RunConfig(precision="bf16").applied_to(Own(2))


def test_an_algorithms_own_choice_stays_where_the_run_makes_none():
    algo = small().with_numerics(BF16)
    assert RunConfig().applied_to(algo) is algo
    assert RunConfig(precision="float32").applied_to(algo).numerics == Numerics("float32")


def test_an_unknown_precision_is_refused():
    config = RunConfig()
    object.__setattr__(config, "precision", "fp8")  # as a caller whose types nobody checks
    with pytest.raises(UserError, match=r"--run\.precision=fp8: must be one of auto, float32, tf32, bf16"):
        config.__post_init__()
