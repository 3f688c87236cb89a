"""The ablations of MAC, and their losses in NumPy and float64, one state and one candidate at a time."""

from typing import Any

import jax
import jax.random as jr
import numpy as np

from mac.ablations.gaussian import GaussianConfig, mac_gaussian
from mac.ablations.mac_fql import MACFQLConfig, mac_fql
from mac.ablations.no_distillation import NoDistillConfig, mac_nodistill
from mac.mac import MAC, Nets
from mac.nn.gaussian_policy import GaussianPolicy
from mac.nn.mlp import MLP
from mac.types import Batch
from tests.helpers.numpy_mac import outcome_loss, run
from tests.helpers.toy_env import GOAL_SPEC, SPEC

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gaussian": (mac_gaussian, GaussianConfig, {}),
    "fql": (mac_fql, MACFQLConfig, {"candidates": 1, "candidates_test": 1, "flow_steps": 3, "alpha": 0.3}),
    "euler": (mac_nodistill, NoDistillConfig, {}),
    "regression": (mac_nodistill, NoDistillConfig, {"one_step": "regression"}),
}
MODES = {"reward": SPEC, "goals": GOAL_SPEC}


def make(kind: str, mode: str, **changes: Any) -> MAC:
    """An ablation for the point of `tests.helpers.toy_env`, at sizes at which it compiles fast."""
    algorithm, config, own = KINDS[kind]
    small = {"batch": 8, "hidden": (8,), "chunk": 2, "rollout": 3, "discount": 0.9}
    small |= {"candidates": 4, "candidates_test": 4}
    return algorithm(config(**small | own | changes), MODES[mode])


def net(mlp: MLP, *inputs: np.ndarray | None) -> np.ndarray:
    """The network, inputs that a mode does not have being None."""
    return run(mlp, *(x for x in inputs if x is not None))


def gaussian(policy: GaussianPolicy, *inputs: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns means and logarithms of standard deviations, `policy` holding float64 NumPy arrays."""
    x = net(policy.trunk, *inputs)
    x = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    x = x * policy.norm[0] + policy.norm[1]
    log_std = x @ policy.log_std.weight + policy.log_std.bias
    return x @ policy.mean.weight + policy.mean.bias, np.clip(log_std, -5, 2)


def one_chunk(kind: str, nets: Nets, s: np.ndarray, g: np.ndarray | None, noise: np.ndarray) -> np.ndarray:
    """Returns the policy's action for one noise at one state, clipped."""
    if kind == "gaussian":
        mean, log_std = gaussian(nets.policy, s, g)
        return np.tanh(mean + np.exp(log_std) * noise)
    if kind == "euler":
        return np.clip(noise + net(nets.flow, s, g, noise, np.zeros(1)), -1, 1)
    return np.clip(net(nets.policy, s, g, noise), -1, 1)


def choose(kind: str, nets: Nets, s: np.ndarray, g: np.ndarray | None, noises: np.ndarray) -> np.ndarray:
    """Best candidate of each state."""
    best = []
    for b in range(len(s)):
        goal = None if g is None else g[b]
        chunks = [one_chunk(kind, nets, s[b], goal, noise[b]) for noise in noises]
        scores = [net(nets.q, s[b], goal, chunk)[0] for chunk in chunks]
        best.append(chunks[int(np.argmax(scores))])
    return np.stack(best)


def clone(kind: str, nets: Nets, s: np.ndarray, g: np.ndarray | None, a: np.ndarray, key: jax.Array) -> dict:
    """Loss of cloning the data, by the network that learns from it."""
    if kind == "gaussian":
        mean, log_std = gaussian(nets.policy, s, g)
        z = (np.arctanh(a) - mean) / np.exp(log_std)
        log_prob = -0.5 * z**2 - log_std - 0.5 * np.log(2 * np.pi) - np.log(1 - a**2)
        return {"policy": -np.mean(np.sum(log_prob, axis=-1))}
    if kind == "regression":
        return {"policy": np.mean((net(nets.policy, s, g, normal(key, a.shape)) - a) ** 2)}
    k_noise, k_time = jr.split(key)
    noise, time = normal(k_noise, a.shape), wide(jr.uniform(k_time, (len(a), 1)))
    velocity = net(nets.flow, s, g, (1 - time) * noise + time * a, time)
    return {"flow": np.mean((velocity - (a - noise)) ** 2)}


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def normal(key: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    return wide(jr.normal(key, shape))


def improve(algo: MAC, nets: Nets, frozen: Nets, states: np.ndarray, g: Any, key: jax.Array) -> float:
    """Loss of the policy that is trained on Q (mac_fql), on states [T, B, D]."""
    cfg: Any = algo.cfg
    z = normal(key, (*states.shape[:2], cfg.chunk * algo.env.action_dim))
    x, steps = z, cfg.flow_steps
    for i in range(steps):
        x = x + net(frozen.flow, states, g, x, np.full((*x.shape[:-1], 1), i / steps)) / steps
    mine = net(nets.policy, states, g, z)
    size = np.mean(np.abs(net(frozen.q, states, g, np.clip(net(frozen.policy, states, g, z), -1, 1))))
    q = net(frozen.q, states, g, np.clip(mine, -1, 1))
    return cfg.alpha * np.mean((mine - np.clip(x, -1, 1)) ** 2) - np.mean(q) / size


def losses(
    kind: str, algo: MAC, nets: Nets, frozen: Nets, target: MLP, batch: Batch, key: jax.Array
) -> dict[str, float]:
    """Each network's own loss; `frozen` are the same weights where no gradient may pass."""
    cfg: Any = algo.cfg
    s, a, n = wide(batch.obs), wide(batch.actions).reshape(len(batch.actions), -1), cfg.chunk
    g, g_actor = (wide(batch.goals.value), wide(batch.goals.actor)) if batch.goals else (None, None)
    k_policy, k_roll, k_improve = jr.split(key, 3)
    found = clone(kind, nets, s, g_actor, a, k_policy)
    found["model"] = np.mean((s + net(nets.model, s, a) - wide(batch.next_obs)) ** 2)
    found |= outcome_loss(nets, batch, s, a, cfg)

    states, chunks, rewards, masks = rollout(kind, algo, frozen, s, g, k_roll)
    per_chunk = cfg.discount ** (1 if getattr(cfg, "release_discount", False) else n)
    ret, errors = net(target, states[-1], g)[:, 0], []
    for k in reversed(range(cfg.rollout)):
        ret = rewards[k] + masks[k] * per_chunk * ret
        errors.append(net(nets.v, states[k], g)[:, 0] - ret)
    found["v"] = np.mean(np.stack(errors) ** 2)
    backup = rewards[0] + cfg.discount**n * masks[0] * net(frozen.v, states[1], g)[:, 0]
    found["q"] = np.mean((net(nets.q, s, g, chunks[0])[:, 0] - backup) ** 2)
    if kind == "fql":
        found["policy"] = improve(algo, nets, frozen, np.stack(states[:-1]), g, k_improve)
    return {name: float(value) for name, value in found.items()}


def rollout(
    kind: str, algo: MAC, nets: Nets, s: np.ndarray, g: np.ndarray | None, key: jax.Array
) -> tuple[list[np.ndarray], ...]:
    """Imagined states, one more than chunks, then chunks, rewards and masks."""
    cfg = algo.cfg
    states, chunks, rewards, masks = [s], [], [], []
    for k in jr.split(key, cfg.rollout):
        now = states[-1]
        noises = normal(k, (cfg.candidates, len(s), cfg.chunk * algo.env.action_dim))
        chunk = choose(kind, nets, now, g, noises)
        if nets.success is None:
            reward, mask = net(nets.reward, now, chunk)[:, 0], np.ones(len(s))
        else:
            done = net(nets.success, now, g, chunk)[:, 0] > 0
            reward, mask = done - 1.0, 1.0 - done
        states.append(now + net(nets.model, now, chunk))
        chunks.append(chunk)
        rewards.append(reward)
        masks.append(mask)
    return states, chunks, rewards, masks
