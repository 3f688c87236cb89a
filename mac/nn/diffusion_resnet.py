"""The residual network that IDQL's diffusion policies are."""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.nn.mlp import MLP, Dense, Norm, Style, dropout, layer_norm

FREQUENCIES, TIME_WIDTH = 32, 128
FREQUENCY_SCALE = 0.2


class Block(eqx.Module):
    """Dropout, LayerNorm, a Dense four times as wide, Mish, and a Dense back, with a residual connection."""

    norm: Norm
    up: Dense
    down: Dense

    def __init__(self, width: int, key: Key[Array, ""]):
        k_up, k_down = jr.split(key)
        self.norm = jnp.ones(width), jnp.zeros(width)
        self.up, self.down = Dense(width, 4 * width, key=k_up), Dense(4 * width, width, key=k_down)

    def __call__(
        self, x: Float[Array, "*B W"], rate: float, key: Key[Array, ""] | None
    ) -> Float[Array, "*B W"]:
        assert self.norm is not None
        y = dropout(x, rate, key)
        return x + self.down(jax.nn.mish(self.up(layer_norm(y, *self.norm))))


class ResNet(eqx.Module):
    """Blocks that read the inputs and a time, which enters through learned sines and cosines.

    Source: Hansen-Estruch et al. 2023 (IDQL, arXiv 2304.10573), the LN-ResNet.
    """

    frequency: Float[Array, "1 F"]
    time: MLP
    inner: Dense
    blocks: tuple[Block, ...]
    outer: Dense
    dropout: float = eqx.field(static=True)

    def __init__(
        self,
        in_sizes: Sequence[int | None],
        widths: Sequence[int],
        out_size: int,
        *,
        dropout: float,
        key: Key[Array, ""],
    ):
        """Makes a network.

        Args:
            in_sizes: widths of the inputs, but for the time.
            widths: of the blocks, all equal.
            dropout: share of a block's inputs that is 0, where a key is given.
        """
        k_frequency, k_time, k_in, k_out, *k_blocks = jr.split(key, 4 + len(widths))
        width, total = widths[0], sum(size or 0 for size in in_sizes) + TIME_WIDTH
        self.frequency = FREQUENCY_SCALE * jr.normal(k_frequency, (1, FREQUENCIES))
        self.time = MLP((2 * FREQUENCIES,), (TIME_WIDTH,), TIME_WIDTH, key=k_time, style=Style("mish", False))
        self.inner, self.outer = Dense(total, width, key=k_in), Dense(width, out_size, key=k_out)
        self.blocks = tuple(Block(width, k) for k in k_blocks)
        self.dropout = dropout

    def __call__(
        self,
        *inputs: Float[Array, "..."] | None,
        time: Float[Array, "*B 1"],
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*B out"]:
        """Inputs whose leading axes broadcast, and None for missing ones; `key` for dropout."""
        angle = 2 * jnp.pi * time @ self.frequency
        features = self.time(jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1))
        given = [x for x in inputs if x is not None]
        lead = jnp.broadcast_shapes(*(x.shape[:-1] for x in (*given, features)))
        wide = [jnp.broadcast_to(x, (*lead, x.shape[-1])) for x in (*given, features)]
        x = self.inner(jnp.concatenate(wide, axis=-1))
        keys = [None] * len(self.blocks) if key is None else jr.split(key, len(self.blocks))
        for block, k in zip(self.blocks, keys, strict=True):
            x = block(x, self.dropout, k)
        return self.outer(jax.nn.mish(x))
