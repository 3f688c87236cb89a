"""MAC (Gau): MAC whose policy is a Gaussian (Park et al. 2025, arXiv 2512.08108, table 3).

One tanh-squashed diagonal Gaussian over the whole chunk, fitted by maximum likelihood, in place of the
flow policy and its one-step copy. What is left is MAC: the best of N samples under Q, while training
and while acting; the samples keep their full spread there, too. It shows the gain of an expressive policy:
one mode per action cannot follow experts that do one of several things.

Where the environment has goals the paper has no such runs; the policy then reads them as MAC's does.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from mac.config import Config
from mac.mac import MAC, AbstractChunkPolicy, Goal, Nets, States
from mac.nn.gaussian_policy import GaussianPolicy
from mac.ops.losses import Losses
from mac.types import EnvSpec


class GaussianConfig(Config):
    """Hyperparameters of MAC, less those of the flow."""

    def __check_init__(self):
        self._require_default("flow_steps", "flow_steps_test", reason="a Gaussian policy has no flow")


class GaussianChunks(AbstractChunkPolicy[GaussianConfig]):
    """A tanh-squashed Gaussian over chunks, `policy`; there is no flow."""

    def nets(
        self, cfg: GaussianConfig, sizes: tuple[int, int | None, int], key: Key[Array, ""]
    ) -> tuple[Any, GaussianPolicy]:
        *inputs, chunk = sizes
        return None, GaussianPolicy(inputs, cfg.hidden, chunk, key=key)

    def behavior_loss(
        self, cfg: GaussianConfig, nets: Nets, s: Array, g: Goal, a: Array, key: Key[Array, ""]
    ) -> Losses:
        """Negative log-likelihood of the data, whose actions the sampler keeps off ±1."""
        del cfg, key
        return {"policy/nll": -jnp.mean(nets.policy(s, g).log_prob(a))}

    def chunks(
        self,
        cfg: GaussianConfig,
        nets: Nets,
        s: States,
        g: Goal,
        noise: Float[Array, "n B A"],
        *,
        acting: bool,
    ) -> Float[Array, "n B A"]:
        del cfg, acting
        return nets.policy(s, g).at(noise)


def mac_gaussian(cfg: GaussianConfig, env: EnvSpec, steps: int = 0) -> MAC:
    """MAC with a Gaussian policy over chunks; the arguments are those of `MAC`."""
    return MAC(cfg, env, steps, GaussianChunks())
