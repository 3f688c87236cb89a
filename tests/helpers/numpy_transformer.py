"""The causal transformer in NumPy and float64, one sequence, head and query at a time."""

from math import erf
from typing import Any

import numpy as np


def layer_norm(x: np.ndarray, norm: Any) -> np.ndarray:
    unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return unit * norm.scale + norm.bias


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2)))


def attention(layer: Any, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Attention of one sequence `[T, W]`."""
    length, width = x.shape
    size = width // layer.heads
    query, key, value = np.split(x @ layer.qkv.weight + layer.qkv.bias, 3, axis=-1)
    mixed = np.zeros((length, width))
    for head in range(layer.heads):
        part = slice(head * size, (head + 1) * size)
        for t in range(length):
            seen = [i for i in range(t + 1) if not hidden[i]]
            scores = np.array([query[t, part] @ key[i, part] for i in seen]) / np.sqrt(size)
            weights = np.exp(scores - scores.max())
            mixed[t, part] = weights / weights.sum() @ value[seen, part]
    return mixed @ layer.out.weight + layer.out.bias


def block(layer: Any, x: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    x = x + attention(layer.attention, layer_norm(x, layer.norm_attention), hidden)
    wide = exact_gelu(layer_norm(x, layer.norm_mlp) @ layer.up.weight + layer.up.bias)
    return x + wide @ layer.down.weight + layer.down.bias


def transformer(net: Any, x: np.ndarray, hidden: Any = None) -> np.ndarray:
    """A `Transformer` of float64 arrays on `[B, T, W]`; `hidden` is `[T]` or `[B, T]`."""
    batch, length, _ = x.shape
    hidden = np.zeros(length, bool) if hidden is None else np.asarray(hidden)
    hidden = np.broadcast_to(hidden, (batch, length))
    outputs = []
    for sequence, mask in zip(x, hidden, strict=True):
        for layer in net.blocks:
            sequence = block(layer, sequence, mask)
        outputs.append(sequence)
    return np.stack(outputs)
