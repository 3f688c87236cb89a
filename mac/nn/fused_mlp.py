"""An MLP's forward pass as one GPU kernel, for networks that are used without gradient.

Layer by layer, a plain program writes each matmul's result to memory and reads it back for the activation
and for LayerNorm: five to seven passes over the activations per layer. Here a program of the kernel takes a
tile of rows through all layers. Weights are streamed through shared memory; a layer's sums stay in registers
for bias, activation and LayerNorm. Its output is written once, in the operands' type, to a buffer that only
the same program reads, so it stays in the caches.

Triton, by way of Pallas, multiplies tiles whose sides are powers of two, so widths are padded with zeros; a
LayerNorm counts the true width only. `FUSED_WIDTH` is how many sums of a row fit a program's registers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from mac.nn.mlp import ACTIVATIONS, LAYER_NORM_EPS, MLP, Style, broadcast_add, check_widths

FUSED_WIDTH = 1024
"""Widest layer that the kernel takes."""
LEAST = 16
"""Least side of a tile that tensor cores multiply."""
SUMS = 32_768
"""Float32 sums of a program: half of the registers of a multiprocessor (256 KiB)."""
STEP_BYTES = 64
"""Bytes of each row and column that one step of a matmul's loop takes: 32 bfloat16 or 16 float32."""
TILES = 64
"""Tiles that a batch is cut into, at least, before tiles get higher: about half a card of multiprocessors."""
WARPS, STAGES = 8, 3

Layer = tuple[Array, ...]
"""Padded weight; of a hidden layer also the bias, and scale and shift where it is normalised."""


class FusedMLP(eqx.Module):
    """A frozen MLP that is called as `MLP` is, and evaluated by one kernel.

    A gradient with respect to its inputs is that of `plain`; there is none with respect to its weights.

    Attributes:
        plain: the same network, layer by layer.
        layers: padded weights of each layer.
        bits: mantissa bits that a CPU, which interprets the kernel, rounds operands to; None: as they are.
    """

    plain: MLP
    layers: tuple[Layer, ...]
    bits: int | None = eqx.field(static=True)
    interpret: bool = eqx.field(static=True)

    @property
    def style(self) -> Style:
        """That of the MLP."""
        return self.plain.style

    def __call__(self, *inputs: Float[Array, "..."] | None) -> Float[Array, "*B out"]:
        """Inputs as `MLP` takes them.

        Raises:
            TypeError: at trace time, when the inputs' widths are not `in_sizes`.
        """
        check_widths(inputs, self.plain.in_sizes)
        return _forward(self, inputs)


def can_fuse(mlp: MLP) -> bool:
    """True if the kernel takes a network of this style and widths; an ensemble is not one network."""
    widths = [dense.bias.shape[-1] for dense in mlp.dense]
    plain = mlp.dense[0].weight.ndim == 2 and not (mlp.style.norm_first or mlp.style.symlog)
    return plain and len(widths) > 1 and max(map(_padded, widths)) <= FUSED_WIDTH


def fuse(
    mlp: MLP, plain: MLP, round_weight: Callable[[Array], Array], bits: int | None, *, interpret: bool
) -> FusedMLP:
    """Prepares a network that `can_fuse`, once per update: rounds and pads its weights.

    Args:
        mlp: the network.
        plain: what gives the same values layer by layer.
        round_weight: from weights to operands of matmuls.
        bits: as in `FusedMLP`.
        interpret: run the kernel's steps as JAX operations, on a CPU.
    """
    layers, rows = [], 0
    for place, dense in enumerate(mlp.dense):
        weight, width = round_weight(dense.weight), _padded(dense.bias.shape[-1])
        # The rows of the first weight fill whole steps; those of the others are the columns before.
        rows = rows or -(-weight.shape[0] // _step(weight.dtype)) * _step(weight.dtype)
        last = place == len(mlp.norm)
        given = () if last else (dense.bias, *(mlp.norm[place] or ()))
        vectors = [_pad(vector, width) for vector in given]
        layers.append((_pad(weight, rows, width), *vectors))
        rows = width
    return FusedMLP(plain, tuple(layers), bits, interpret)


def _padded(width: int) -> int:
    return max(LEAST, pl.next_power_of_2(width))


def _step(dtype: Any) -> int:
    return STEP_BYTES // jnp.dtype(dtype).itemsize


def _pad(x: Array, *shape: int) -> Array:
    return jnp.pad(x, [(0, size - old) for size, old in zip(shape, x.shape, strict=True)])


@jax.custom_jvp
def _forward(net: FusedMLP, inputs: tuple[Array | None, ...]) -> Array:
    given = [x for x in inputs if x is not None]
    leading = jnp.broadcast_shapes(*(x.shape[:-1] for x in given))
    weights = [layer[0] for layer in net.layers]
    wide = [jnp.broadcast_to(x, (*leading, x.shape[-1])).reshape(-1, x.shape[-1]) for x in given]
    x = jnp.concatenate([part.astype(weights[0].dtype) for part in wide], axis=-1)
    widths, style = tuple(dense.bias.shape[-1] for dense in net.plain.dense), net.plain.style
    count, high = len(x), _rows(len(x), max(weight.shape[1] for weight in weights))
    x = _pad(x, -(-count // high) * high, weights[0].shape[0])
    out = _call(x, net.layers, widths, style, high, net.bits, interpret=net.interpret)
    # What follows takes the last bias in; in the kernel it would have to be padded.
    return broadcast_add(out[:count, : widths[-1]], net.plain.dense[-1].bias).reshape(*leading, -1)


@_forward.defjvp
def _forward_jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
    (net, inputs), (_, slopes) = primals, tangents
    return _forward(net, inputs), jax.jvp(net.plain, inputs, slopes)[1]


def _rows(count: int, width: int) -> int:
    """Rows of a tile: a power of two, as many as registers allow, while there are `TILES` of them."""
    most = min(SUMS // width, 128)
    return max(LEAST, min(most, pl.next_power_of_2(max(count // TILES, 1))))


def _call(
    x: Array,
    layers: Sequence[Layer],
    widths: tuple[int, ...],
    style: Style,
    high: int,
    bits: int | None,
    *,
    interpret: bool,
) -> Array:
    """Runs the kernel on tiles of `high` rows."""
    flat = [part for layer in layers for part in layer]
    hidden = max(layer[0].shape[1] for layer in layers[:-1])
    like = jax.eval_shape(jnp.matmul, x, layers[0][0])  # also says which seeds of a mesh a result is of

    def tiles(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((high, width), lambda tile: (tile, 0))

    def whole(part: Array) -> pl.BlockSpec:
        return pl.BlockSpec(part.shape, lambda tile: (0,) * part.ndim)

    def result(width: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return like.update(shape=(len(x), width), dtype=jnp.dtype(dtype))

    parts = tuple(len(layer) for layer in layers)
    out_width = layers[-1][0].shape[1]
    options = triton.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    _, out = pl.pallas_call(
        partial(_kernel, parts=parts, widths=widths, style=style, bits=bits, barrier=not interpret),
        grid=(len(x) // high,),
        in_specs=[tiles(x.shape[1]), *map(whole, flat)],
        out_specs=[tiles(hidden), tiles(out_width)],
        out_shape=[result(hidden, x.dtype), result(out_width, jnp.float32)],
        interpret=interpret,
        name="fused_mlp",
        compiler_params=None if interpret else options,
    )(x, *flat)
    return out


def _kernel(
    x: Any,
    *refs: Any,
    parts: tuple[int, ...],
    widths: tuple[int, ...],
    style: Style,
    bits: int | None,
    barrier: bool,
) -> None:
    """Takes a tile of rows through all layers.

    Args:
        x: the tile's inputs.
        refs: `parts[i]` arrays of each layer i; the buffer of hidden activations; the output.
        widths: of the layers before they were padded.
        barrier: wait for all threads where they exchange activations through memory.
    """
    *given, buffer, out = refs
    wait = triton.debug_barrier if barrier else lambda: None
    read, last = x, len(parts) - 1
    for place, (count, width) in enumerate(zip(parts, widths, strict=True)):
        (weight, *vectors), given = given[:count], given[count:]
        y = _matmul(read, weight, bits)
        if place == last:
            out[:] = y
            break
        bias, *norm = vectors
        y = y + bias[:][None]
        y = _normalised(ACTIVATIONS[style.activation](y), norm, width)
        wait()  # until every thread has read the activations before
        buffer[:, : y.shape[1]] = y.astype(buffer.dtype)
        wait()
        read = buffer


def _matmul(read: Any, weight: Any, bits: int | None) -> Array:
    """Product of a tile with a weight, in float32, by steps that Triton loads ahead."""
    depth, step = weight.shape[0], min(_step(weight.dtype), weight.shape[0])

    def add(place: Array, total: Array) -> Array:
        part = pl.ds(place * step, step)
        x = read[:, part]
        x = x if bits is None else lax.reduce_precision(x, 8, bits)
        return total + jnp.dot(x, weight[part, :], preferred_element_type=jnp.float32)

    return lax.fori_loop(0, depth // step, add, jnp.zeros((read.shape[0], weight.shape[1]), jnp.float32))


def _normalised(y: Array, norm: Sequence[Any], width: int) -> Array:
    """LayerNorm over the true width; padding stays 0, since its scale and shift are."""
    if not norm:
        return y
    scale, shift = (each[:][None] for each in norm)
    from_mean = y - jnp.sum(y, axis=1, keepdims=True) / width
    if width < y.shape[1]:
        from_mean = jnp.where(lax.broadcasted_iota(jnp.int32, y.shape, 1) < width, from_mean, 0.0)
    variance = jnp.sum(from_mean * from_mean, axis=1, keepdims=True) / width
    return from_mean * lax.rsqrt(variance + LAYER_NORM_EPS) * scale + shift
