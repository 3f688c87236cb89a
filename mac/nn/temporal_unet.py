"""The temporal U-Net: convolutions over time that denoise trajectories."""

import math
from collections.abc import Sequence
from itertools import pairwise

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.nn.mlp import MLP, Dense, Style, broadcast_add

GROUPS = 8
GROUP_NORM_EPS = 1e-5  # PyTorch's default, with which the published networks were trained
LONGEST_PERIOD = 10_000.0
"""Of the sines that encode a diffusion step, over 2π."""


def unfold(x: Float[Array, "B T C"], kernel: int, stride: int = 1) -> Float[Array, "B L KC"]:
    """Returns the windows of `kernel` steps around every `stride`-th step, flattened; zeros beyond the ends.

    A convolution is then one matmul. XLA's own becomes a grouped one when it is mapped over seeds' weights,
    which is slow.
    """
    reach, steps = kernel // 2, x.shape[1]
    padded = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)))
    return jnp.concatenate([padded[:, k : k + steps : stride] for k in range(kernel)], axis=-1)


def _dense(layer: Dense, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
    # XLA's CPU matmuls, and above all their gradients, are faster with a single leading axis.
    return layer(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


class Conv(eqx.Module):
    """A convolution over time with an odd kernel, padded with zeros so that every step has an output."""

    dense: Dense
    kernel: int = eqx.field(static=True)
    stride: int = eqx.field(static=True)

    def __init__(self, in_size: int, out_size: int, kernel: int, *, stride: int = 1, key: Key[Array, ""]):
        self.dense = Dense(kernel * in_size, out_size, key=key)
        self.kernel, self.stride = kernel, stride

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B L out"]:
        return _dense(self.dense, unfold(x, self.kernel, self.stride))


class Upsample(eqx.Module):
    """A transposed convolution with kernel 4 and stride 2: twice as many steps, from the same channels.

    Output 2t reads the steps t - 1 and t, output 2t + 1 the steps t and t + 1, so it is a matmul for each.
    """

    even: Float[Array, "C2 C"]
    odd: Float[Array, "C2 C"]
    bias: Float[Array, " C"]

    def __init__(self, size: int, key: Key[Array, ""]):
        k_even, k_odd = jr.split(key)
        self.even, self.odd = (Dense(2 * size, size, key=k).weight for k in (k_even, k_odd))
        self.bias = jnp.zeros(size)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B 2*T C"]:
        batch, steps, size = x.shape
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        pairs = jnp.concatenate([padded[:, :-1], padded[:, 1:]], axis=-1)
        left, right = pairs[:, :-1].reshape(-1, 2 * size), pairs[:, 1:].reshape(-1, 2 * size)
        both = jnp.concatenate([left @ self.even, right @ self.odd], axis=-1)
        return broadcast_add(both.reshape(batch, 2 * steps, size), self.bias)


class GroupNorm(eqx.Module):
    """Normalises over time and a group of channels (Wu and He 2018), then scales and shifts each channel."""

    scale: Float[Array, " C"]
    bias: Float[Array, " C"]

    def __init__(self, size: int):
        self.scale, self.bias = jnp.ones(size), jnp.zeros(size)

    def __call__(self, x: Float[Array, "B T C"]) -> Float[Array, "B T C"]:
        groups = math.gcd(GROUPS, x.shape[-1])  # fewer where channels are few
        split = x.reshape(*x.shape[:-1], groups, -1)
        mean = jnp.mean(split, axis=(1, 3), keepdims=True)
        var = jnp.mean(jnp.square(split - mean), axis=(1, 3), keepdims=True)
        unit = ((split - mean) * jax.lax.rsqrt(var + GROUP_NORM_EPS)).reshape(x.shape)
        return broadcast_add(unit * jnp.broadcast_to(self.scale, x.shape), self.bias)


class ConvBlock(eqx.Module):
    """A convolution, GroupNorm, then Mish."""

    conv: Conv
    norm: GroupNorm

    def __init__(self, in_size: int, out_size: int, kernel: int, key: Key[Array, ""]):
        self.conv, self.norm = Conv(in_size, out_size, kernel, key=key), GroupNorm(out_size)

    def __call__(self, x: Float[Array, "B T in"]) -> Float[Array, "B T out"]:
        return jax.nn.mish(self.norm(self.conv(x)))


class ResidualBlock(eqx.Module):
    """Two convolution blocks with the diffusion step's embedding added between them, and a residual.

    Where the number of channels changes, the residual passes a matmul (a convolution of kernel 1).
    """

    first: ConvBlock
    second: ConvBlock
    time: Dense
    residual: Dense | None

    def __init__(self, in_size: int, out_size: int, time_size: int, kernel: int, key: Key[Array, ""]):
        k_first, k_second, k_time, k_residual = jr.split(key, 4)
        self.first = ConvBlock(in_size, out_size, kernel, k_first)
        self.second = ConvBlock(out_size, out_size, kernel, k_second)
        self.time = Dense(time_size, out_size, key=k_time)
        self.residual = None if in_size == out_size else Dense(in_size, out_size, key=k_residual)

    def __call__(self, x: Float[Array, "B T in"], time: Float[Array, "B E"]) -> Float[Array, "B T out"]:
        h = self.second(broadcast_add(self.first(x), self.time(jax.nn.mish(time))[:, None]))
        return h + (x if self.residual is None else _dense(self.residual, x))


class Level(eqx.Module):
    """Two residual blocks, and a change of the number of steps, by a factor of 2, where one follows."""

    blocks: tuple[ResidualBlock, ResidualBlock]
    resample: Conv | Upsample | None

    def __init__(
        self, in_size: int, out_size: int, time_size: int, kernel: int, kind: str, key: Key[Array, ""]
    ):
        k_first, k_second, k_resample = jr.split(key, 3)
        self.blocks = (
            ResidualBlock(in_size, out_size, time_size, kernel, k_first),
            ResidualBlock(out_size, out_size, time_size, kernel, k_second),
        )
        self.resample = None
        if kind == "down":
            self.resample = Conv(out_size, out_size, 3, stride=2, key=k_resample)
        elif kind == "up":
            self.resample = Upsample(out_size, k_resample)

    def __call__(self, x: Float[Array, "B T in"], time: Float[Array, "B E"]) -> Float[Array, "B T out"]:
        """The blocks alone; the caller resamples, since a skip connection begins before that."""
        for block in self.blocks:
            x = block(x, time)
        return x


class TemporalUNet(eqx.Module):
    """Maps noisy trajectories and their diffusion step to trajectories of the same shape.

    Going down, each level has two residual blocks and halves the number of steps; two blocks follow at the
    lowest level. Going up, each level reads the activations of its counterpart beside its own, and doubles
    the number of steps.

    Source: Janner et al. 2022 (Diffuser, arXiv 2205.09991), appendix C.
    """

    time: MLP
    down: tuple[Level, ...]
    middle: Level
    up: tuple[Level, ...]
    block: ConvBlock
    out: Dense
    width: int = eqx.field(static=True)

    def __init__(self, size: int, channels: Sequence[int], *, kernel: int = 5, key: Key[Array, ""]):
        """Makes a network.

        Args:
            size: entries of a trajectory's step.
            channels: of each level, from the top down; the first, an even number, is the width of the
                diffusion step's embedding too.
            kernel: steps that a convolution reads, an odd number.
        """
        width, lowest = channels[0], channels[-1]
        k_time, k_middle, k_block, k_out, *k_levels = jr.split(key, 2 * len(channels) + 3)
        self.time = MLP((width,), (4 * width,), width, key=k_time, style=Style("mish", False))
        pairs, last = list(pairwise((size, *channels))), len(channels) - 1
        self.down = tuple(
            Level(m, n, width, kernel, "down" if i < last else "", k)
            for i, ((m, n), k) in enumerate(zip(pairs, k_levels[: len(pairs)], strict=True))
        )
        self.middle = Level(lowest, lowest, width, kernel, "", k_middle)
        self.up = tuple(
            Level(2 * n, m, width, kernel, "up", k)
            for (m, n), k in zip(reversed(pairs[1:]), k_levels[len(pairs) :], strict=True)
        )
        self.block, self.out = ConvBlock(width, width, kernel, k_block), Dense(width, size, key=k_out)
        self.width = width

    def __call__(self, x: Float[Array, "B T C"], step: Float[Array, " B"]) -> Float[Array, "B T C"]:
        """Trajectories whose number of steps T is a multiple of `stride`; `step` counts from 0.

        Raises:
            TypeError: at trace time, for another T.
        """
        if x.shape[1] % self.stride:
            raise TypeError(f"{x.shape[1]} steps; this network reads a multiple of {self.stride}")
        time, skips = self.time(embed(step, self.width)), []
        for level in self.down:
            x = level(x, time)
            skips.append(x)
            x = x if level.resample is None else level.resample(x)
        x = self.middle(x, time)
        for level in self.up:
            assert level.resample is not None
            x = level.resample(level(jnp.concatenate([x, skips.pop()], axis=-1), time))
        return _dense(self.out, self.block(x))

    @property
    def stride(self) -> int:
        """Steps at the top for each step of the lowest level."""
        return stride_of(len(self.down))


def stride_of(levels: int) -> int:
    """Number of which a trajectory's length must be a multiple, for a U-Net of so many levels."""
    return 2 ** (levels - 1)


def embed(step: Float[Array, " B"], width: int) -> Float[Array, "B width"]:
    """Sines and cosines of a diffusion step, with periods in a geometric sequence (Vaswani et al. 2017)."""
    half = width // 2
    decay = math.log(LONGEST_PERIOD) / max(half - 1, 1)
    angle = step[:, None] * jnp.exp(-decay * jnp.arange(half, dtype=step.dtype))[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
