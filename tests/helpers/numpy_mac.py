"""Algorithm 1 of the MAC paper in NumPy and float64, one state and one candidate at a time."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mac.algorithm import TrainState
from mac.config import Config
from mac.mac import MAC, Nets
from mac.nn.mlp import MLP
from mac.types import Batch


def run(mlp: MLP, *inputs: np.ndarray) -> np.ndarray:
    """The network on the concatenation of its inputs, `mlp` holding float64 NumPy arrays."""
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in inputs))
    x = np.concatenate([np.broadcast_to(x, (*lead, x.shape[-1])) for x in inputs], -1)
    for dense, (scale, shift) in zip(mlp.dense, mlp.norm, strict=False):
        x = x @ dense.weight + dense.bias
        x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * scale + shift
    return x @ mlp.dense[-1].weight + mlp.dense[-1].bias


def draws(cfg: Config, size: tuple[int, int], key: jax.Array, obs: int = 2) -> dict[str, np.ndarray]:
    """Random numbers of one loss, each from a key of its own; `size` is that of a batch of chunks."""
    policy, roll, _, *model = jr.split(key, 3 if cfg.dynamics == "deterministic" else 6)
    flow, distil = jr.split(policy)
    noise, time = jr.split(flow)
    rolled = (cfg.candidates, min(size[0], cfg.rollout_batch), size[1])
    candidates = jax.vmap(lambda k: rounds_of_noise(k, rolled, cfg.search_rounds))(
        jr.split(roll, cfg.rollout)
    )
    return model_draws(cfg, size[0], obs, *model) | {
        "noise": np.asarray(jr.normal(noise, size)),
        "time": np.asarray(jr.uniform(time, (size[0], 1))),
        "z": np.asarray(jr.normal(distil, size)),
        "candidates": np.asarray(candidates),
    }


def rounds_of_noise(key: jax.Array, size: tuple[int, int, int], rounds: int) -> jax.Array:
    """Standard normal draws of a search: each round's from a key of its own, if there is more than one."""
    if rounds == 1:
        return jr.normal(key, size)
    shape = (size[0] // rounds, *size[1:])
    return jnp.concatenate([jr.normal(k, shape) for k in jr.split(key, rounds)])


def model_draws(cfg: Config, batch: int, obs: int, *keys: jax.Array) -> dict[str, np.ndarray]:
    """Random numbers of a model that draws its states; none of one that does not."""
    if not keys:
        return {}
    fit, dream, after = keys
    noise, time = jr.split(fit)
    rolled = (min(batch, cfg.rollout_batch), obs)
    return {
        "model_noise": np.asarray(jr.normal(noise, (batch, obs))),
        "model_time": np.asarray(jr.uniform(time, (batch, 1))),
        "dream": np.stack([np.asarray(jr.normal(k, rolled)) for k in jr.split(dream, cfg.rollout)]),
        "after": np.asarray(jr.normal(after, (cfg.dynamics_samples - 1, *rolled))),
    }


def log_std_of(raw: np.ndarray) -> np.ndarray:
    """Logarithms of the standard deviations of Gaussian dynamics, between -5 and 1, from about 0 on."""
    return 6 * sigmoid(raw + 1.6094) - 5


def dynamics_loss(
    model: MLP, s: np.ndarray, a: np.ndarray, after: np.ndarray, cfg: Config, draw: dict[str, np.ndarray]
) -> float:
    """Loss of the model of the change of state, row by row where it is a density."""
    if cfg.dynamics == "deterministic":
        return float(np.mean((s + run(model, s, a) - after) ** 2))
    if cfg.dynamics == "gaussian":
        nll = []
        for row, chunk, end in zip(s, a, after, strict=True):
            mean, raw = np.split(run(model, row, chunk), 2)
            std = np.exp(log_std_of(raw))
            nll.append(np.sum(0.5 * ((end - row - mean) / std) ** 2 + np.log(std * np.sqrt(2 * np.pi))))
        return float(np.mean(nll))
    change, time = (after - s) / cfg.dynamics_scale, draw["model_time"]
    x = (1 - time) * draw["model_noise"] + time * change
    return float(np.mean((run(model, s, a, x, time) - (change - draw["model_noise"])) ** 2))


def successor(model: MLP, s: np.ndarray, a: np.ndarray, cfg: Config, noise: np.ndarray | None) -> np.ndarray:
    """The imagined state after each chunk, made of standard normal `noise` where the model draws it."""
    after = unbounded_successor(model, s, a, cfg, noise)
    if cfg.state_bound == 0:
        return after
    return np.minimum(np.maximum(after, -cfg.state_bound), cfg.state_bound)


def unbounded_successor(
    model: MLP, s: np.ndarray, a: np.ndarray, cfg: Config, noise: np.ndarray | None
) -> np.ndarray:
    """The state after each chunk, wherever it is."""
    if cfg.dynamics == "deterministic" or noise is None:
        return s + run(model, s, a)
    if cfg.dynamics == "gaussian":
        mean, raw = np.split(run(model, s, a), 2, axis=-1)
        return s + mean + np.exp(log_std_of(raw)) * noise
    return s + cfg.dynamics_scale * follow(model, (s, a), noise, cfg.dynamics_steps)


def follow(flow: MLP, given: tuple[np.ndarray, ...], x: np.ndarray, steps: int) -> np.ndarray:
    """Euler's rule from time 0 to 1; `given` is the state, and the goal if there is one."""
    for i in range(steps):
        x = x + run(flow, *given, x, np.full((*x.shape[:-1], 1), i / steps)) / steps
    return x


def choose(
    nets: Nets,
    s: np.ndarray,
    draws: np.ndarray,
    g: np.ndarray | None = None,
    rounds: int = 1,
    elites: int = 1,
    critic: tuple[MLP, int] | None = None,
) -> np.ndarray:
    """Best candidate of each state, one state and one candidate at a time; `g` are goals, if there are.

    Args:
        draws: standard normal, those of all rounds of the search in order.
        critic: a network, and how many first entries of a chunk it reads, in the place of Q.
    """
    best = []
    q, entries = critic or (nets.q, draws.shape[-1])
    for b in range(len(s)):
        given = (s[b],) if g is None else (s[b], g[b])
        noises, chunks, scores = [], [], []
        for n, z in enumerate(draws[:, b]):
            if n % (len(draws) // rounds) == 0:
                elite = np.argsort(-np.asarray(scores), kind="stable")[:elites]
                mean = np.mean([noises[i] for i in elite], axis=0) if n else np.zeros_like(z)
                deviation = np.sqrt(max(1 - np.sum(mean**2) / len(mean), 0))
            noises.append(mean + deviation * z)
            chunks.append(np.clip(run(nets.policy, *given, noises[-1]), -1, 1))
            scores.append(run(q, *given, chunks[-1][:entries])[0])
        best.append(chunks[int(np.argmax(scores))])
    return np.stack(best)


def algorithm_1(
    nets: Nets, frozen: Nets, target: MLP, batch: Batch, cfg: Config, draw: dict[str, np.ndarray]
) -> dict[str, float]:
    """Each network's own loss; `frozen` are the same weights where no gradient may pass."""
    s, a = np.asarray(batch.obs), np.asarray(batch.actions)
    a = np.stack([np.concatenate(list(chunk)) for chunk in a])
    cloned = (s,) if batch.goals is None else (s, np.asarray(batch.goals.actor))
    time, z = draw["time"], draw["z"]
    x = (1 - time) * draw["noise"] + time * a
    teacher = follow(frozen.flow, cloned, z, cfg.flow_steps)
    errors = {
        "flow": run(nets.flow, *cloned, x, time) - (a - draw["noise"]),
        "policy": run(nets.policy, *cloned, z) - np.clip(teacher, -1, 1),
    }
    losses = {name: float(np.mean(error**2)) for name, error in errors.items()}
    losses["model"] = dynamics_loss(nets.model, s, a, np.asarray(batch.next_obs), cfg, draw)
    losses |= outcome_loss(nets, batch, s, a, cfg) | short_critic_loss(nets, frozen, batch, s, a, cfg)
    return losses | value_losses(nets, frozen, target, batch, cfg, draw)


def outcome_loss(nets: Nets, batch: Batch, s: np.ndarray, a: np.ndarray, cfg: Config) -> dict[str, float]:
    """Loss of the chunk's reward, or of whether the goal is reached within it."""
    if batch.goals is not None:
        logit = run(nets.success, s, np.asarray(batch.goals.value), a)[:, 0]
        return {"success": cross_entropy(logit, np.asarray(batch.goals.reached))}
    rows = np.asarray(batch.rewards)
    r = np.asarray([sum(cfg.discount**j * x for j, x in enumerate(row)) for row in rows])
    r = r / rows.shape[1] if cfg.chunk_reward == "mean" else r
    losses = {"reward": float(np.mean((run(nets.reward, s, a)[:, 0] - r) ** 2))}
    if nets.termination is not None:
        terminated = np.asarray([float(any(m == 0 for m in chunk)) for chunk in np.asarray(batch.masks)])
        losses["termination"] = cross_entropy(run(nets.termination, s, a)[:, 0], terminated)
    return losses


def short_critic_loss(
    nets: Nets, frozen: Nets, batch: Batch, s: np.ndarray, a: np.ndarray, cfg: Config
) -> dict[str, float]:
    """Expectile regression of Q on the data's chunks, from their first actions; only with that critic."""
    if cfg.critic_chunk == 0:
        return {}
    given = (s,) if batch.goals is None else (s, np.asarray(batch.goals.value))
    entries = cfg.critic_chunk * np.asarray(batch.actions).shape[-1]
    q, short = run(frozen.q, *given, a)[:, 0], run(nets.q_short, *given, a[:, :entries])[:, 0]
    total = 0.0
    for x, y in zip(q, short, strict=True):
        above = sigmoid(x) > sigmoid(y) if cfg.value == "bce" else x > y
        weight = cfg.critic_expectile if above else 1 - cfg.critic_expectile
        total += weight * (cross_entropy(y, sigmoid(x)) if cfg.value == "bce" else (x - y) ** 2)
    return {"q_short": float(total / len(q))}


def value_losses(
    nets: Nets, frozen: Nets, target: MLP, batch: Batch, cfg: Config, draw: dict[str, np.ndarray]
) -> dict[str, float]:
    """Losses of V and Q on imagined chunks; goals are those of values, for the policy too."""
    gamma_n, bce = cfg.discount**cfg.chunk, cfg.value == "bce"
    states, chunks, rewards, masks = [np.asarray(batch.obs)[: cfg.rollout_batch]], [], [], []
    g = None if batch.goals is None else np.asarray(batch.goals.value)[: cfg.rollout_batch]

    def value(net: MLP, *rest: np.ndarray) -> np.ndarray:
        return run(net, rest[0], *(() if g is None else (g,)), *rest[1:])[:, 0]

    for k in range(cfg.rollout):
        elites = max(1, round(cfg.search_elites * cfg.candidates / cfg.search_rounds))
        chunks.append(choose(frozen, states[k], draw["candidates"][k], g, cfg.search_rounds, elites))
        if g is None:
            rewards.append(value(frozen.reward, states[k], chunks[k]))
            safe = (
                1.0
                if nets.termination is None
                else 1 - sigmoid(run(frozen.termination, states[k], chunks[k])[:, 0])
            )
            masks.append(safe * np.ones(len(states[k])))
        else:
            reached = np.asarray(value(frozen.success, states[k], chunks[k]) > 0, float)
            rewards.append(reached if bce else reached - 1)
            masks.append(1 - reached)
        noise = draw["dream"][k] if "dream" in draw else None
        states.append(successor(frozen.model, states[k], chunks[k], cfg, noise))
    slow = [sigmoid(value(target, s)) if bce else value(target, s) for s in states]
    ret, fits = slow[-1], []
    for k in reversed(range(cfg.rollout)):
        # Generalised advantages, added to the values that they are relative to.
        delta = rewards[k] + masks[k] * gamma_n * slow[k + 1] - slow[k]
        ret = slow[k] + delta + masks[k] * gamma_n * cfg.lam * (ret - slow[k + 1])
        fits.append(fit(value(nets.v, states[k]), ret, bce))
    others = [successor(frozen.model, states[0], chunks[0], cfg, z) for z in draw.get("after", ())]
    nexts = [value(frozen.v, s) for s in (states[1], *others)]
    after = np.mean([sigmoid(v) if bce and not cfg.release_bce else v for v in nexts], axis=0)
    backup = rewards[0] + masks[0] * gamma_n * after
    return {"v": float(np.mean(fits)), "q": fit(value(nets.q, states[0], chunks[0]), backup, bce)}


def fit(output: np.ndarray, wanted: np.ndarray, bce: bool) -> float:
    """Returns the squared error, or the cross-entropy of a logit with a probability."""
    return cross_entropy(output, np.clip(wanted, 0, 1)) if bce else float(np.mean((output - wanted) ** 2))


def cross_entropy(logit: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the mean of -w log p - (1 - w) log(1 - p), where p is the probability of the logit."""
    p = sigmoid(logit)
    return float(-np.mean(wanted * np.log(p) + (1 - wanted) * np.log1p(-p)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def double(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def perturb(tree: Any, seed: int, scale: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.float32(x + scale * rng.normal(size=x.shape))), tree)


@cache
def fresh(algo: MAC) -> TrainState:
    return jax.jit(algo.init)(jr.key(0))
