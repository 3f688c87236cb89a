"""LEQ's losses in NumPy and float64, its action gradients by central differences."""

from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np

from mac.types import Batch
from tests.helpers.numpy_ablations import normal
from tests.helpers.numpy_baselines import LOG_2PI, Data, net, value
from tests.helpers.numpy_mac import cross_entropy, sigmoid

STEP = 1e-5


def member(members: Any, number: int) -> Any:
    return jax.tree.map(lambda x: x[number], members)


def densities(dynamics: Any, s: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means, and logarithms of standard deviations, [E, B, D]."""
    count = len(dynamics.members.dense[0].weight)
    out = np.stack([net(member(dynamics.members, e), s, a) for e in range(count)])
    mean, spread = np.split(out, 2, axis=-1)
    return s + mean, -5 + 6 * sigmoid(spread)


def model_loss(model: Any, d: Data) -> float:
    """Loss of the dynamics, and of what a step brings."""
    mean, log_std = densities(model.dynamics, d.s, d.a)
    entry = 0.5 * ((d.after - mean) / np.exp(log_std)) ** 2 + log_std + 0.5 * LOG_2PI
    loss = np.mean(np.sum(entry, axis=-1))
    if d.g is not None:
        return float(loss) + cross_entropy(value(model.success, d.s, d.g, d.a), 1 - d.m)
    loss += np.mean((value(model.reward, d.s, d.a) - d.r) ** 2)
    return float(loss) + cross_entropy(value(model.termination, d.s, d.a), 1 - d.m)


def dealt(key: jax.Array, rows: int, members: int) -> np.ndarray:
    """The member of each row: shuffled numbers are dealt out in equal shares."""
    share = -(-rows // members)
    order = np.asarray(jr.permutation(key, members * share)).tolist()
    return np.asarray([order.index(row) // share for row in range(rows)])


def draws(key: jax.Array, cfg: Any, shape: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Models and noise of every step of a rollout."""
    drawn = []
    for k in jr.split(key, cfg.rollout):
        k_member, k_noise = jr.split(k)
        if cfg.release_members:
            members = np.asarray(jr.randint(k_member, (1, *shape), 0, cfg.members))[0]
        else:
            members = dealt(k_member, shape[0], cfg.members)[:, None]
        drawn.append((np.broadcast_to(members, shape), normal(k_noise, shape)))
    return drawn


def act(nets: Any, s: np.ndarray, g: Any) -> np.ndarray:
    return np.tanh(net(nets.actor, s, g))


class Path(NamedTuple):
    """Lists over the steps of a rollout."""

    s: list[np.ndarray]
    a: list[np.ndarray]
    q: list[np.ndarray]
    alive: list[np.ndarray]
    ret: list[np.ndarray]


def rollout(nets: Any, s: np.ndarray, a: np.ndarray, g: Any, drawn: list[Any], cfg: Any) -> Path:
    """From any step on, whose action is `a`; later actions are the policy's."""
    states, actions, rewards, masks, alive = [s], [a], [], [], [np.ones(len(s))]
    for members, noise in drawn:
        mean, log_std = densities(nets.model.dynamics, s, a)
        rows, entries = np.indices(s.shape)
        after = mean[members, rows, entries] + np.exp(log_std)[members, rows, entries] * noise
        if g is None:
            r, logit = value(nets.model.reward, s, a), value(nets.model.termination, s, a)
            m = (logit <= 0).astype(float)
        else:
            m = (value(nets.model.success, s, g, a) <= 0).astype(float)
            r = -m
        rewards.append(np.where(alive[-1] > 0, r, 0))
        masks.append(np.where(alive[-1] > 0, m, 0))
        alive.append(alive[-1] * m)
        s = after
        a = act(nets, s, g)
        states.append(s)
        actions.append(a)
    q = [value(nets.q[0], s, g, a) for s, a in zip(states, actions, strict=True)]
    return Path(states, actions, q, alive, mixture(q, rewards, masks, cfg.discount, cfg.lam))


def mixture(q: list, r: list, m: list, discount: float, lam: float) -> list[np.ndarray]:
    """Mean of the returns of 0, 1, 2, ... steps, each weighted λ times the one before it."""
    found = []
    for i in range(len(q)):
        total, weights, before, factor = 0.0, 0.0, 0.0, 1.0
        for k in range(len(q) - i):
            total = total + lam**k * (before + factor * q[i + k])
            weights += lam**k
            if i + k < len(r):
                before = before + factor * r[i + k]
                factor = factor * discount * m[i + k]
        found.append(total / weights)
    return found


def slopes(nets: Any, path: Path, g: Any, drawn: list[Any], cfg: Any) -> list[np.ndarray]:
    """Gradient of each step's mixture with respect to its action, all else given."""
    found = []
    for i, (s, a) in enumerate(zip(path.s, path.a, strict=True)):
        slope = np.zeros_like(a)
        for entry in range(a.shape[1]):
            move = STEP * np.eye(a.shape[1])[entry]
            ends = [rollout(nets, s, x, g, drawn[i:], cfg).ret[0] for x in (a + move, a - move)]
            slope[:, entry] = (ends[0] - ends[1]) / (2 * STEP)
        dead = path.alive[i] == 0  # nothing follows: only Q of the step itself counts
        if np.any(dead):
            up = [value(nets.q[0], s, g, a + STEP * e) for e in np.eye(a.shape[1])]
            down = [value(nets.q[0], s, g, a - STEP * e) for e in np.eye(a.shape[1])]
            own = np.stack(up, -1) - np.stack(down, -1)
            weights = sum(cfg.lam**k for k in range(len(path.s) - i))
            slope = np.where(dead[:, None], own / (2 * STEP) / weights, slope)
        found.append(slope)
    return found


def leq(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_actor, k_critic = jr.split(key)
    drawn = draws(k_actor, cfg, d.s.shape)
    given = batch.imagined if cfg.expansion else (d.s, d.g, d.ga)
    s, g, ga = (None if x is None else np.asarray(x, np.float64) for x in given)
    path = rollout(frozen, s, act(frozen, s, ga), ga, drawn, cfg)
    actor, low = 0.0, 1 - cfg.expectile
    for i, slope in enumerate(slopes(frozen, path, ga, drawn, cfg)):
        weight = np.where(path.ret[i] > path.q[i], cfg.expectile, low)
        weight = np.full(len(weight), 0.5) if i == cfg.rollout else weight
        actor -= np.mean(np.sum(weight[:, None] * slope * act(nets, path.s[i], ga), axis=-1))

    if g is not None:
        drawn = draws(k_critic, cfg, s.shape)
        path = rollout(frozen, s, act(frozen, s, g), g, drawn, cfg)
    q, slow = (value(c, d.s, d.g, d.a) for c in (nets.q[0], target.q[0]))
    after = value(frozen.q[0], d.after, d.g, act(frozen, d.after, d.g))
    error, c = d.r + cfg.discount * d.m * after - q, cfg.imagined_weight
    critic = (1 - c) * np.mean(0.5 * error**2 + (q - slow) ** 2)
    fitted = (frozen if cfg.release_critic else nets).q[0]
    for i in range(cfg.rollout):
        q, slow = (value(net, path.s[i], g, path.a[i]) for net in (fitted, target.q[0]))
        error = path.ret[i] - q
        loss = np.where(error > 0, cfg.expectile, low) * error**2 + (q - slow) ** 2
        critic += c * np.mean(cfg.discount**i * path.alive[i] * loss) / cfg.rollout
    return {"model": model_loss(nets.model, d), "q": float(critic), "actor": float(actor)}
