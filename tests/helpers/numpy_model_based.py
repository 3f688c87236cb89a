"""Losses of the model-based baselines in NumPy and float64, most of them one member and one row at a time."""

from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np

from mac.types import Batch
from tests.helpers.numpy_ablations import normal, wide
from tests.helpers.numpy_baselines import LOG_2PI, Data, gaussian, net, tanh_sample, value
from tests.helpers.numpy_mac import cross_entropy


class Density(NamedTuple):
    """Normal densities of each member, `[E, ..., D]`."""

    mean: np.ndarray
    log_std: np.ndarray


def softplus(x: np.ndarray) -> np.ndarray:
    return np.log1p(np.exp(x))


def densities(dynamics: Any, s: np.ndarray, a: np.ndarray) -> Density:
    """Of the next state, and of the reward if it is predicted too."""
    means, log_stds = [], []
    for e in range(len(dynamics.members.dense[0].weight)):
        out = net(jax.tree.map(lambda x, e=e: x[e], dynamics.members), s, a)
        width = out.shape[-1] // 2
        mean, free = out[..., :width].copy(), out[..., width:]
        mean[..., : s.shape[-1]] += s
        if dynamics.bounds is None:
            log_std = -5 + 6 / (1 + np.exp(-free))
        else:
            low, high = dynamics.bounds
            below = high - softplus(high - free)
            log_std = 0.5 * (low + softplus(below - low))
        means.append(mean)
        log_stds.append(log_std)
    return Density(np.stack(means), np.stack(log_stds))


def model_loss(model: Any, d: Data) -> float:
    """Sum of the losses of all networks of the model of the world."""
    joint = model.success is None and model.reward is None
    after = np.concatenate([d.after, d.r[:, None]], -1) if joint else d.after
    mean, log_std = densities(model.dynamics, d.s, d.a)
    entries = 0.5 * ((after - mean) / np.exp(log_std)) ** 2 + log_std + 0.5 * LOG_2PI
    loss = np.mean(np.sum(entries, axis=-1))
    if model.dynamics.bounds is not None:
        low, high = model.dynamics.bounds
        loss += 0.01 * np.sum(high) - 0.01 * np.sum(low)
    if model.success is not None:
        loss += cross_entropy(value(model.success, d.s, d.g, d.a), 1 - d.m)
    if model.reward is not None:
        loss += np.mean((value(model.reward, d.s, d.a) - d.r) ** 2)
    if model.termination is not None:
        loss += cross_entropy(value(model.termination, d.s, d.a), 1 - d.m)
    return float(loss)


def decay_loss(dynamics: Any, decays: tuple[float, ...]) -> float:
    """Squared weights, layer by layer and member by member, scaled to a likelihood summed over entries."""
    total, members = 0.0, len(dynamics.members.dense[0].weight)
    for decay, dense in zip(decays, dynamics.members.dense, strict=False):
        for e in range(members):
            total += decay / 2 * np.sum(dense.weight[e] ** 2)
    entries = dynamics.members.dense[-1].bias.shape[-1] / 2
    return float(entries / 2 * total / members)


def largest_spread(nets: Any, target: Any, d: Data, cfg: Any, key: jax.Array) -> np.ndarray:
    """MOPO's penalty."""
    std = np.exp(densities(nets.model.dynamics, d.s, d.a).log_std)
    return np.asarray([max(np.sqrt(np.sum(each[row] ** 2)) for each in std) for row in range(len(d.s))])


def disagreement(nets: Any, target: Any, d: Data, cfg: Any, key: jax.Array) -> np.ndarray:
    """MOBILE's penalty."""
    k_state, k_action = jr.split(key)
    mean, log_std = densities(nets.model.dynamics, d.s, d.a)
    members, rows, width = len(mean), *d.s.shape
    state_noise = normal(k_state, (cfg.samples, members, rows, width))
    action_noise = normal(k_action, (cfg.samples, members, rows, d.a.shape[-1]))
    worth = np.zeros((members, rows))
    for e in range(members):
        for j in range(cfg.samples):
            s = mean[e, :, :width] + np.exp(log_std[e, :, :width]) * state_noise[j, e]
            mu, std = gaussian(nets.actor, s, d.g)
            values = [value(q, s, d.g, np.tanh(mu + std * action_noise[j, e])) for q in target]
            worth[e] += np.min(values, 0) if cfg.penalty_combine == "min" else np.mean(values, 0)
    worth /= cfg.samples
    off = np.sum((worth - worth.mean(axis=0)) ** 2, axis=0)
    return np.sqrt(off / (members - 1 if cfg.unbiased_std else members))


def first(d: Data, count: int) -> Data:
    return Data(*(None if x is None else x[:count] for x in d))


def mixed(d: Data, batch: Batch, penalty: np.ndarray, cfg: Any) -> Data:
    """Real steps, and imagined ones whose rewards are lowered."""
    x = Data(*(None if each is None else wide(each) for each in batch.imagined))
    x = x._replace(r=x.r - cfg.penalty * penalty) if cfg.penalty_at == "update" else x
    real = first(d, int(cfg.batch * cfg.real_fraction))
    pairs = zip(real, x, strict=True)
    return Data(*(None if own is None else np.concatenate([own, other]) for own, other in pairs))


def soft_actor_critic(uncertainty: Any) -> Any:
    """The losses of a method with that penalty."""

    def losses(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
        k_penalty, k_next, k_now = jr.split(key, 3)
        x = Data(*(None if each is None else wide(each) for each in batch.imagined))
        step = mixed(d, batch, uncertainty(frozen, target.q, x, cfg, k_penalty), cfg)
        weight, dims = cfg.temperature or np.exp(frozen.log_weight), d.a.shape[1]
        weight = min(weight, cfg.temperature_limit or np.inf)

        chosen, log_prob = tanh_sample(frozen.actor, step.after, step.g, normal(k_next, step.a.shape))
        values = [value(q, step.after, step.g, chosen) for q in target.q]
        after = np.min(values, axis=0) if cfg.combine == "min" else np.mean(values, axis=0)
        if cfg.entropy_in_target:
            after = after - weight * log_prob
        y = step.r + cfg.discount * step.m * after
        if step.g is not None:  # no return lies outside
            y = np.minimum(np.maximum(y, -1 / (1 - cfg.discount)), 0)
        elif cfg.target_range:
            y = np.minimum(np.maximum(y, cfg.target_range[0]), cfg.target_range[1])
        critic = np.mean([np.mean((value(q, step.s, step.g, step.a) - y) ** 2) for q in nets.q])

        noise = normal(k_now, step.a.shape)
        mine, mine_log_prob = tanh_sample(nets.actor, step.s, step.ga, noise)
        scores = [value(q, step.s, step.ga, mine) for q in frozen.q]
        worth = np.min(scores, axis=0) if cfg.actor_combine == "min" else np.mean(scores, axis=0)
        _, still = tanh_sample(frozen.actor, step.s, step.ga, noise)
        slack = 0 if cfg.temperature else -np.mean(still) + cfg.entropy * dims
        return {
            "model": model_loss(nets.model, first(d, cfg.model_batch or int(cfg.batch * cfg.real_fraction)))
            + decay_loss(nets.model.dynamics, cfg.model_decay),
            "q": float(critic),
            "actor": float(np.mean(weight * mine_log_prob - worth)),
            "log_weight": float(np.exp(nets.log_weight) * slack),
        }

    return losses


MODEL_BASED = {"mopo": soft_actor_critic(largest_spread), "mobile": soft_actor_critic(disagreement)}
