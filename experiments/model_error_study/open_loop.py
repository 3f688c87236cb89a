"""Error of dynamics models that run open loop along real trajectories, with bootstrap intervals."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.random as jr
import numpy as np
from jaxtyping import Array, Float, Int

from mac.data.chunk_sequences import check_sequences, sample_sequences, sequence_starts
from mac.data.normalize import Normalizer
from mac.data.store import Store
from mac.data.window import make_window
from mac.errors import UserError
from mac.nn.mlp import MLP
from mac.ops.rollout import residual_model, squared_error
from mac.run.mesh import map_seeds
from mac.run.report.stats import Interval, summarise
from mac.run.rng_streams import Stream, stream
from mac.types import SampleSpec, Window

REPS = 2000  # bootstrap samples of an interval


class Errors(NamedTuple):
    """Squared errors along B trajectories, mean over the entries of the normalised state.

    Attributes:
        horizons: environment steps of each of the L columns.
        model: errors of each seed's model.
        still: errors of the prediction that the state is constant.
        episode: number of the episode that each trajectory is part of.
    """

    horizons: list[int]
    model: Float[np.ndarray, "S L B"]
    still: Float[np.ndarray, "L B"]
    episode: Int[np.ndarray, " B"]


def held_out(store: Store, normalizer: Normalizer) -> Window:
    """Returns the validation split on the device, normalised as the training data are.

    Raises:
        UserError: the dataset has no validation split.
    """
    if store.val is None:
        raise UserError(
            f"{store.path}: this dataset has no held-out data (a file ...-val.npz in the same folder); "
            "make one with python experiments/generate_data.py"
        )
    return make_window(store._replace(train=(store.val,)), normalizer, SampleSpec(1, 1, every_row=True))


def check_horizon(flag: str, horizon: int, chunk: int, store: Store) -> None:
    """Raises UserError, which begins with `flag`, if held-out episodes are shorter than the horizon."""
    where = f"{flag}={horizon}"
    if horizon < 1 or horizon % chunk:
        raise UserError(f"{where}: must be a multiple of the chunk length, {chunk}, and at least that")
    if store.val is not None:
        check_sequences(f"{where}, {store.path}", store.val.length, chunk, horizon // chunk)


def open_loop_errors(
    nets: MLP, window: Window, chunk: int, horizon: int, trajectories: int, seed: int, algo: Any = None
) -> Errors:
    """Measures errors of dynamics networks at every multiple of `chunk` up to `horizon`.

    Each network starts at a real state, takes the real actions, and predicts every state from its previous
    prediction. The trajectories depend on `horizon`, `trajectories` and `seed` only, not on the chunk length.

    Args:
        nets: networks of `mac.ablations.dynamics_only.Dynamics`, leading axis S.
        algo: the algorithm, whose `dynamics` says what the networks predict; None: deterministic changes.
            Of a model that draws its states, one draw is measured, whose spread counts as error.
    """
    count, key = horizon // chunk, jr.key(seed)
    dynamics = getattr(algo, "dynamics", None)
    k_model = stream(key, Stream.SUCCESSORS) if dynamics and dynamics.draws else None

    def error(net: MLP, real: Any) -> Float[Array, "L B"]:
        model = residual_model(net) if dynamics is None else dynamics.sampler(algo.cfg, net)
        obs, actions = real
        return squared_error(model, obs, actions, k_model)

    real = jax.jit(sample_sequences, static_argnums=(1, 2, 3))(window, chunk, count, trajectories, key)
    _, last = sequence_starts(window.episodes, horizon, trajectories, key)
    every = jax.jit(lambda nets, real: map_seeds(lambda net: error(net, real), nets))
    return Errors(
        horizons=[chunk * k for k in range(1, count + 1)],
        model=np.asarray(every(nets, real)),
        still=np.asarray(squared_error(lambda obs, _: obs, *real)),
        episode=np.unique(np.asarray(last), return_inverse=True)[1],
    )


def over_seeds(error: Float[np.ndarray, "S B"]) -> Interval:
    """Returns the mean error with a 95% bootstrap interval over seeds: the variance of training."""
    value = float(error.mean(dtype=np.float64))
    if not math.isfinite(value):  # a model whose state overflows float32
        return Interval(value, math.nan, math.nan)
    return summarise(error.mean(axis=1, dtype=np.float64)[:, None], reps=REPS).mean


def interval_text(values: Sequence[float] | Float[np.ndarray, " S"]) -> str:
    """Writes the mean of the seeds' values, with its 95% interval where there are several."""
    found = over_seeds(np.asarray(values)[:, None])
    return f"{found.value:.3g}" + (f" ({found.low:.3g} to {found.high:.3g})" if len(values) > 1 else "")


def over_episodes(error: Float[np.ndarray, "S B"], episode: Int[np.ndarray, " B"]) -> Interval:
    """Returns the mean error with a 95% bootstrap interval over held-out episodes: the variance of the data.

    Trajectories of one episode overlap, so whole episodes are resampled.
    """
    value = float(error.mean(dtype=np.float64))
    count = np.bincount(episode)
    if not math.isfinite(value) or len(count) < 2:
        return Interval(value, math.nan, math.nan)
    total = np.bincount(episode, error.mean(axis=0, dtype=np.float64))
    draw = np.random.default_rng(0).integers(len(count), size=(REPS, len(count)))
    low, high = np.quantile(total[draw].sum(axis=1) / count[draw].sum(axis=1), [0.025, 0.975])
    return Interval(value, float(low), float(high))


def network_of(nets: Any, title: str) -> MLP:
    """Returns the dynamics network among an algorithm's networks.

    Raises:
        UserError: the algorithm has no dynamics model that is one network.
    """
    model = getattr(nets, "model", None)
    if not isinstance(model, MLP):
        raise UserError(f"--policy: {title} has no dynamics model of action chunks; name runs of MAC")
    return model
