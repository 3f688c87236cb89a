"""TAP's losses and plans in NumPy and float64."""

from typing import Any

import jax
import jax.random as jr
import numpy as np

from mac.types import Batch
from tests.helpers.numpy_ablations import wide
from tests.helpers.numpy_baselines import Data
from tests.helpers.numpy_mac import cross_entropy
from tests.helpers.numpy_transformer import layer_norm, transformer


def hidden_steps(cfg: Any, width: int) -> np.ndarray:
    """Steps that attention does not see; `width` is that of a step without its last entry."""
    return np.asarray([cfg.release_hidden_steps and (t + 1) % width == 0 for t in range(cfg.window)])


def standardised(scale: Any, x: np.ndarray) -> np.ndarray:
    return (x - scale.center) / (scale.half_range + 1e-3)


def steps_of(scale: Any, batch: Batch) -> np.ndarray:
    """Windows, one row at a time."""
    assert batch.states is not None and batch.return_to_go is not None and batch.rewards is not None
    made = []
    for b in range(len(batch.obs)):
        states = np.concatenate([wide(batch.obs)[b][None], wide(batch.states)[b]])
        rows = []
        for t in range(batch.actions.shape[1]):
            entries = [states[t], wide(batch.actions)[b, t], [wide(batch.rewards)[b, t]]]
            entries.append([wide(batch.return_to_go)[b, t + 1]])
            row = standardised(scale, np.concatenate(entries)) * wide(batch.valid)[b, t]
            rows.append([*row, 1 - wide(batch.masks)[b, t]])
        made.append(rows)
    return np.asarray(made)


def dense(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight + layer.bias


def encoder(net: Any, steps: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    x = transformer(net.blocks, dense(net.inner, steps) + net.position, hidden)
    pools = [x[:, t : t + net.stride].max(1) for t in range(0, x.shape[1], net.stride)]
    return dense(net.outer, np.stack(pools, 1))


def decoder(net: Any, state: np.ndarray, codes: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    made = []
    for s, sequence in zip(state, codes, strict=True):
        rows = [dense(net.inner, np.concatenate([s, c])) for c in sequence for _ in range(net.stride)]
        x = np.asarray(rows) + net.position[: len(rows)]
        x = dense(net.outer, layer_norm(transformer(net.blocks, x[None], hidden[: len(rows)])[0], net.norm))
        x[:, : len(s)] += s
        made.append(x)
    return np.asarray(made)


def prior(net: Any, state: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Log-probabilities of each code, given those before it."""
    made = []
    for s, sequence in zip(state, codes, strict=True):
        x = [dense(net.state, s) + (net.code[sequence[i - 1]] if i else 0) for i in range(len(sequence) + 1)]
        x = np.asarray(x) + net.position[: len(x)]
        logits = dense(net.outer, layer_norm(transformer(net.blocks, x[None])[0], net.norm))
        made.append(logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True)))
    return np.asarray(made)


def vectors(book: Any) -> np.ndarray:
    return book.total / book.count[:, None]


def nearest(book: Any, encoded: np.ndarray) -> np.ndarray:
    codes = vectors(book)
    distance = [[np.linalg.norm(codes - x, axis=-1) for x in window] for window in encoded]
    return np.argmin(distance, axis=-1)


def averages_loss(book: Any, encoded: np.ndarray, code: np.ndarray) -> float:
    """Half the squared distance of counts and sums from those of a batch."""
    count, total = np.zeros(len(book.count)), np.zeros(book.total.shape)
    for x, k in zip(encoded.reshape(-1, encoded.shape[-1]), code.reshape(-1), strict=True):
        count[k] += 1
        total[k] += x
    return float(np.sum((book.count - count) ** 2) + np.sum((book.total - total) ** 2)) / 2


def tap(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    """A network's loss; that of the encoder passes straight through the codes that `frozen` encodes to."""
    steps, obs, action = steps_of(target.scale, batch), d.s.shape[1], d.a.shape[1]
    s, hidden = steps[:, 0, :obs], hidden_steps(cfg, obs + action + 2)
    encoded, fixed = encoder(nets.encoder, steps, hidden), encoder(frozen.encoder, steps, hidden)
    code = nearest(frozen.codebook, fixed)
    vector = vectors(frozen.codebook)[code]

    def decoded_loss(net: Any, codes: np.ndarray) -> float:
        made, total = decoder(net, s, codes, hidden), 0.0
        for b, t in np.ndindex(*steps.shape[:2]):
            error = (made[b, t, :-1] - steps[b, t, :-1]) ** 2
            error[obs : obs + action] *= cfg.action_weight
            total += wide(batch.valid)[b, t] * np.sum(error)
        mean = total / steps[..., :-1].size
        return float(mean + cross_entropy(made[..., -1], steps[..., -1]))

    commitment = cfg.commitment * np.mean((encoded - vector) ** 2)
    log_probs = prior(nets.prior, s, code[:, :-1])
    chosen = [log_probs[b, i, code[b, i]] for b, i in np.ndindex(*code.shape)]
    return {
        "encoder": decoded_loss(frozen.decoder, encoded + (vector - fixed)) + float(commitment),
        "decoder": decoded_loss(nets.decoder, vector),
        "codebook": averages_loss(nets.codebook, fixed, code),
        "prior": -float(np.mean(chosen)),
    }


def plan(nets: Any, scale: Any, s: np.ndarray, cfg: Any, key: jax.Array) -> np.ndarray:
    """Steps of the best plan from a state in the units of observations, without a cache."""
    depth, width = cfg.horizon // cfg.stride, len(scale.center)
    state, plans = standardised(scale, np.pad(s, (0, width - len(s))))[: len(s)], [()]
    probs = [0.0]
    made = np.zeros(0)
    for d, k in enumerate(jr.split(key, depth), start=1):
        draws = cfg.expand if d > 1 else cfg.beam * cfg.expand
        noise = np.asarray(jr.gumbel(k, (len(plans), draws, cfg.codes)))
        longer, sums = [], []
        for codes, log_prob, gumbel in zip(plans, probs, noise, strict=True):
            given = np.asarray(codes, int)[None]
            log_probs = prior(nets.prior, state[None], given)[0, -1]
            for row in gumbel:
                code = int(np.argmax(row + log_probs))
                longer.append((*codes, code))
                sums.append(log_prob + log_probs[code])
        told = np.broadcast_to(state, (len(longer), len(state)))
        made = decoder(
            nets.decoder, told, vectors(nets.codebook)[np.asarray(longer)], hidden_steps(cfg, width)
        )
        made = made[..., :-1] * (scale.half_range + 1e-3) + scale.center
        scores = []
        for steps, log_prob in zip(made, sums, strict=True):
            ret = sum(cfg.discount ** (t + 1) * steps[t, -2] for t in range(d * cfg.stride - 1))
            ret += cfg.discount ** (d * cfg.stride) * steps[-1, -1]
            bound = depth * np.log(cfg.probable)
            scores.append(ret + max(cfg.likelihood_weight * min(log_prob, bound), -1e5))
        order = np.argsort(-np.asarray(scores), kind="stable")[: cfg.beam if d < depth else 1]
        plans, probs, made = [longer[i] for i in order], [sums[i] for i in order], made[order]
    return made[0]


def act(nets: Any, target: Any, s: np.ndarray, cfg: Any, key: jax.Array) -> np.ndarray:
    """The first action of the best plan from each state."""
    keys, obs = jr.split(key, len(s)), s.shape[1]
    width = len(target.scale.center) - 2
    return np.stack([plan(nets, target.scale, x, cfg, k)[0, obs:width] for x, k in zip(s, keys, strict=True)])
