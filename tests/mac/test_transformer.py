"""The causal transformer against NumPy in float64, and cached decoding against the whole forward."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.nn.mlp import dropout
from mac.nn.transformer import Transformer
from tests.helpers import numpy_transformer

WIDTH, LAYERS, HEADS, BATCH, LENGTH = 8, 2, 2, 3, 6
HIDDEN = np.arange(LENGTH) % 3 == 2
HIDDEN_BY_ROW = np.arange(LENGTH) < np.arange(BATCH)[:, None]
"""Left padding of 0, 1 and 2 tokens. A padded query sees nothing, so only later ones are compared."""


def random_net(key: jax.Array) -> Transformer:
    """A transformer whose scales and biases are random, too."""
    net = Transformer(WIDTH, LAYERS, HEADS, 0.0, key)
    leaves, form = jax.tree.flatten(eqx.filter(net, eqx.is_array))
    noise = [x + 0.3 * jr.normal(k, x.shape) for x, k in zip(leaves, jr.split(key, len(leaves)), strict=True)]
    return eqx.combine(jax.tree.unflatten(form, noise), net)


def in_float64(net: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64) if eqx.is_array(x) else x, net)


def inputs(key: jax.Array) -> jax.Array:
    return jr.normal(key, (BATCH, LENGTH, WIDTH))


@pytest.mark.parametrize("hidden", [None, HIDDEN, HIDDEN_BY_ROW], ids=["causal", "columns", "rows"])
def test_transformer_agrees_with_numpy(hidden: np.ndarray | None) -> None:
    net, x = random_net(jr.key(0)), inputs(jr.key(1))
    if hidden is HIDDEN_BY_ROW:
        hidden = HIDDEN_BY_ROW & (np.arange(LENGTH) > 0)  # position 0 visible: the oracle divides by 0 else
    y = net(x, None if hidden is None else jnp.asarray(hidden))
    np.testing.assert_allclose(
        y, numpy_transformer.transformer(in_float64(net), np.asarray(x, np.float64), hidden), atol=2e-5
    )


def test_transformer_sees_no_later_and_no_hidden_token() -> None:
    net, x = random_net(jr.key(0)), inputs(jr.key(1))
    changed = x.at[:, 2, 0].add(1.0)
    moved = np.abs(net(changed) - net(x)).max(axis=(0, 2))
    assert (moved[:2] == 0).all() and (moved[2:] > 1e-3).all()
    moved = np.abs(net(changed, jnp.asarray(HIDDEN)) - net(x, jnp.asarray(HIDDEN))).max(axis=(0, 2))
    assert (moved[[0, 1, 3, 4, 5]] == 0).all() and moved[
        2
    ] > 1e-3  # position 2 is hidden, but not from itself


@pytest.mark.parametrize("hidden", [None, HIDDEN, HIDDEN_BY_ROW], ids=["causal", "columns", "rows"])
def test_cached_decoding_equals_the_whole_forward(hidden: np.ndarray | None) -> None:
    net, x = random_net(jr.key(0)), inputs(jr.key(1))
    mask = None if hidden is None else jnp.asarray(hidden)
    whole = net(x, mask)
    prefix = 2
    y, cache = net.extend(x[:, :prefix], net.empty_cache((BATCH,), LENGTH), 0, mask)
    outputs = [y[:, t] for t in range(prefix)]
    for position in range(prefix, LENGTH):
        y, cache = net.step(x[:, position], cache, jnp.asarray(position), mask)
        outputs.append(y)
    seen = np.ones((BATCH, LENGTH), bool) if hidden is None else np.cumsum(~hidden, -1) > 0
    seen = np.broadcast_to(seen, (BATCH, LENGTH))
    np.testing.assert_allclose(np.stack(outputs, 1)[seen], np.asarray(whole)[seen], atol=1e-5)


def test_left_padding_that_is_hidden_changes_nothing() -> None:
    """A sequence behind hidden padding equals the sequence alone."""
    net, x = random_net(jr.key(0)), inputs(jr.key(1))
    padded = net(x, jnp.arange(LENGTH) < 2)
    np.testing.assert_allclose(padded[:, 2:], net(x[:, 2:]), atol=1e-5)


def test_dropout_keeps_the_mean_and_needs_a_key() -> None:
    x = jnp.ones((200, 200))
    np.testing.assert_array_equal(dropout(x, 0.1, None), x)
    dropped = np.asarray(dropout(x, 0.1, jr.key(0)))
    assert abs(dropped.mean() - 1) < 0.01 and abs((dropped == 0).mean() - 0.1) < 0.01
    net = Transformer(WIDTH, LAYERS, HEADS, 0.5, jr.key(0))
    z = inputs(jr.key(1))
    assert not np.allclose(net(z, key=jr.key(2)), net(z)) and np.allclose(net(z), net(z))


def test_transformer_starts_from_small_normal_weights() -> None:
    net = Transformer(64, 2, 4, 0.0, jr.key(0))
    for block in net.blocks:
        dense = block.attention.qkv, block.attention.out, block.up, block.down
        for layer in dense:
            assert abs(np.std(layer.weight) - 0.02) < 0.001 and not np.any(layer.bias)


def test_transformer_names_a_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="10 is not a multiple of the 4 heads"):
        Transformer(10, 1, 4, 0.0, jr.key(0))


def test_seeds_of_transformers_run_under_vmap() -> None:
    keys = jr.split(jr.key(0), 2)
    nets = eqx.filter_vmap(lambda k: Transformer(WIDTH, LAYERS, HEADS, 0.0, k))(keys)
    x = inputs(jr.key(1))
    both = eqx.filter_vmap(lambda net: net(x))(nets)
    one = Transformer(WIDTH, LAYERS, HEADS, 0.0, keys[1])(x)
    np.testing.assert_allclose(both[1], one, atol=1e-6)
