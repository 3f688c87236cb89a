"""MOPO: model-based offline policy optimisation (Yu et al. 2020, arXiv 2005.13239).

Soft actor-critic on imagined steps, whose rewards are lowered by the largest spread that a model of the
ensemble predicts: `r - β max_e ||σ_e(s, a)||`. σ has an entry for each of the normalised next state, and one
for the reward where the same ensemble predicts it (`joint_reward`).
"""

from jaxtyping import Array, Float, Key

from mac.actor_critic import Step
from mac.mbpo import AbstractMBPO, MBPOConfig, MBPONets
from mac.nn.critics import Critics


class MOPOConfig(MBPOConfig):
    """Hyperparameters of MOPO."""


class MOPO(AbstractMBPO[MOPOConfig]):
    """Penalty: the norm of the standard deviations that the most uncertain model predicts."""

    def uncertainty(
        self, nets: MBPONets, target: Critics, step: Step, key: Key[Array, ""]
    ) -> Float[Array, " B"]:
        del target, key
        return nets.model.dynamics(step.obs, step.action).spread()
