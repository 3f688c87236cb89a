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


def draws(cfg: Config, size: tuple[int, int], key: jax.Array) -> dict[str, np.ndarray]:
    """The random numbers of one loss: every one from a key of its own."""
    policy, roll, _ = jr.split(key, 3)
    flow, distil = jr.split(policy)
    noise, time = jr.split(flow)
    rolled = (cfg.candidates, min(size[0], cfg.rollout_batch), size[1])
    candidates = jax.vmap(lambda k: jr.normal(k, rolled))(jr.split(roll, cfg.rollout))
    return {
        "noise": np.asarray(jr.normal(noise, size)),
        "time": np.asarray(jr.uniform(time, (size[0], 1))),
        "z": np.asarray(jr.normal(distil, size)),
        "candidates": np.asarray(candidates),
    }


def follow(flow: MLP, s: np.ndarray, x: np.ndarray, steps: int) -> np.ndarray:
    """Euler's rule from time 0 to 1."""
    for i in range(steps):
        x = x + run(flow, s, x, np.full((*x.shape[:-1], 1), i / steps)) / steps
    return x


def choose(nets: Nets, s: np.ndarray, noises: np.ndarray) -> np.ndarray:
    """Best candidate of each state, one state and one candidate at a time."""
    best = []
    for b in range(len(s)):
        chunks = [np.clip(run(nets.policy, s[b], noise[b]), -1, 1) for noise in noises]
        scores = [run(nets.q, s[b], chunk)[0] for chunk in chunks]
        best.append(chunks[int(np.argmax(scores))])
    return np.stack(best)


def algorithm_1(
    nets: Nets, frozen: Nets, target: MLP, batch: Batch, cfg: Config, draw: dict[str, np.ndarray]
) -> dict[str, float]:
    """Each network's own loss; `frozen` are the same weights where no gradient may pass."""
    s, a = np.asarray(batch.obs), np.asarray(batch.actions)
    n = a.shape[1]
    a = np.stack([np.concatenate(list(chunk)) for chunk in a])
    gamma_n = cfg.discount**n
    r = np.asarray([sum(cfg.discount**j * x for j, x in enumerate(row)) for row in np.asarray(batch.rewards)])
    r = r / n if cfg.chunk_reward == "mean" else r

    time, z = draw["time"], draw["z"]
    x = (1 - time) * draw["noise"] + time * a
    teacher = follow(frozen.flow, s, z, cfg.flow_steps)

    states, chunks, rewards = [s[: cfg.rollout_batch]], [], []
    for k in range(cfg.rollout):
        chunks.append(choose(frozen, states[k], draw["candidates"][k]))
        rewards.append(run(frozen.reward, states[k], chunks[k])[:, 0])
        states.append(states[k] + run(frozen.model, states[k], chunks[k]))
    slow = [run(target, state)[:, 0] for state in states]
    adv, value_errors = np.zeros(len(states[0])), []
    for k in reversed(range(cfg.rollout)):
        delta = rewards[k] + gamma_n * slow[k + 1] - slow[k]
        adv = delta + gamma_n * cfg.lam * adv
        value_errors.append(run(nets.v, states[k])[:, 0] - (slow[k] + adv))
    backup = rewards[0] + gamma_n * run(frozen.v, states[1])[:, 0]

    errors = {
        "model": s + run(nets.model, s, a) - np.asarray(batch.next_obs),
        "reward": run(nets.reward, s, a)[:, 0] - r,
        "flow": run(nets.flow, s, x, time) - (a - draw["noise"]),
        "policy": run(nets.policy, s, z) - np.clip(teacher, -1, 1),
        "v": np.stack(value_errors),
        "q": run(nets.q, states[0], chunks[0])[:, 0] - backup,
    }
    return {name: float(np.mean(error**2)) for name, error in errors.items()}


def double(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def perturb(tree: Any, seed: int, scale: float = 0.2) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(np.float32(x + scale * rng.normal(size=x.shape))), tree)


@cache
def fresh(algo: MAC) -> TrainState:
    return jax.jit(algo.init)(jr.key(0))
