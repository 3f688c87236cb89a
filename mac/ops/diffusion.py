"""Denoising diffusion (Ho et al. 2020, DDPM), of actions and of trajectories; step 0 is the data's end."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

Denoiser = Callable[[Float[Array, "*B X"], Float[Array, "*B 1"]], Float[Array, "*B X"]]
"""The noise in `x` after so many steps: `denoiser(x, step)`, step 0 ... T-1 as a float."""


def vp_betas(steps: int, low: float = 0.1, high: float = 10.0) -> Float[Array, " T"]:
    """Variance of the noise that each step adds: the variance-preserving process, in `steps` steps.

    Source: Xiao et al. 2022 (denoising diffusion GANs), as in Hansen-Estruch et al. 2023 (IDQL).
    """
    t = jnp.arange(1.0, steps + 1)
    return 1 - jnp.exp(-low / steps - 0.5 * (high - low) * (2 * t - 1) / steps**2)


def add_noise(
    data: Float[Array, "*B"], noise: Float[Array, "*B"], kept: Float[Array, "..."]
) -> Float[Array, "*B"]:
    """Mixes data and unit noise so that a share `kept` of the variance is the data's."""
    return jnp.sqrt(kept) * data + jnp.sqrt(1 - kept) * noise


def diffusion_loss(
    denoiser: Denoiser, data: Float[Array, "B X"], betas: Float[Array, " T"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """Squared error of the predicted noise: sum over dimensions, mean over the batch, random steps."""
    k_step, k_noise = jr.split(key)
    step = jr.randint(k_step, (len(data), 1), 0, len(betas))
    noise = jr.normal(k_noise, data.shape)
    kept = jnp.cumprod(1 - betas)[step]
    x = add_noise(data, noise, kept)
    error = denoiser(x, step.astype(data.dtype)) - noise
    return jnp.mean(jnp.sum(jnp.square(error), axis=-1))


def denoise(
    denoiser: Denoiser, noise: Float[Array, "*B X"], betas: Float[Array, " T"], key: Key[Array, ""]
) -> Float[Array, "*B X"]:
    """Samples from `noise` by all steps backwards, clipped to [-1, 1] after each; the last adds no noise."""
    kept = jnp.cumprod(1 - betas)

    def back(x, step):
        t, key = step
        time = jnp.full((*x.shape[:-1], 1), t).astype(x.dtype)
        mean = (x - betas[t] / jnp.sqrt(1 - kept[t]) * denoiser(x, time)) / jnp.sqrt(1 - betas[t])
        fresh = jnp.where(t > 0, jnp.sqrt(betas[t]), 0.0) * jr.normal(key, x.shape)
        return jnp.clip(mean + fresh, -1, 1), None

    steps = jnp.arange(len(betas))[::-1]
    return jax.lax.scan(back, noise, (steps, jr.split(key, len(betas))))[0]


# Trajectories, some of whose entries are known: inpainting, as in Janner et al. 2022 (Diffuser).

Predicts = Literal["data", "noise"]
"""Output of a network that denoises trajectories: the trajectory without noise, or the noise in it."""

TrajectoryNet = Callable[[Float[Array, "B T C"], Float[Array, " B"]], Float[Array, "B T C"]]
"""`net(x, step)`: what it predicts of noisy trajectories `x` after `step` steps, 0 ... N-1 as a float."""

Condition = Callable[[Float[Array, "B T C"]], Float[Array, "B T C"]]
"""Sets the known entries of trajectories to their values."""

LARGEST_BETA = 0.999


def cosine_betas(steps: int, offset: float = 0.008) -> Float[Array, " N"]:
    """Variance of the noise that each step adds: the cosine schedule, at most `LARGEST_BETA`.

    Source: Nichol and Dhariwal 2021 (improved DDPM), as in Janner et al. 2022.
    """
    kept = jnp.square(jnp.cos((jnp.arange(steps + 1.0) / steps + offset) / (1 + offset) * jnp.pi / 2))
    return jnp.clip(1 - kept[1:] / kept[:-1], 0, LARGEST_BETA)


def trajectory_loss(
    net: TrajectoryNet,
    data: Float[Array, "B T C"],
    betas: Float[Array, " N"],
    key: Key[Array, ""],
    *,
    condition: Condition,
    weight: Float[Array, "T C"],
    predicts: Predicts = "data",
) -> Float[Array, ""]:
    """Weighted squared error of what `net` predicts, at random steps: the mean over all entries.

    Known entries enter the network without noise, and count in the mean with an error of 0.

    Args:
        condition: sets the known entries to those of `data`.
        weight: of each entry's squared error.
    """
    k_step, k_noise = jr.split(key)
    step = jr.randint(k_step, (len(data),), 0, len(betas))
    noise = jr.normal(k_noise, data.shape)
    kept = jnp.cumprod(1 - betas)[step][:, None, None]
    predicted = net(condition(add_noise(data, noise, kept)), step.astype(data.dtype))
    wanted = data if predicts == "data" else noise
    error = jnp.square(condition(predicted) - condition(wanted))
    return jnp.mean(jnp.broadcast_to(weight, error.shape) * error)


def inpaint(
    net: TrajectoryNet,
    noise: Float[Array, "B T C"],
    betas: Float[Array, " N"],
    key: Key[Array, ""],
    *,
    condition: Condition,
    predicts: Predicts = "data",
) -> Float[Array, "B T C"]:
    """Samples trajectories with known entries: all steps backwards from `noise`, the last without noise.

    Each step samples DDPM's posterior, given the predicted trajectory clipped to [-1, 1]. `condition` is
    applied before the first step and after each.
    """
    kept = jnp.cumprod(1 - betas)
    before = jnp.concatenate([jnp.ones(1, kept.dtype), kept[:-1]])  # the share that a step back leaves
    of_data = betas * jnp.sqrt(before) / (1 - kept)
    of_x = (1 - before) * jnp.sqrt(1 - betas) / (1 - kept)
    std = jnp.sqrt(betas * (1 - before) / (1 - kept))  # 0 at step 0

    def back(x, step):
        t, key = step
        predicted = net(x, jnp.full(len(x), t).astype(x.dtype))
        if predicts == "noise":
            predicted = (x - jnp.sqrt(1 - kept[t]) * predicted) / jnp.sqrt(kept[t])
        mean = of_data[t] * jnp.clip(predicted, -1, 1) + of_x[t] * x
        return condition(mean + std[t] * jr.normal(key, x.shape)), None

    steps = jnp.arange(len(betas))[::-1]
    return jax.lax.scan(back, condition(noise), (steps, jr.split(key, len(betas))))[0]
