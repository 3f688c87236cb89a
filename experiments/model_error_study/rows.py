"""Rows of the CSV files of `model_error.py`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ChunkRow:
    """Errors at one horizon of the models of one chunk length; the names are the columns of the CSV file.

    `error` is the mean over seeds, trajectories and entries of the squared difference of normalised
    states, `seed_*` and `data_*` are its 95% intervals over seeds and over held-out episodes, `still`
    is the error of predicting a constant state.
    """

    chunk: int
    horizon: int
    error: float
    seed_low: float
    seed_high: float
    data_low: float
    data_high: float
    still: float
    loss: float  # of the last updates in training
    seeds: int
    updates: int
    trajectories: int
    episodes: int


@dataclass(frozen=True)
class PolicyRow:
    """One seed of a run: its policy's success and its model's error; the names are the CSV's columns.

    `success` is the mean over tasks. `error` is the squared difference of normalised states at the horizon,
    mean over held-out trajectories and entries; `still` is that of predicting a constant state.
    """

    run: str
    algo: str
    env: str
    chunk: int
    rollout: int  # environment steps of its imagined rollouts
    step: int
    seed: int
    success: float
    episodes: int  # per task
    horizon: int
    error: float
    still: float
    data: str  # origin of its training data


@dataclass(frozen=True)
class SuccessorRow:
    """One seed of a run: its model's successors of chunks at one place; the names are the CSV's columns.

    `energy` is the energy distance (m) of `draws` successors from as many repetitions in the simulator.
    `variation` is the total variation distance of their shares near each exit. Both are means over `contexts`
    chunks.
    `shares` are those of the model, near each exit and near none; `real_shares` those of the simulator.
    `success` and the discounted returns are of the run's evaluation, means over tasks.
    """

    run: str
    algo: str
    env: str
    dynamics: str
    samples: int  # over whose values Q's target averages
    chunk: int
    step: int
    seed: int
    place: str  # teleporter: the chunk enters one; elsewhere
    contexts: int
    draws: int
    energy: float
    variation: float
    shares: str
    real_shares: str
    success: float
    episodes: int  # per task
    predicted: float
    realised: float
    data: str  # origin of its training data


@dataclass(frozen=True)
class WallRow:
    """One seed of a run at one horizon: its model's error by whether a wall is touched; the names are the
    CSV's columns.

    `place` says whether the walker touches a wall in any of the real states up to the horizon. `error` is
    the squared difference of normalised states, mean over these trajectories and entries; `still` is that of
    predicting a constant state.
    """

    run: str
    algo: str
    env: str
    chunk: int
    step: int
    seed: int
    place: str
    horizon: int
    error: float
    still: float
    trajectories: int
    data: str  # origin of its training data
