"""MOBILE: model-Bellman inconsistency (Sun et al. 2023, ICML, PMLR v202).

Soft actor-critic on imagined steps, whose rewards are lowered by how much the models of the ensemble disagree
about the value of what follows: the standard deviation over models of the mean value of S next states each.
"""

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Key

from mac.actor_critic import Step
from mac.mbpo import AbstractMBPO, MBPOConfig, MBPONets
from mac.nn.critics import Combine, Critics, aggregate, q_values


class MOBILEConfig(MBPOConfig):
    """Hyperparameters of MOBILE."""

    samples: int = 5
    """next states of each model that a penalty looks at, S"""
    penalty_combine: Combine = "mean"
    """how a penalty aggregates the two target critics (mean: the runs of MAC's authors; min: MOBILE's)"""
    unbiased_std: bool = False
    """whether standard deviations over E models divide by E - 1 (MOBILE's own code) instead of E"""

    def __check_init__(self):
        self._require_positive("samples")
        self._require(
            "unbiased_std", not self.unbiased_std or self.members > 1, "needs at least 2 --hp.members"
        )


class MOBILE(AbstractMBPO[MOBILEConfig]):
    """Penalty: disagreement of the models about the next state's value."""

    def uncertainty(
        self, nets: MBPONets, target: Critics, step: Step, key: Key[Array, ""]
    ) -> Float[Array, " B"]:
        cfg, (k_state, k_action) = self.cfg, jr.split(key)
        guess, obs = nets.model.dynamics(step.obs, step.action), step.obs.shape[-1]
        mean, std = guess.mean[None, ..., :obs], jnp.exp(guess.log_std[None, ..., :obs])
        shape = (cfg.samples, *mean.shape[1:])  # S E B D
        states = jnp.broadcast_to(mean, shape) + jnp.broadcast_to(std, shape) * jr.normal(k_state, shape)
        noise = jr.normal(k_action, (*shape[:-1], self.env.action_dim))
        actions = nets.actor(states, step.goal).at(noise)
        q = aggregate(q_values(target, states, step.goal, actions), cfg.penalty_combine)
        return disagreement(q, unbiased=cfg.unbiased_std)


def disagreement(q: Float[Array, "S E B"], *, unbiased: bool = False) -> Float[Array, " B"]:
    """Standard deviation over E models of the mean over S samples of each."""
    return jnp.std(jnp.mean(q, axis=0), axis=0, ddof=int(unbiased))
