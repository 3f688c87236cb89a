"""A language model of trajectories: each number of a transition is a token of its own dimension.

A transition has K tokens: state, action, reward, and value. Every dimension has embeddings and a head of its
own; the embedding of an episode's end is shared. Value tokens are hidden from attention.

Source: Janner et al. 2021 (arXiv 2106.02039).
"""

from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key

from mac.nn.transformer import INIT_STD, Cache, LayerNorm, Transformer

Decoded = tuple[Float[Array, "n W"], Cache]
"""Output of the last token that was read, and the cache."""
Choose = Callable[[Float[Array, "n V"], Int[Array, ""], Key[Array, ""]], Int[Array, " n"]]
"""Gives a token for each row of logits, of the dimension with this number."""


class TrajectoryModel(eqx.Module):
    """Transformer whose outputs are logits of the next dimension's token."""

    token: Float[Array, "tokens W"]
    position: Float[Array, "positions W"]
    blocks: Transformer
    norm: LayerNorm
    heads: Float[Array, "K W bins_1"]

    def __init__(
        self, blocks: Transformer, width: int, dims: int, bins: int, window: int, key: Key[Array, ""]
    ):
        """Makes embeddings and heads around `blocks`, for sequences of at most `window` transitions.

        Args:
            dims: tokens of a transition, K.
            bins: tokens of a dimension, but for the one of an episode's end.
        """
        k_token, k_heads = jr.split(key)
        self.token = INIT_STD * jr.normal(k_token, (dims * bins + 1, width))
        self.position = jnp.zeros((dims * window, width))
        self.blocks, self.norm = blocks, LayerNorm(width)
        self.heads = INIT_STD * jr.normal(k_heads, (dims, width, bins + 1))

    def embed(
        self, tokens: Int[Array, "*B T"], dims: Int[Array, " T"], positions: Int[Array, " T"]
    ) -> Float[Array, "*B T W"]:
        """Embeddings of tokens of the dimensions `dims`. All dimensions share the one of an episode's end."""
        bins = self.heads.shape[-1] - 1
        numbers = jnp.where(
            tokens == bins, len(self.token) - 1, tokens + jnp.broadcast_to(bins * dims, tokens.shape)
        )
        embedded = self.token[numbers]
        return embedded + jnp.broadcast_to(self.position[positions], embedded.shape)

    def logits(self, tokens: Int[Array, "B H K"], key: Key[Array, ""] | None) -> Float[Array, "B T bins_1"]:
        """Logits of every token but the first, given those before it; `key` is for dropout."""
        batch, window, dims = tokens.shape
        order = jnp.arange(window * dims, dtype=jnp.int32)
        x = self.embed(tokens.reshape(batch, -1)[:, :-1], order[:-1] % dims, order[:-1])
        y = self.norm(self.blocks(x, order[:-1] % dims == dims - 1, key))
        # Position p predicts dimension p + 1; the last one, which is padding here, predicts nothing.
        y = jnp.pad(y, ((0, 0), (0, 1), (0, 0))).reshape(batch, window, dims, -1)
        logits = jnp.einsum("bhkw,kwn->bhkn", y, jnp.roll(self.heads, -1, axis=0))
        return logits.reshape(batch, window * dims, -1)[:, :-1]


class TrajectoryReader(eqx.Module):
    """Cached decoding of the transition that follows on `seen` others, at most `context - 1`.

    Sequences are aligned at their end: token `i` of the newest transition is always in the same slot of the
    cache. Missing transitions are hidden, and positions count from the first that is there.
    """

    model: TrajectoryModel
    context: int = eqx.field(static=True)
    seen: Int[Array, ""]

    @property
    def k(self) -> int:
        """Tokens of a transition."""
        return len(self.model.heads)

    def _missing(self) -> Int[Array, ""]:
        return (self.context - 1 - self.seen) * self.k

    def _hidden(self) -> Bool[Array, " L"]:
        slot = jnp.arange(self.context * self.k, dtype=jnp.int32)
        return (slot < self._missing()) | (slot % self.k == self.k - 1)

    def read(self, tokens: Int[Array, "beams C K"]) -> tuple[Float[Array, "beams W"], Cache]:
        """Reads the transitions before the newest; returns the last token's output."""
        beams, count, k = tokens.shape
        slot = jnp.arange(count * k, dtype=jnp.int32)
        x = self.model.embed(tokens.reshape(beams, -1), slot % k, jnp.maximum(slot - self._missing(), 0))
        cache = self.model.blocks.empty_cache((beams,), self.context * k)
        y, cache = self.model.blocks.extend(x, cache, 0, self._hidden())
        return y[:, -1], cache

    def step(
        self, token: Int[Array, " n"], cache: Cache, dim: Int[Array, ""] | int
    ) -> tuple[Float[Array, "n W"], Cache]:
        """Reads token `dim` of the newest transition."""
        at = jnp.asarray(dim, jnp.int32)
        slot = at + (self.context - 1) * self.k
        x = self.model.embed(token[:, None], at[None], (slot - self._missing())[None])
        return self.model.blocks.step(x[:, 0], cache, slot, self._hidden())

    def logits(self, y: Float[Array, "n W"], dim: Int[Array, ""] | int) -> Float[Array, "n bins_1"]:
        """Logits of token `dim`, from the output of the token before it."""
        head = jax.lax.dynamic_index_in_dim(self.model.heads, dim, keepdims=False)
        return self.model.norm(y) @ head

    def write(
        self, y: Float[Array, "n W"], cache: Cache, begin: int, end: int, choose: Choose, key: Key[Array, ""]
    ) -> tuple[Decoded, Int[Array, "n dims"]]:
        """Decodes the dimensions `begin` to `end - 1` of the newest transition, and returns their tokens.

        `choose(logits, dim, key)` gives a token; `y` is the output of the token before.
        """

        def one(carry: Decoded, inputs: tuple[Int[Array, ""], Key[Array, ""]]) -> tuple[Decoded, Array]:
            y, cache = carry
            dim, key = inputs
            token = choose(self.logits(y, dim), dim, key)
            return self.step(token, cache, dim), token

        dims = jnp.arange(begin, end, dtype=jnp.int32)
        carry, tokens = jax.lax.scan(one, (y, cache), (dims, jr.split(key, end - begin)))
        return carry, tokens.T
