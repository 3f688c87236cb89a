"""The base of test policies that act and never learn."""

import equinox as eqx
import jax

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.types import Batch, EnvSpec, Metrics, SampleSpec
from tests.helpers.toy_env import SPEC


class ActsOnly(AbstractAlgorithm):
    """A policy without learning; `nets` is whatever it acts by."""

    env: EnvSpec = eqx.field(static=True, default=SPEC)

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(1, 1)

    def init(self, key: jax.Array) -> TrainState:
        raise NotImplementedError

    def update(
        self, state: TrainState, batch: Batch, step: jax.Array, key: jax.Array
    ) -> tuple[TrainState, Metrics]:
        raise NotImplementedError
