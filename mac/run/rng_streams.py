"""Numbers that are folded into keys so that no two purposes share random bits.

`jr.split(key, n)[i]` equals `jr.fold_in(key, i)`, and draws from `key` are made of the same bits. Hence one
rule: a key is split once, or drawn from once, or only folded. Where one key is folded for several purposes,
each purpose has a stream of its own.
"""

import enum

import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Key


class Stream(enum.IntEnum):
    """Purposes. All are at least 2**31; updates, tasks, episodes and seeds of other draws are below it."""

    # Of a seed's key.
    EVALUATION = 1 << 31  # evaluations, which fold in the number of the update
    INIT = enum.auto()  # initial weights
    UPDATES = enum.auto()  # batches and losses, which fold in the number of the update
    # Of an evaluation's key, which otherwise folds in tasks.
    DIAGNOSIS = enum.auto()  # an algorithm's diagnosis of itself
    DRAWS = enum.auto()  # evaluations of other episodes, which fold in a number
    # Of an online training's key (`experiments.expert_training.online_training`).
    EXPERT_INIT = enum.auto()  # initial weights
    EXPERT_STARTS = enum.auto()  # states at which episodes begin
    EXPERT_STEPS = enum.auto()  # iterations, which fold in their number
    EXPERT_PLAY = enum.auto()  # episodes that only show how good the policy is
    # Of a seed's key.
    REPLAY = enum.auto()  # imagined transitions, which fold in the number of the update
    # Of the key of a study of models (`experiments.model_error`).
    SUCCESSORS = enum.auto()  # states that models draw, and repetitions in the simulator


def stream(key: Key[Array, ""], which: Stream) -> Key[Array, ""]:
    """The key of one purpose, given the key that several purposes share."""
    return jr.fold_in(key, jnp.uint32(which))
