"""Networks of TAP: an encoder of trajectories, a decoder, and a prior of the codes between them.

All are causal: what is said of a step, or of a code, depends on it and on earlier ones. So the first codes of
a plan decode to the first steps of what all its codes decode to, and beam search goes on from a cache.

Source: Jiang et al. 2023 (TAP), arXiv 2208.10291.
"""

from typing import NamedTuple

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from mac.nn.mlp import Dense, broadcast_add
from mac.nn.transformer import INIT_STD, Cache, LayerNorm, Transformer, normal_dense


class BlockSizes(NamedTuple):
    """Sizes of transformer blocks.

    Attributes:
        width: of the embeddings.
        layers: number of blocks.
        heads: attention heads of each block, which share the width.
        dropout: rate, in [0, 1).
    """

    width: int
    layers: int
    heads: int
    dropout: float


class Encoder(eqx.Module):
    """Reads the steps of a window; what the blocks make of each `stride` steps is pooled to one vector."""

    inner: Dense
    position: Float[Array, "T W"]
    blocks: Transformer
    outer: Dense
    stride: int = eqx.field(static=True)

    def __init__(self, channels: int, steps: int, stride: int, sizes: BlockSizes, *, key: Key[Array, ""]):
        k_inner, k_position, k_blocks, k_outer = jr.split(key, 4)
        self.inner = normal_dense(channels, sizes.width, k_inner)
        self.position = INIT_STD * jr.normal(k_position, (steps, sizes.width))
        self.blocks = Transformer(*sizes, key=k_blocks)
        self.outer, self.stride = normal_dense(sizes.width, sizes.width, k_outer), stride

    def __call__(
        self,
        steps: Float[Array, "B T C"],
        hidden: Bool[Array, " T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B L W"]:
        """Vectors to round to codes, one for each `stride` steps.

        Args:
            hidden: steps that later ones do not see.
            key: of the dropout, None for none.
        """
        x = self.blocks(broadcast_add(self.inner(steps), self.position), hidden, key)
        pooled = jnp.max(x.reshape(len(x), -1, self.stride, x.shape[-1]), axis=2)
        return self.outer(pooled)


class Decoder(eqx.Module):
    """Turns codes, and the state before the first step, into steps.

    The state is added to the first channels of every step.
    """

    inner: Dense
    position: Float[Array, "T W"]
    blocks: Transformer
    norm: LayerNorm
    outer: Dense
    stride: int = eqx.field(static=True)

    def __init__(
        self,
        state: int,
        channels: int,
        steps: int,
        stride: int,
        sizes: BlockSizes,
        *,
        key: Key[Array, ""],
    ):
        k_inner, k_position, k_blocks, k_outer = jr.split(key, 4)
        width = sizes.width
        self.inner = normal_dense(state + width, width, k_inner)
        self.position = INIT_STD * jr.normal(k_position, (steps, width))
        self.blocks, self.norm = Transformer(*sizes, key=k_blocks), LayerNorm(width)
        self.outer, self.stride = normal_dense(width, channels, k_outer), stride

    def __call__(
        self,
        state: Float[Array, "B D"],
        codes: Float[Array, "B L W"],
        hidden: Bool[Array, " T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "B T C"]:
        """Steps that the vectors `codes` stand for, `stride` for each; arguments as for the encoder."""
        return self._steps(self.blocks(self._embed(state, codes, 0), hidden, key), state)

    def extend(
        self,
        state: Float[Array, "#B D"],
        code: Float[Array, "B W"],
        cache: Cache,
        number: int,
        hidden: Bool[Array, " T"] | None = None,
    ) -> tuple[Float[Array, "B stride C"], Cache]:
        """Steps of code `number` (0, 1, ...) alone, given a cache of the codes before it."""
        x = self._embed(state, code[:, None], number * self.stride)
        x, cache = self.blocks.extend(x, cache, number * self.stride, hidden)
        return self._steps(x, state), cache

    def _embed(
        self, state: Float[Array, "#B D"], codes: Float[Array, "B L W"], first: int
    ) -> Float[Array, "B T W"]:
        """Embeddings of the steps of codes, the first of which is step number `first`."""
        told = jnp.broadcast_to(state[:, None], (*codes.shape[:2], state.shape[-1]))
        x = jnp.repeat(self.inner(jnp.concatenate([told, codes], axis=-1)), self.stride, axis=1)
        return broadcast_add(x, self.position[first : first + x.shape[1]])

    def _steps(self, x: Float[Array, "B T W"], state: Float[Array, "#B D"]) -> Float[Array, "B T C"]:
        x = self.outer(self.norm(x))
        start = jnp.pad(state, ((0, 0), (0, x.shape[-1] - state.shape[-1])))
        return x + jnp.broadcast_to(start[:, None], x.shape)


class CodePrior(eqx.Module):
    """Says how probable each code is after earlier ones, given the state before the first step.

    The state's embedding is added at every position. The first position has no code before it, and no
    embedding of one.
    """

    state: Dense
    code: Float[Array, "K W"]
    position: Float[Array, "L W"]
    blocks: Transformer
    norm: LayerNorm
    outer: Dense

    def __init__(self, state: int, codes: int, length: int, sizes: BlockSizes, *, key: Key[Array, ""]):
        k_state, k_code, k_position, k_blocks, k_outer = jr.split(key, 5)
        width = sizes.width
        self.state = normal_dense(state, width, k_state)
        self.code = INIT_STD * jr.normal(k_code, (codes, width))
        self.position = INIT_STD * jr.normal(k_position, (length, width))
        self.blocks, self.norm = Transformer(*sizes, key=k_blocks), LayerNorm(width)
        self.outer = normal_dense(width, codes, k_outer)

    def __call__(
        self, state: Float[Array, "B D"], codes: Int[Array, "B L1"], key: Key[Array, ""] | None = None
    ) -> Float[Array, "B L K"]:
        """Logits of the first code, and of the one after each of `codes`; `key` of the dropout."""
        x = jnp.pad(self.code[codes], ((0, 0), (1, 0), (0, 0)))
        x = x + jnp.broadcast_to(self.state(state)[:, None], x.shape)
        return self.outer(self.norm(self.blocks(broadcast_add(x, self.position[: x.shape[1]]), None, key)))

    def extend(
        self, state: Float[Array, "#B D"], previous: Int[Array, " B"] | None, cache: Cache, number: int
    ) -> tuple[Float[Array, "B K"], Cache]:
        """Logits of code `number` (0, 1, ...), given the one before it and a cache of those before that."""
        x = broadcast_add(self.state(state), self.position[number])
        x = x if previous is None else broadcast_add(x, self.code[previous])
        x, cache = self.blocks.step(x, cache, number)
        return self.outer(self.norm(x)), cache
