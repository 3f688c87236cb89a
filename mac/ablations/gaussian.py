"""MAC (Gau): MAC whose policy is a Gaussian (Park et al. 2025, arXiv 2512.08108, table 3).

One tanh-squashed diagonal Gaussian over the whole chunk, fitted by maximum likelihood, in place of the
flow policy and its one-step copy. What is left is MAC: the best of N samples under Q, while training
and while acting; the samples keep their full spread there, too. It shows what an expressive policy is
worth: one mode per action cannot follow experts that do one of several things.

Where the environment has goals the paper has no such runs; the policy then reads them as MAC's does.
"""

from dataclasses import dataclass
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.config import Config
from mac.mac import MAC, Goal, Nets, States
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.losses import Losses


@dataclass(frozen=True)
class GaussianConfig(Config):
    """Hyperparameters of MAC, less those of the flow."""

    def __post_init__(self):
        super().__post_init__()
        self._require_default("flow_steps", "flow_steps_test", reason="a Gaussian policy has no flow")


class MACGaussian(MAC):
    """MAC with a Gaussian policy over chunks."""

    cfg: GaussianConfig = eqx.field(static=True)

    def policy_nets(self, sizes: tuple[int, int | None, int], key: Key[Array, ""]) -> tuple[Any, Any]:
        *inputs, chunk = sizes
        return None, GaussianPolicy(inputs, self.cfg.hidden, chunk, key=key)

    def behavior_loss(self, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]) -> Losses:
        """Negative log-likelihood of the data, whose actions the sampler keeps off ±1."""
        del key
        return {"policy/nll": -jnp.mean(nets.policy(s, g).log_prob(a))}

    def sample_chunks(
        self, nets: Nets, s: States, g: Goal, key: Key[Array, ""], n: int, *, acting: bool = False
    ) -> Float[Array, "n B A"]:
        del acting
        noise = jr.normal(key, (n, len(s), self.cfg.chunk * self.env.action_dim))
        return nets.policy(s, g).at(noise)
