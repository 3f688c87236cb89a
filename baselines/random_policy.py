"""Uniform random actions: the baseline that any policy must beat."""

import equinox as eqx
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.types import Batch, EnvSpec, Metrics, SampleSpec


class UniformPolicy(AbstractAlgorithm):
    """Acts uniformly in [-1, 1], anew at every step, and learns nothing."""

    env: EnvSpec = eqx.field(static=True)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(batch=1, chunk=1)

    def init(self, key: Key[Array, ""]) -> TrainState:
        """A state without any arrays, which therefore serves any number of seeds."""
        del key
        return TrainState(nets=None, target=None, opt_state=None)

    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        del batch, step, key
        return state, {}

    def act(
        self,
        state: TrainState,
        obs: Float[Array, "E D"],
        goal: Float[Array, "E G"] | None,
        key: Key[Array, ""],
    ) -> Float[Array, "E 1 A"]:
        del state, goal
        return jr.uniform(key, (len(obs), 1, self.env.action_dim), minval=-1.0, maxval=1.0)
