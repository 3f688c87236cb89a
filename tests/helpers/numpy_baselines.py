"""The baselines' losses in NumPy and float64, most of them one row at a time."""

from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np

from mac.types import Batch
from tests.helpers.numpy_ablations import normal, wide
from tests.helpers.numpy_mac import cross_entropy, sigmoid

LOG_2PI = np.log(2 * np.pi)


def mish(x: np.ndarray) -> np.ndarray:
    return x * np.tanh(np.log1p(np.exp(x)))


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {"mish": mish, "gelu": gelu, "relu": lambda x: np.maximum(x, 0)}


def hidden(x: np.ndarray, style: Any, norm: Any) -> np.ndarray:
    """Applies the operations after the matmul of a hidden layer."""
    activation = ACTIVATIONS[style.activation]
    if norm is None:
        return activation(x)
    scale, shift = norm
    if style.norm_first:
        return activation(layer_norm(x) * scale + shift)
    return layer_norm(activation(x)) * scale + shift


def layer_norm(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def joined(*inputs: Any) -> np.ndarray:
    """Concatenates the inputs that are not None."""
    given = [x for x in inputs if x is not None]
    lead = np.broadcast_shapes(*(x.shape[:-1] for x in given))
    return np.concatenate([np.broadcast_to(x, (*lead, x.shape[-1])) for x in given], -1)


def net(mlp: Any, *inputs: Any) -> np.ndarray:
    """An MLP of float64 arrays."""
    x = joined(*inputs)
    x = np.sign(x) * np.log(1 + np.abs(x)) if mlp.style.symlog else x
    for dense, norm in zip(mlp.dense[:-1], mlp.norm, strict=True):
        x = hidden(x @ dense.weight + dense.bias, mlp.style, norm)
    return x @ mlp.dense[-1].weight + mlp.dense[-1].bias


def value(mlp: Any, *inputs: Any) -> np.ndarray:
    return net(mlp, *inputs)[..., 0]


def gaussian(policy: Any, s: Any, g: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns means and standard deviations before the tanh."""
    x = hidden(net(policy.trunk, s, g), policy.trunk.style, policy.norm)
    log_std = np.clip(x @ policy.log_std.weight + policy.log_std.bias, -5, 2)
    return x @ policy.mean.weight + policy.mean.bias, np.exp(log_std)


def tanh_sample(policy: Any, s: Any, g: Any, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Actions, and the logarithms of their densities."""
    mean, std = gaussian(policy, s, g)
    a = np.tanh(mean + std * noise)
    entry = -0.5 * noise**2 - np.log(std) - 0.5 * LOG_2PI - np.log(1 - a**2)
    return a, np.sum(entry, axis=-1)


class Data(NamedTuple):
    """A batch in float64: state, action, reward, mask, next state, goals of values and of policies."""

    s: np.ndarray
    a: np.ndarray
    r: np.ndarray
    m: np.ndarray
    after: np.ndarray
    g: Any
    ga: Any


def data(batch: Batch) -> Data:
    s, a, after = wide(batch.obs), wide(batch.actions[:, 0]), wide(batch.next_obs)
    if batch.goals is None:
        assert batch.rewards is not None and batch.masks is not None
        return Data(s, a, wide(batch.rewards)[:, 0], wide(batch.masks)[:, 0], after, None, None)
    done = wide(batch.goals.reached)
    return Data(s, a, done - 1, 1 - done, after, wide(batch.goals.value), wide(batch.goals.actor))


def flow_loss(velocity: Any, a: np.ndarray, key: jax.Array) -> float:
    """Of a velocity field given as a function of x and time."""
    k_noise, k_time = jr.split(key)
    noise, time = normal(k_noise, a.shape), wide(jr.uniform(k_time, (len(a), 1)))
    return float(np.mean((velocity((1 - time) * noise + time * a, time) - (a - noise)) ** 2))


def td_loss(critics: Any, inputs: tuple[Any, ...], target: np.ndarray) -> float:
    """Sum over critics of their mean squared errors."""
    return float(sum(np.mean((value(q, *inputs) - target) ** 2) for q in critics))


def implicit(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any) -> dict[str, float]:
    """V's and Q's losses of implicit Q-learning."""
    best = np.minimum(*(value(q, d.s, d.g, d.a) for q in target["q"]))
    errors = best - value(nets.v, d.s, d.g)
    v = np.mean([(cfg.expectile if e > 0 else 1 - cfg.expectile) * e**2 for e in errors])
    backup = d.r + cfg.discount * d.m * value(frozen.v, d.after, d.g)
    return {"v": float(v), "q": td_loss(nets.q, (d.s, d.g, d.a), backup)}


def flow_bc(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    return {"flow": flow_loss(lambda x, t: net(nets.flow, d.s, d.ga, x, t), d.a, key)}


def iql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    critics = frozen.q if cfg.advantage == "online" else target["q"]
    gain = np.minimum(*(value(q, d.s, d.ga, d.a) for q in critics)) - value(frozen.v, d.s, d.ga)
    mean, std = net(nets.actor.mean, d.s, d.ga), np.ones(d.a.shape[1])
    if cfg.policy == "tanh":
        mean, std = np.tanh(mean), np.exp(np.clip(nets.actor.log_std, -20, 2))
    log_prob = np.sum(-0.5 * ((d.a - mean) / std) ** 2 - np.log(std) - 0.5 * LOG_2PI, axis=-1)
    weight = np.asarray([min(np.exp(cfg.alpha * x), 100) for x in gain])
    return implicit(nets, frozen, target, d, cfg) | {"actor": -np.mean(weight * log_prob)}


def fql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_next, k_flow, k_distil = jr.split(key, 3)
    chosen = np.clip(net(frozen.policy, d.after, d.g, normal(k_next, d.a.shape)), -1, 1)
    values = [value(q, d.after, d.g, chosen) for q in target]
    after = np.min(values, axis=0) if cfg.combine == "min" else np.mean(values, axis=0)
    found = {"q": td_loss(nets.q, (d.s, d.g, d.a), d.r + cfg.discount * d.m * after) / 2}
    found["flow"] = flow_loss(lambda x, t: net(nets.flow, d.s, d.ga, x, t), d.a, k_flow)
    z = x = normal(k_distil, d.a.shape)
    for i in range(cfg.flow_steps):
        time = np.full((len(x), 1), i / cfg.flow_steps)
        x = x + net(frozen.flow, d.s, d.ga, x, time) / cfg.flow_steps
    mine = net(nets.policy, d.s, d.ga, z)
    worth = np.mean([value(q, d.s, d.ga, np.clip(mine, -1, 1)) for q in frozen.q])
    return found | {"policy": cfg.alpha * np.mean((mine - np.clip(x, -1, 1)) ** 2) - worth}


def rebrac(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    noise = np.clip(cfg.noise * normal(key, d.a.shape), -cfg.noise_clip, cfg.noise_clip)
    chosen = np.clip(np.tanh(net(target.actor, d.after, d.g)) + noise, -1, 1)
    after = np.minimum(*(value(q, d.after, d.g, chosen) for q in target.q))
    after = after - cfg.alpha_critic * np.sum((chosen - wide(batch.next_action)) ** 2, -1)

    def worth(actor: Any) -> np.ndarray:
        return np.minimum(*(value(q, d.s, d.ga, np.tanh(net(actor, d.s, d.ga))) for q in frozen.q))

    near = np.mean(np.sum((np.tanh(net(nets.actor, d.s, d.ga)) - d.a) ** 2, -1))
    climb = -np.mean(worth(nets.actor)) / np.mean(np.abs(worth(frozen.actor)))
    return {
        "q": td_loss(nets.q, (d.s, d.g, d.a), d.r + cfg.discount * d.m * after) / 2,
        "actor": climb + cfg.alpha_actor * near,
    }


def ifql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    actor = flow_loss(lambda x, t: net(nets.actor, d.s, d.ga, x, t), d.a, key)
    return implicit(nets, frozen, target, d, cfg) | {"actor": actor}


def resnet(actor: Any, x: np.ndarray, time: np.ndarray, keys: Any = None) -> np.ndarray:
    """Network of diffusion policies; `keys` determine the dropout."""
    angle = 2 * np.pi * time @ actor.frequency
    x = joined(x, net(actor.time, joined(np.cos(angle), np.sin(angle)))) @ actor.inner.weight
    x = x + actor.inner.bias
    for i, block in enumerate(actor.blocks):
        y = x
        if keys is not None:
            y = np.where(jr.bernoulli(keys[i], 1 - actor.dropout, x.shape), x / (1 - actor.dropout), 0)
        y = layer_norm(y) * block.norm[0] + block.norm[1]
        x = x + mish(y @ block.up.weight + block.up.bias) @ block.down.weight + block.down.bias
    return mish(x) @ actor.outer.weight + actor.outer.bias


def idql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_loss, k_dropout = jr.split(key)
    k_step, k_noise = jr.split(k_loss)
    count = cfg.diffusion_steps
    step = np.asarray(jr.randint(k_step, (len(d.a), 1), 0, count))
    noise = normal(k_noise, d.a.shape)
    kept = np.ones_like(step, np.float64)
    for t in range(count):  # each step keeps a share of the variance
        share = np.exp(-0.1 / count - 0.5 * 9.9 * (2 * t + 1) / count**2)
        kept = np.where(t <= step, kept * share, kept)
    x = np.sqrt(kept) * d.a + np.sqrt(1 - kept) * noise
    keys = jr.split(k_dropout, len(nets.actor.blocks))
    guess = resnet(nets.actor, joined(d.s, d.ga, x), step.astype(float), keys)
    actor = np.mean(np.sum((guess - noise) ** 2, -1))
    return implicit(nets, frozen, target, d, cfg) | {"actor": actor}


def gciql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    def worth(actor: Any) -> np.ndarray:
        a = np.clip(net(actor, d.s, d.ga), -1, 1)
        return np.minimum(*(value(q, d.s, d.ga, a) for q in frozen.q))

    off = np.sum((d.a - net(nets.actor, d.s, d.ga)) ** 2, -1)
    near = cfg.alpha * np.mean(0.5 * off + 0.5 * LOG_2PI * d.a.shape[1])
    actor = near - np.mean(worth(nets.actor)) / np.mean(np.abs(worth(frozen.actor)))
    return implicit(nets, frozen, target, d, cfg) | {"actor": actor}


def backup(after: np.ndarray, batch: Batch, cfg: Any) -> np.ndarray:
    """Returns the discounted probability of reaching the goal; `after` is that of each run's last state."""
    assert batch.subgoals is not None
    runs = zip(wide(batch.subgoals.steps), wide(batch.subgoals.reached), after, strict=True)
    return np.asarray([cfg.discount**k * (1.0 if reached else prob) for k, reached, prob in runs])


def nsac_bc(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_next, k_now = jr.split(key)
    assert batch.subgoals is not None
    after, dims = wide(batch.subgoals.next_obs), d.a.shape[1]
    chosen, _ = tanh_sample(frozen.actor, after, d.g, normal(k_next, d.a.shape))
    probs = [sigmoid(value(q, after, d.g, chosen)) for q in target]
    y = backup(np.minimum(*probs) if cfg.combine == "min" else np.mean(probs, axis=0), batch, cfg)
    critic = np.mean([cross_entropy(value(q, d.s, d.g, d.a), y) for q in nets.q])

    def worth(a: np.ndarray) -> np.ndarray:
        return np.mean([value(q, d.s, d.ga, a) for q in frozen.q], axis=0)

    noise = normal(k_now, d.a.shape)
    mine, log_prob = tanh_sample(nets.actor, d.s, d.ga, noise)
    still, still_prob = tanh_sample(frozen.actor, d.s, d.ga, noise)
    scale = cfg.alpha * np.mean(np.abs(worth(still)))
    actor = np.mean(np.exp(frozen.log_weight) * log_prob - worth(mine))
    actor += scale * np.mean(np.sum((mine - d.a) ** 2, -1))
    weight = np.exp(nets.log_weight) * (-np.mean(still_prob) + cfg.entropy * dims)
    return {"q": float(critic), "actor": float(actor), "log_weight": float(weight)}


def sharsa(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_high, k_low = jr.split(key)
    ways = batch.subgoals
    assert ways is not None
    w, ahead = wide(ways.value), wide(ways.ahead)
    probs = [sigmoid(value(q, d.s, d.g, w)) for q in target]
    prob = np.minimum(*probs) if cfg.combine == "min" else np.mean(probs, axis=0)
    y = backup(sigmoid(value(frozen.v, wide(ways.next_obs), d.g)), batch, cfg)
    return {
        "v": cross_entropy(value(nets.v, d.s, d.g), prob),
        "q": sum(cross_entropy(value(q, d.s, d.g, w), y) for q in nets.q),
        "high": flow_loss(lambda x, t: net(nets.high, d.s, d.ga, x, t), wide(ways.actor), k_high),
        "low": flow_loss(lambda x, t: net(nets.low, d.s, ahead, x, t), d.a, k_low),
    }


def cql(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_next, k_now, k_low = jr.split(key, 3)
    dims, shape = d.a.shape[1], (cfg.samples, *d.a.shape)
    chosen, _ = tanh_sample(frozen.actor, d.after, d.g, normal(k_next, d.a.shape))
    after = np.minimum(*(value(q, d.after, d.g, chosen) for q in target))
    critic = td_loss(nets.q, (d.s, d.g, d.a), d.r + cfg.discount * d.m * after)

    k_any, k_here, k_there = jr.split(k_low, 3)
    anywhere = wide(jr.uniform(k_any, shape, minval=-1, maxval=1))
    here, p_here = tanh_sample(frozen.actor, d.s, d.g, normal(k_here, shape))
    there, p_there = tanh_sample(frozen.actor, d.after, d.g, normal(k_there, shape))
    for q in nets.q:
        parts = [np.exp(value(q, d.s, d.g, anywhere)) * 2**dims]
        parts += [np.exp(value(q, d.s, d.g, here) - p_here), np.exp(value(q, d.s, d.g, there) - p_there)]
        soft = np.log(np.sum(np.concatenate(parts), axis=0))
        critic += cfg.alpha * np.mean(soft - value(q, d.s, d.g, d.a))

    noise = normal(k_now, d.a.shape)
    mine, log_prob = tanh_sample(nets.actor, d.s, d.ga, noise)
    worth = np.minimum(*(value(q, d.s, d.ga, mine) for q in frozen.q))
    _, still = tanh_sample(frozen.actor, d.s, d.ga, noise)
    return {
        "q": float(critic),
        "actor": float(np.mean(np.exp(frozen.log_weight) * log_prob - worth)),
        "log_weight": float(nets.log_weight * (-np.mean(still) + dims)),
    }


def fmpc(nets: Any, frozen: Any, target: Any, d: Data, cfg: Any, key: Any, batch: Batch) -> dict:
    k_policy, k_model = jr.split(key)
    assert batch.states is not None and batch.return_to_go is not None
    rows, n = len(d.s), cfg.chunk
    a = wide(batch.actions)[:, : cfg.policy_chunk or n].reshape(rows, -1)
    block, returns = wide(batch.states).reshape(rows, -1), wide(batch.return_to_go)
    if batch.goals is None:
        assert batch.rewards is not None
        r, m = np.zeros(rows), np.ones(rows)
        for i, rewards in enumerate(wide(batch.rewards)):
            r[i] = sum(cfg.discount**j * x for j, x in enumerate(rewards)) / (
                n if cfg.chunk_reward == "mean" else 1
            )
    else:
        r = wide(batch.goals.reached)
        m = 1 - r
    after, last, bce = (
        value(frozen.v, d.after, d.g),
        n + 1 if cfg.release_return_to_go else 1,
        cfg.value == "bce",
    )
    after = sigmoid(after) if bce and not cfg.release_bce else after
    y, v, q = r + cfg.discount**n * m * after, value(nets.v, d.s, d.g), value(nets.q, block, d.g, a)
    fit = (lambda x, y: cross_entropy(x, np.clip(y, 0, 1))) if bce else (lambda x, y: np.mean((x - y) ** 2))
    return {
        "flow": flow_loss(lambda x, t: net(nets.flow, d.s, d.ga, x, t), a, k_policy),
        "model": flow_loss(lambda x, t: net(nets.model, d.s, a, x, t), block, k_model),
        "v": float(np.mean([fit(v, returns[:, j]) for j in range(last)])),
        "q": float(fit(q, y)),
    }


LOSSES = {f.__name__: f for f in (flow_bc, iql, fql, rebrac, ifql, idql, gciql, nsac_bc, sharsa, cql, fmpc)}
