"""Returns of imagined trajectories and of the chunks in them, and those that belong to a probability."""

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient as sg
from jaxtyping import Array, Float

from mac.target_platform import target_platform
from mac.types import Number


def lambda_return(
    reward: Float[Array, " T *B"],
    mask: Float[Array, " T *B"],
    next_value: Float[Array, " T *B"],
    *,
    discount: Number,
    lam: float,
) -> Float[Array, " T *B"]:
    """λ-return of every step of imagined trajectories, computed backwards.

    `R_k = r_k + m_k γ ((1 - λ) v_{k+1} + λ R_{k+1})`, with `R_T = v_T`: the same numbers as
    generalised advantages plus values. At λ = 1 only the last value enters.

    Args:
        reward: reward of each chunk, in dataset units.
        mask: 0 where the chunk ends the task, else 1.
        next_value: value of the state after each chunk; no gradient is stopped here.
        discount: factor per *chunk*, i.e. γ**n, in (0, 1].
        lam: weight of longer returns, in [0, 1].
    Raises:
        ValueError: if `discount` or `lam` is out of range.
    Source: Schulman et al. 2016 (GAE); Park et al. 2025 (MAC), eq. 10 at λ = 1.
    """
    if isinstance(discount, float | int) and not 0.0 < discount <= 1.0:
        raise ValueError(f"discount={discount}: the factor per chunk must be in (0, 1]")
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lam={lam}: must be in [0, 1]")

    def backwards(ret, step):
        r, m, v = step
        ret = r + m * discount * (ret if lam == 1.0 else (1 - lam) * v + lam * ret)
        return ret, ret

    # On an accelerator each step of a loop is three kernels; written out, all steps are one.
    unroll = target_platform() != "cpu"
    steps = reward, mask, next_value
    return jax.lax.scan(backwards, next_value[-1], steps, reverse=True, unroll=unroll)[1]


def lambda_mixture(
    q: Float[Array, " T1 *B"],
    reward: Float[Array, " T *B"],
    mask: Float[Array, " T *B"],
    *,
    discount: Number,
    shares: Float[Array, " T"],
) -> Float[Array, " T1 *B"]:
    """Weighted mean, at every step, of its Q and of the returns of 1, 2, ... steps that end in a later Q.

    `y_i = (1 - c_i) q_i + c_i (r_i + γ m_i y_{i+1})`, with `y_T = q_T`. The shares c (`mixture_shares`) give
    the return of k steps a weight proportional to λ**k. No gradient passes from a return to a later one.

    Args:
        q: value of the action at each of the T steps, and at the state after them.
        reward: reward of each step.
        mask: 0 where nothing follows a step, else 1, or a probability.
    Source: Park and Lee 2024 (LEQ), arXiv 2407.00699.
    """

    def backwards(later, step):
        q, r, m, share = step
        ret = (1 - share) * q + share * (r + discount * m * sg(later))
        return ret, ret

    unroll = target_platform() != "cpu"
    last = q[-1]
    earlier = jax.lax.scan(backwards, last, (q[:-1], reward, mask, shares), reverse=True, unroll=unroll)[1]
    return jnp.concatenate([earlier, last[None]])


def mixture_shares(lam: Number, steps: int) -> Float[Array, " T"]:
    """Weight of what follows each step in its `lambda_mixture`, against 1 minus it for the step's own Q."""
    totals = jnp.cumsum(lam ** jnp.arange(steps + 1, dtype=float))  # of the weights 1, λ, λ², ...
    return 1 - 1 / totals[:0:-1]


def chunk_reward(rewards: Float[Array, "*B H"], *, discount: Number, reduce: str) -> Float[Array, "*B"]:
    """One reward for a chunk: the discounted sum of its rewards, or that sum divided by H.

    Args:
        discount: factor per environment step, γ.
        reduce: "sum" as the paper's eq. 6, or "mean" as the runs behind its tables. Where all values are
            made of such rewards (MAC), both have the same optimal policy: values differ by the factor H.
    Raises:
        ValueError: if `reduce` is neither.
    """
    powers = discount ** jnp.arange(rewards.shape[-1], dtype=rewards.dtype)
    weights = jnp.broadcast_to(powers, rewards.shape)
    if reduce == "mean":
        return jnp.mean(weights * rewards, axis=-1)
    if reduce == "sum":
        return jnp.sum(weights * rewards, axis=-1)
    raise ValueError(f"reduce={reduce!r}: choose 'mean' or 'sum'")


def return_of_probability(logit: Float[Array, "*B"], discount: Number) -> Float[Array, "*B"]:
    """Return, -1 per step until the goal, of the logit of a discounted probability to reach it.

    A goal that takes T steps has the probability γ**T and the return -(1 - γ**T) / (1 - γ).
    """
    return -jax.nn.sigmoid(-logit) / (1 - discount)
