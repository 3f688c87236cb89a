"""Actions of each baseline, in NumPy and float64."""

from typing import Any

import jax
import jax.random as jr
import numpy as np

from tests.helpers import numpy_tap
from tests.helpers.numpy_ablations import normal
from tests.helpers.numpy_baselines import gaussian, net, resnet, value
from tests.helpers.numpy_planners import PLANNERS, plan
from tests.helpers.numpy_tt import greedy_actions


def follow(flow: Any, given: tuple[Any, ...], x: np.ndarray, steps: int) -> np.ndarray:
    """Euler's rule from time 0 to 1."""
    for i in range(steps):
        x = x + net(flow, *given, x, np.full((*x.shape[:-1], 1), i / steps)) / steps
    return x


def best(critics: Any, s: np.ndarray, g: Any, candidates: np.ndarray) -> np.ndarray:
    """Returns each state's best candidate by the minimum of both critics, one state at a time."""
    chosen = []
    for row in range(len(s)):
        goal = None if g is None else g[row]
        scores = [min(value(q, s[row], goal, a[row]) for q in critics) for a in candidates]
        chosen.append(candidates[int(np.argmax(scores))][row])
    return np.stack(chosen)


def denoised(actor: Any, s: np.ndarray, g: Any, cfg: Any, key: jax.Array) -> np.ndarray:
    """Samples of a diffusion policy: all steps backwards, each clipped."""
    k_start, k_steps = jr.split(key)
    steps = cfg.diffusion_steps
    share = np.asarray([np.exp(-0.1 / steps - 4.95 * (2 * t + 1) / steps**2) for t in range(steps)])
    x = normal(k_start, (cfg.candidates, len(s), 2))
    inputs = s if g is None else np.concatenate([s, g], -1)
    inputs = np.broadcast_to(inputs, (*x.shape[:-1], inputs.shape[-1]))
    for t, k in zip(reversed(range(steps)), jr.split(k_steps, steps), strict=True):
        noise = resnet(actor, np.concatenate([inputs, x], -1), np.full((*x.shape[:-1], 1), float(t)))
        x = (x - (1 - share[t]) / np.sqrt(1 - np.prod(share[: t + 1])) * noise) / np.sqrt(share[t])
        if t:
            x = x + np.sqrt(1 - share[t]) * normal(k, x.shape)
        x = np.clip(x, -1, 1)
    return x


def act(name: str, nets: Any, target: Any, s: np.ndarray, g: Any, cfg: Any, key: jax.Array) -> np.ndarray:
    """Actions of float64 networks for each state, clipped."""
    one = (len(s), 2)
    if name == "flow_bc":
        a = follow(nets.flow, (s, g), normal(key, one), cfg.flow_steps)
    elif name == "fql":
        a = net(nets.policy, s, g, normal(key, one))
    elif name == "ifql":
        many = follow(nets.actor, (s, g), normal(key, (cfg.candidates, *one)), cfg.flow_steps)
        a = best(nets.q, s, g, np.clip(many, -1, 1))
    elif name == "idql":
        a = best(target["q"], s, g, denoised(target["actor"], s, g, cfg, key))
    elif name == "sharsa":
        k_high, k_low = jr.split(key)
        ways = follow(nets.high, (s, g), normal(k_high, (cfg.candidates, *one)), cfg.flow_steps)
        a = follow(nets.low, (s, best(nets.q, s, g, ways)), normal(k_low, one), cfg.flow_steps)
    elif name == "fmpc":
        k_policy, k_model = jr.split(key)
        size = cfg.policy_chunk or cfg.chunk
        chunks = follow(
            nets.flow, (s, g), normal(k_policy, (cfg.candidates, len(s), 2 * size)), cfg.flow_steps
        )
        chunks, noise = np.clip(chunks, -1, 1), normal(k_model, (cfg.candidates, len(s), 2 * cfg.chunk))
        blocks = follow(nets.model, (s, chunks), noise, cfg.flow_steps)
        score = value(nets.q, blocks, g, chunks)
        a = np.stack([chunks[score[:, i].argmax(), i, :2] for i in range(len(s))])
    elif name == "tap":
        a = numpy_tap.act(nets, target, s, cfg, key)
    elif name == "tt":
        a = greedy_actions(nets.model, target, s)
    elif name in ("nsac_bc", "cql", "mopo", "mobile"):
        a = np.tanh(gaussian(nets.actor, s, g)[0])
    elif name in PLANNERS:
        a = plan(name, target, s, g, cfg, key)[:, 0]
    elif name == "iql":
        a = net(nets.actor.mean, s, g)
        a = np.tanh(a) if cfg.policy == "tanh" else a
    else:
        a = net(nets.actor, s, g)
        a = np.tanh(a) if name in ("rebrac", "leq") else a
    return np.clip(a, -1, 1)


def expect(
    name: str, nets: Any, s: np.ndarray, g: Any, cfg: Any, a: np.ndarray, key: jax.Array
) -> np.ndarray:
    """Returns the predicted return of each state, given the action, one state at a time."""
    ways = a
    if name == "sharsa":
        noise = normal(jr.split(key)[0], (cfg.candidates, len(s), 2))
        ways = best(nets.q, s, g, follow(nets.high, (s, g), noise, cfg.flow_steps))
    q = [min(value(c, s[i], None if g is None else g[i], ways[i]) for c in nets.q) for i in range(len(s))]
    if name not in ("nsac_bc", "sharsa"):
        return np.asarray(q) / cfg.reward_scale
    way = np.log(1 / (1 + np.exp(-np.asarray(q)))) / np.log(cfg.discount)  # steps to the goal
    return np.asarray([-np.sum(cfg.discount ** np.arange(int(t))) for t in way]) - (
        cfg.discount ** np.floor(way) - cfg.discount**way
    ) / (1 - cfg.discount)
