"""The fourth compiled function: an algorithm's diagnosis of itself, for every seed in one call."""

from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.run.mesh import ALL, SEED, map_seeds, over_seeds
from mac.run.rng_streams import Stream, stream
from mac.types import Episodes, Window


@partial(jax.jit, static_argnums=(0, 1))
def diagnose(
    algo: AbstractAlgorithm, mesh: Mesh, window: Window, keys: Key[Array, " S"], state: TrainState
) -> dict[str, Float[Array, " S"]]:
    """Each seed's own metrics, `AbstractAlgorithm.diagnose`, on the devices that train it.

    Args:
        window: data to look at, on every device of `mesh`.
        keys: one per seed, those of the evaluation (`mac.run.evaluate.evaluation_keys`).
        state: leading axis S, spread over `mesh`; it is not donated.
    """

    def one_device(window: Window, keys: Key[Array, " s"], state: TrainState):
        def one_seed(state: TrainState, key: Key[Array, ""]):
            with algo.numerics.matmuls():
                return algo.with_hparams(state.swept).diagnose(state, window, stream(key, Stream.DIAGNOSIS))

        return map_seeds(one_seed, state, keys)

    return over_seeds(one_device, mesh, (ALL, SEED, SEED), SEED)(window, keys, state)


def overestimation(result: Episodes) -> dict[str, Float[np.ndarray, " S"]]:
    """Metrics of each seed: expected returns, realized returns, and their difference.

    Means over tasks and episodes; empty for an algorithm that predicts nothing.
    """
    if result.predicted is None or result.realised is None:
        return {}
    expected, realised = (np.asarray(x).mean(axis=(1, 2)) for x in (result.predicted, result.realised))
    found = {"predicted_return": expected, "realised_return": realised, "overestimation": expected - realised}
    return {f"diagnostics/{name}": value for name, value in found.items()}
