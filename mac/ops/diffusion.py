"""Denoising diffusion (Ho et al. 2020, DDPM) that predicts the noise; step 0 is the data's end."""

from collections.abc import Callable

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


def diffusion_loss(
    denoiser: Denoiser, data: Float[Array, "B X"], betas: Float[Array, " T"], key: Key[Array, ""]
) -> Float[Array, ""]:
    """Squared error of the predicted noise: sum over dimensions, mean over the batch, random steps."""
    k_step, k_noise = jr.split(key)
    step = jr.randint(k_step, (len(data), 1), 0, len(betas))
    noise = jr.normal(k_noise, data.shape)
    kept = jnp.cumprod(1 - betas)[step]
    x = jnp.sqrt(kept) * data + jnp.sqrt(1 - kept) * noise
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
