"""Diffuser and HD-DA in NumPy and float64: the U-Net step by step, losses, and sampling of plans."""

from itertools import pairwise
from typing import Any

import jax
import jax.random as jr
import numpy as np

from mac.types import Batch
from tests.helpers.numpy_ablations import normal, wide
from tests.helpers.numpy_baselines import Data, mish


def conv(layer: Any, x: np.ndarray) -> np.ndarray:
    """Convolution of a trajectory [T, C], one output at a time; zeros beyond the ends."""
    weight = layer.dense.weight.reshape(layer.kernel, x.shape[1], -1)
    out = []
    for t in range(0, len(x), layer.stride):
        total = layer.dense.bias.copy()
        for k in range(layer.kernel):
            at = t + k - layer.kernel // 2
            total += x[at] @ weight[k] if 0 <= at < len(x) else 0
        out.append(total)
    return np.stack(out)


def transposed(layer: Any, x: np.ndarray) -> np.ndarray:
    """Transposed convolution, kernel 4 and stride 2: step t adds to the outputs 2t - 1 ... 2t + 2."""
    size = x.shape[1]
    taps = (layer.odd[size:], layer.even[size:], layer.odd[:size], layer.even[:size])
    out = np.tile(layer.bias, (2 * len(x), 1))
    for t, row in enumerate(x):
        for k, weight in enumerate(taps):
            if 0 <= 2 * t - 1 + k < len(out):
                out[2 * t - 1 + k] += row @ weight
    return out


def group_norm(norm: Any, x: np.ndarray) -> np.ndarray:
    channels = x.shape[1]
    groups = max(n for n in range(1, 9) if channels % n == 0 and 8 % n == 0)
    out = np.empty_like(x)
    for part in np.split(np.arange(channels), groups):
        values = x[:, part]
        out[:, part] = (values - values.mean()) / np.sqrt(values.var() + 1e-5)
    return out * norm.scale + norm.bias


def conv_block(block: Any, x: np.ndarray) -> np.ndarray:
    return mish(group_norm(block.norm, conv(block.conv, x)))


def dense(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight + layer.bias


def level(own: Any, x: np.ndarray, time: np.ndarray) -> np.ndarray:
    for block in own.blocks:
        h = conv_block(block.second, conv_block(block.first, x) + dense(block.time, mish(time)))
        x = h + (x if block.residual is None else dense(block.residual, x))
    return x


def unet(net: Any, x: np.ndarray, step: float) -> np.ndarray:
    """The U-Net on one trajectory [T, C]."""
    half = net.width // 2
    angle = [step / 10_000 ** (i / (half - 1)) for i in range(half)]
    time = mish(dense(net.time.dense[0], np.concatenate([np.sin(angle), np.cos(angle)])))
    time, skips = dense(net.time.dense[1], time), []
    for i, own in enumerate(net.down):
        x = level(own, x, time)
        skips.append(x)
        x = conv(own.resample, x) if i + 1 < len(net.down) else x
    x = level(net.middle, x, time)
    for own in net.up:
        x = transposed(own.resample, level(own, np.concatenate([x, skips.pop()], 1), time))
    return dense(net.out, conv_block(net.block, x))


def cosine(count: int) -> np.ndarray:
    """Variances that the steps add."""
    angle = [(t / count + 0.008) / 1.008 * np.pi / 2 for t in range(count + 1)]
    return np.asarray([min(1 - np.cos(b) ** 2 / np.cos(a) ** 2, 0.999) for a, b in pairwise(angle)])


def put_ends(
    x: np.ndarray, first: np.ndarray, last: np.ndarray, columns: list[int], actions: int, arrival: int = -1
) -> None:
    """Overwrites the first observation, and columns of the last, or of all from `arrival` on."""
    x[0, actions:] = first
    for column, value in zip(columns, last, strict=True):
        x[arrival:, actions + column] = value


def loss(
    net: Any, actions: np.ndarray, states: np.ndarray, columns: list[int], count: int, cfg: Any,
    weight: float, key: jax.Array,
) -> float:  # fmt: skip
    """Of one diffusion, one trajectory at a time."""
    data, own = np.concatenate([actions, states], -1), actions.shape[-1]
    k_step, k_noise = jr.split(key)
    step = np.asarray(jr.randint(k_step, (len(data),), 0, count))
    noise, betas, total = normal(k_noise, data.shape), cosine(count), 0.0
    for x0, t, z in zip(data, step, noise, strict=True):
        kept = np.prod(1 - betas[: t + 1])
        x = np.sqrt(kept) * x0 + np.sqrt(1 - kept) * z
        wanted = (x0 if cfg.predict == "data" else z).copy()
        ends = (x0[0, own:], x0[-1, own:][columns], columns, own)
        put_ends(x, *ends)
        guess = unet(net, x, float(t))
        put_ends(guess, *ends)
        put_ends(wanted, *ends)
        error = (guess - wanted) ** 2
        error[0, :own] *= weight
        total += error.sum()
    return total / data.size


def sample(
    net: Any, first: np.ndarray, last: np.ndarray, tokens: int, actions: int, columns: list[int], count: int,
    cfg: Any, key: jax.Array, arrival: int = -1,
) -> np.ndarray:  # fmt: skip
    """Trajectories by DDPM's posteriors, one at a time."""
    k_start, k_steps = jr.split(key)
    xs, betas = normal(k_start, (len(first), tokens, actions + first.shape[-1])), cosine(count)
    keys = jr.split(k_steps, count)
    noises = [normal(k, xs.shape) for k in keys]
    for i, x in enumerate(xs):
        put_ends(x, first[i], last[i], columns, actions, arrival)
        for noise, t in zip(noises, reversed(range(count)), strict=True):
            kept, before = np.prod(1 - betas[: t + 1]), np.prod(1 - betas[:t])
            guess = unet(net, x, float(t))
            if cfg.predict == "noise":
                guess = (x - np.sqrt(1 - kept) * guess) / np.sqrt(kept)
            share = np.sqrt(before) * betas[t] / (1 - kept)
            mean = share * np.clip(guess, -1, 1) + np.sqrt(1 - betas[t]) * (1 - before) / (1 - kept) * x
            x[:] = mean + (np.sqrt((1 - before) / (1 - kept) * betas[t]) * noise[i] if t else 0)
            put_ends(x, first[i], last[i], columns, actions, arrival)
    return xs


GOAL, WHOLE = [1, 0], [0, 1]
"""Columns of the point's goal, and of its state."""


def windows(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Returns actions and the states in which they are taken."""
    assert batch.states is not None
    return wide(batch.actions), np.concatenate([wide(batch.obs)[:, None], wide(batch.states)], 1)[:, :-1]


def diffuser(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    own = (*windows(batch), GOAL, cfg.diffusion_steps, cfg, cfg.action_weight)
    return {"planner": loss(nets.planner, *own, key)}


def hd_da(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_high, k_low = jr.split(key)
    a, s = windows(batch)
    jump = cfg.jump
    dense_actions = np.stack([
        [np.concatenate(row[i : i + jump]) for i in range(0, len(row), jump)] for row in a
    ])  # fmt: skip
    high = (dense_actions, s[:, ::jump], GOAL, cfg.diffusion_steps, cfg, cfg.action_weight)
    low = (a[:, : jump + 1], s[:, : jump + 1], WHOLE, cfg.low_diffusion_steps, cfg, 1.0)
    return {"high": loss(nets.high, *high, k_high), "low": loss(nets.low, *low, k_low)}


PLANNERS = {"diffuser": diffuser, "hd_da": hd_da}


def plan(
    name: str, target: Any, s: np.ndarray, g: np.ndarray, cfg: Any, key: jax.Array, elapsed: int | None = None
) -> np.ndarray:
    """Actions of plans, as many as are executed; `elapsed` steps after the start the goal is due earlier."""
    jump = 1 if name == "diffuser" else cfg.jump
    due, arrival = cfg.tokens - 1 - (elapsed or 0) // jump, -1
    if elapsed is not None:
        arrival = next(i for i in range(1, cfg.tokens) if i >= due and i * jump >= cfg.execute)
    ends = (GOAL, cfg.diffusion_steps, cfg)
    if name == "diffuser":
        xs = sample(target.planner, s, g, cfg.tokens, 2, *ends, key, arrival)
        return xs[:, : cfg.execute, :2]
    k_high, k_low = jr.split(key)
    high = sample(target.high, s, g, cfg.tokens, 2 * jump, *ends, k_high, arrival)[..., 2 * jump :]
    count = -(-cfg.execute // jump)
    joints = [(way[i], way[i + 1]) for way in high for i in range(count)]
    first, last = (np.stack(x) for x in zip(*joints, strict=True))
    low = sample(target.low, first, last, jump + 1, 2, WHOLE, cfg.low_diffusion_steps, cfg, k_low)
    ways = low.reshape(len(s), count, jump + 1, -1)
    return np.stack([np.concatenate([part[:-1] for part in way])[: cfg.execute, :2] for way in ways])
