"""Causal transformer blocks with LayerNorm before each branch, and cached decoding."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Bool, Float, Int, Key, PyTree

from mac.nn.mlp import Dense, broadcast_add, dropout, layer_norm

LAYER_NORM_EPS = 1e-5  # PyTorch's default; the one that the sequence models were published with
INIT_STD = 0.02


def normal_dense(in_size: int, out_size: int, key: Key[Array, ""]) -> Dense:
    """An affine map with weights from N(0, 0.02), as in GPT-2, and zero bias."""
    k_replaced, k_weight = jr.split(key)
    dense = Dense(in_size, out_size, key=k_replaced)
    return eqx.tree_at(lambda d: d.weight, dense, INIT_STD * jr.normal(k_weight, (in_size, out_size)))


def matmul_weights(nets: PyTree) -> PyTree:
    """Tells which arrays of networks decay: weights of matmuls, but no bias, LayerNorm or embedding."""

    def is_weight(path: tuple[Any, ...], leaf: Array) -> bool:
        del leaf
        return path[-1].name in ("weight", "heads")

    return jax.tree_util.tree_map_with_path(is_weight, nets)


class LayerNorm(eqx.Module):
    """Layer normalisation of the last axis, with eps 1e-5."""

    scale: Float[Array, " W"]
    bias: Float[Array, " W"]

    def __init__(self, width: int):
        self.scale, self.bias = jnp.ones(width), jnp.zeros(width)

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
        return layer_norm(x, self.scale, self.bias, LAYER_NORM_EPS)


class LayerCache(NamedTuple):
    """Keys and values of one layer's attention, one slot per position."""

    keys: Float[Array, "*B h L d"]
    values: Float[Array, "*B h L d"]


Cache = tuple[LayerCache, ...]
"""Keys and values of all layers; every array's leading axes are those of the batch."""


class Attention(eqx.Module):
    """Causal self-attention of several heads."""

    qkv: Dense
    out: Dense
    heads: int = eqx.field(static=True)
    rate: float = eqx.field(static=True)

    def __init__(self, width: int, heads: int, rate: float, key: Key[Array, ""]):
        if width % heads:
            raise ValueError(f"the width {width} is not a multiple of the {heads} heads")
        k_qkv, k_out = jr.split(key)
        self.qkv, self.out = normal_dense(width, 3 * width, k_qkv), normal_dense(width, width, k_out)
        self.heads, self.rate = heads, rate

    def __call__(
        self,
        x: Float[Array, "*B T W"],
        cache: LayerCache | None,
        visible: Bool[Array, "*M T L"],
        key: Key[Array, ""] | None,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "*B T W"], LayerCache]:
        """Output for each query, and the cache with the keys and values of `x` written at `position`.

        Without a cache the keys are those of `x` alone.
        """
        *lead, length, width = x.shape
        # A bias of the keys would add the same to all scores of a query, which changes no weight. Its
        # gradient is rounding error, which Adam would blow up to steps of the learning rate.
        query_bias, _, value_bias = jnp.split(self.qkv.bias, 3)
        bias = jnp.concatenate([query_bias, jnp.zeros_like(query_bias), value_bias])
        split = broadcast_add(x @ self.qkv.weight, bias).reshape(
            *lead, length, 3, self.heads, width // self.heads
        )
        query, new_keys, new_values = (jnp.moveaxis(split[..., i, :, :], -2, -3) for i in range(3))
        cache = (
            LayerCache(new_keys, new_values)
            if cache is None
            else LayerCache(
                jax.lax.dynamic_update_slice_in_dim(cache.keys, new_keys, position, axis=-2),
                jax.lax.dynamic_update_slice_in_dim(cache.values, new_values, position, axis=-2),
            )
        )
        scores = (query @ jnp.swapaxes(cache.keys, -1, -2)) * (width // self.heads) ** -0.5
        seen = jnp.broadcast_to(jnp.expand_dims(visible, -3), scores.shape)
        k_weights, k_out = (None, None) if key is None else jr.split(key)
        weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(scores.dtype).min), axis=-1)
        mixed = dropout(weights, self.rate, k_weights) @ cache.values
        merged = jnp.moveaxis(mixed, -3, -2).reshape(*lead, length, width)
        return dropout(self.out(merged), self.rate, k_out), cache


class Block(eqx.Module):
    """Attention, then a layer four times as wide with the exact GELU; a residual connection around each."""

    norm_attention: LayerNorm
    attention: Attention
    norm_mlp: LayerNorm
    up: Dense
    down: Dense
    rate: float = eqx.field(static=True)

    def __init__(self, width: int, heads: int, rate: float, key: Key[Array, ""]):
        k_attention, k_up, k_down = jr.split(key, 3)
        self.norm_attention, self.norm_mlp = LayerNorm(width), LayerNorm(width)
        self.attention = Attention(width, heads, rate, k_attention)
        self.up, self.down = normal_dense(width, 4 * width, k_up), normal_dense(4 * width, width, k_down)
        self.rate = rate

    def __call__(
        self,
        x: Float[Array, "*B T W"],
        cache: LayerCache | None,
        visible: Bool[Array, "*M T L"],
        key: Key[Array, ""] | None,
        position: Int[Array, ""] | int,
    ) -> tuple[Float[Array, "*B T W"], LayerCache]:
        k_attention, k_mlp = (None, None) if key is None else jr.split(key)
        mixed, cache = self.attention(self.norm_attention(x), cache, visible, k_attention, position)
        x = x + mixed
        wide = jax.nn.gelu(self.up(self.norm_mlp(x)), approximate=False)
        return x + dropout(self.down(wide), self.rate, k_mlp), cache


class Transformer(eqx.Module):
    """Causal transformer blocks that read embeddings, without a last LayerNorm.

    A query sees the keys of its own and earlier positions, except hidden ones. A key is hidden from all
    queries: `hidden` is `[L]`, or `[*B, L]` where sequences differ. Position 0 should stay visible to the
    sequence's first query; a query that sees no key averages all of them.

    Dropout applies to the input, the attention weights and the branches, and only where a key is given.

    Source: the GPT of Janner et al. 2021 (arXiv 2106.02039).
    """

    blocks: tuple[Block, ...]
    rate: float = eqx.field(static=True)

    def __init__(self, width: int, layers: int, heads: int, dropout: float, key: Key[Array, ""]):
        """Makes the blocks.

        Args:
            width: of the embeddings; a multiple of `heads`.
            dropout: probability that an entry is set to 0, where a key is given.

        Raises:
            ValueError: `width` is not a multiple of `heads`.
        """
        self.blocks = tuple(Block(width, heads, dropout, k) for k in jr.split(key, layers))
        self.rate = dropout

    def _run(
        self,
        x: Float[Array, "*B T W"],
        cache: Cache | None,
        visible: Bool[Array, "*M T L"],
        key: Key[Array, ""] | None = None,
        position: Int[Array, ""] | int = 0,
    ) -> tuple[Float[Array, "*B T W"], Cache]:
        count = len(self.blocks)
        k_input, *keys = (None,) * (count + 1) if key is None else jr.split(key, count + 1)
        x, caches = dropout(x, self.rate, k_input), cache or (None,) * count
        written = []
        for block, layer, k in zip(self.blocks, caches, keys, strict=True):
            x, layer = block(x, layer, visible, k, position)
            written.append(layer)
        return x, tuple(written)

    def __call__(
        self,
        x: Float[Array, "*B T W"],
        hidden: Bool[Array, "*M T"] | None = None,
        key: Key[Array, ""] | None = None,
    ) -> Float[Array, "*B T W"]:
        """Outputs for whole sequences; `key` switches dropout on."""
        visible = _visible(0, x.shape[-2], x.shape[-2], hidden)
        return self._run(x, None, visible, key)[0]

    def empty_cache(self, batch_shape: tuple[int, ...], length: int) -> Cache:
        """A cache of `length` positions, all of them unwritten."""

        def zeros(block: Block) -> Float[Array, "*B h L d"]:
            attention = block.attention
            width = attention.out.weight.shape[0]
            shape = (*batch_shape, attention.heads, length, width // attention.heads)
            return jnp.zeros(shape, attention.out.weight.dtype)

        return tuple(LayerCache(zeros(block), zeros(block)) for block in self.blocks)

    def extend(
        self,
        x: Float[Array, "*B T W"],
        cache: Cache,
        position: Int[Array, ""] | int,
        hidden: Bool[Array, "*M L"] | None = None,
    ) -> tuple[Float[Array, "*B T W"], Cache]:
        """Outputs for the tokens at `position`, `position + 1` ..., and the cache with them written.

        The earlier positions have been written or are hidden; later ones are not read.
        """
        length = cache[0].keys.shape[-2]
        return self._run(x, cache, _visible(position, x.shape[-2], length, hidden), None, position)

    def step(
        self,
        x: Float[Array, "*B W"],
        cache: Cache,
        position: Int[Array, ""] | int,
        hidden: Bool[Array, "*M L"] | None = None,
    ) -> tuple[Float[Array, "*B W"], Cache]:
        """`extend` for a single token."""
        y, cache = self.extend(jnp.expand_dims(x, -2), cache, position, hidden)
        return y[..., 0, :], cache


def _visible(
    position: Int[Array, ""] | int, queries: int, keys: int, hidden: Bool[Array, "*M L"] | None
) -> Bool[Array, "*M T L"]:
    """Keys that each query sees; queries begin at `position`."""
    at = jnp.arange(queries, dtype=jnp.int32) + jnp.asarray(position, jnp.int32)
    causal = jnp.arange(keys, dtype=jnp.int32)[None, :] <= at[:, None]
    if hidden is None:
        return causal
    shape = (*hidden.shape[:-1], queries, keys)
    return jnp.broadcast_to(causal, shape) & ~jnp.broadcast_to(jnp.expand_dims(hidden, -2), shape)
