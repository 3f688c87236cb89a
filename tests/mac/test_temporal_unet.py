"""The temporal U-Net: shapes and sizes, convolutions against XLA's, and the whole against NumPy."""

from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.nn.temporal_unet import Conv, GroupNorm, TemporalUNet, Upsample, embed
from tests.helpers.numpy_mac import double, perturb
from tests.helpers.numpy_planners import unet


def trajectories(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def count(tree: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("kernel", "stride", "steps"), [(5, 1, 8), (3, 2, 8), (5, 1, 2)])
def test_convolution_is_that_of_xla(kernel: int, stride: int, steps: int):
    layer, x = Conv(3, 6, kernel, stride=stride, key=jr.key(0)), trajectories(4, steps, 3)
    layer = perturb(layer, 1)
    weight = layer.dense.weight.reshape(kernel, 3, 6)
    want = jax.lax.conv_general_dilated(
        x, weight, (stride,), [(kernel // 2, kernel // 2)], dimension_numbers=("NWC", "WIO", "NWC")
    )
    np.testing.assert_allclose(layer(x), want + layer.dense.bias[None, None], rtol=1e-4, atol=1e-5)


def test_upsampling_is_the_transpose_of_a_convolution():
    """Its matrix is that of a convolution of kernel 4, stride 2 and padding 1, transposed."""
    layer, size, steps = perturb(Upsample(3, jr.key(0)), 1), 3, 4
    taps = jnp.stack([layer.odd[size:], layer.even[size:], layer.odd[:size], layer.even[:size]])

    def forward(y: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            y, jnp.swapaxes(taps, 1, 2), (2,), [(1, 1)], dimension_numbers=("NWC", "WIO", "NWC")
        )

    x = trajectories(2, steps, size)
    _, transpose = jax.vjp(forward, jnp.zeros((2, 2 * steps, size)))
    np.testing.assert_allclose(layer(x), transpose(x)[0] + layer.bias[None, None], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "groups"), [(16, 8), (4, 4), (6, 2), (5, 1)])
def test_groups_are_fewer_where_channels_are_few(channels: int, groups: int):
    y = np.asarray(GroupNorm(channels)(3 + 2 * trajectories(2, 10, channels)))
    parts = y.reshape(2, 10, groups, -1)
    np.testing.assert_allclose(parts.mean((1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(parts.var((1, 3)), 1, rtol=1e-3)


def test_embedding_is_of_sines_then_cosines():
    got = np.asarray(embed(jnp.asarray([0.0, 3.0]), 6))
    np.testing.assert_allclose(got[0], [0, 0, 0, 1, 1, 1])
    angle = 3 / np.asarray([1, 100, 10_000])
    np.testing.assert_allclose(got[1], [*np.sin(angle), *np.cos(angle)], rtol=1e-5)


@pytest.mark.parametrize("channels", [(8,), (8, 16), (8, 4, 6)])
def test_network_is_that_of_numpy(channels: tuple[int, ...]):
    net: Any = perturb(TemporalUNet(5, channels, key=jr.key(0)), 1)
    x, step = trajectories(2, 8, 5), np.asarray([0.0, 3.0])
    want = [unet(double(net), np.asarray(row, np.float64), t) for row, t in zip(x, step, strict=True)]
    got = jax.jit(net.__call__)(x, jnp.asarray(step, jnp.float32))
    np.testing.assert_allclose(got, np.stack(want), rtol=2e-3, atol=2e-4)


def test_network_of_published_mazes_has_its_number_of_parameters():
    """Of 6 entries a token and channels 32, 128 and 256, summed layer by layer."""

    def block(m: int, n: int) -> int:
        convs = 5 * m * n + n + 5 * n * n + n + 4 * n
        return convs + 32 * n + n + (m * n + n if m != n else 0)

    def level(m: int, n: int) -> int:
        return block(m, n) + block(n, n)

    time = 32 * 128 + 128 + 128 * 32 + 32
    down = level(6, 32) + level(32, 128) + level(128, 256) + sum(3 * n * n + n for n in (32, 128))
    up = level(512, 128) + level(256, 32) + sum(4 * n * n + n for n in (128, 32))
    out = 5 * 32 * 32 + 32 + 2 * 32 + 32 * 6 + 6
    net = jax.eval_shape(lambda: TemporalUNet(6, (32, 128, 256), key=jr.key(0)))
    assert count(net) == time + down + level(256, 256) + up + out


def test_length_that_cannot_be_halved_is_an_error():
    net = TemporalUNet(2, (4, 4, 4), key=jr.key(0))
    assert net.stride == 4
    with pytest.raises(TypeError, match="6 steps; this network reads a multiple of 4"):
        net(jnp.zeros((1, 6, 2)), jnp.zeros(1))
