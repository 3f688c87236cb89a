"""A saved run's policy for any loop: `policy = mac.load(RUN); action = policy(obs, goal)`."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from mac.errors import UserError
from mac.run.evaluate import Policies, episode_keys, no_past, remember, select_actions
from mac.types import EnvSpec, Past

_RUNS = "experiments.launch.saved_run"
"""Module of the commands that knows how a run's folder is laid out; imported when a run is loaded."""

_act = eqx.filter_jit(select_actions)


def load(run: str | Path, *, seed: int | None = None, step: int | None = None) -> "Policy":
    """Loads the policy of one seed of the run in the folder `run`.

    Args:
        seed: the seed's number; None is the run's first.
        step: update whose checkpoint is loaded; None is the newest.
    Raises:
        UserError: no run, no such seed or checkpoint, or a damaged file.
    """
    found = importlib.import_module(_RUNS).open_run(Path(run), step)
    number = found.numbers[0] if seed is None else seed
    if number not in found.numbers:
        raise UserError(f"seed={seed}: {run} has seeds {found.numbers[0]} to {found.numbers[-1]}")
    return found.policy(number)


class Policy:
    """The policy of one seed, in the environment's units: observations in, actions in [-1, 1] out.

    Chunks of actions are executed open loop: most calls return the next action of the chunk and ignore
    `obs`. A batch of observations is a batch of episodes, each with its own chunk. The noise of an episode
    depends on its task and number only. It equals the noise of the run's own evaluation of that seed, task
    and episode.

    Attributes:
        env: facts about the environment.
        algo: the algorithm, with its hyperparameters `algo.cfg`.
        normalizer: map of observations to what the networks read.
        chunk: actions executed per decision; 0 before the first.
    """

    def __init__(self, policies: Policies, key: Key[Array, ""]):
        """`policies` has one seed; `key` is that of its evaluation (`evaluation_keys`)."""
        self._policies, self._key = policies, key
        self.env: EnvSpec = policies.algo.env
        self.algo, self.normalizer = policies.algo, policies.normalizer
        self.chunk = 0
        self.reset()

    @property
    def nets(self) -> Any:
        """The networks of this seed, such as `nets.q`; what they read is normalised."""
        return jax.tree.map(lambda x: x[0], self._policies.state.nets)

    def reset(self, *, task: int | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; call it wherever the environment is reset.

        Args:
            task: the episodes' task, 1-based; None is the environment's first.
            episodes: number of each episode of the batch; None counts from 0. Single observations are a
                batch of one.
        """
        self._task = self.env.tasks[0] if task is None else task
        self._asked = None if episodes is None else np.asarray(episodes, np.int32)
        self._now: _Episodes | None = None

    def restart(self, ended: np.ndarray) -> None:
        """Begins new episodes in a part of the batch, whose numbers follow the largest one so far.

        Args:
            ended: [B], True where an episode has ended.
        """
        now, at = self._now, np.flatnonzero(ended)
        if now is None:
            return
        now.numbers[at] = now.numbers.max() + 1 + np.arange(len(at), dtype=np.int32)
        now.keys = now.keys.at[:, at].set(self._noise(now.numbers[at]))
        now.used[at], now.decision[at] = self.chunk, 0
        if now.past is not None:
            now.past = dataclasses.replace(now.past, valid=now.past.valid.at[:, at].set(False))

    def __call__(
        self,
        obs: np.ndarray,
        goal: np.ndarray | None = None,
        reward: np.ndarray | float | None = None,
    ) -> np.ndarray:
        """Returns the next action, [A], or one for each row of a batch, [B, A].

        Args:
            obs: [D] or [B, D].
            goal: of goal-conditioned environments, [G] or [B, G]: the goal's entries (`env.goal_columns`),
                or a whole observation that is the goal.
            reward: of the step before, read by policies that act with a history.
        Raises:
            UserError: an argument is missing or has another shape.
        """
        given = np.asarray(obs, np.float32)
        single, rows = given.ndim == 1, np.atleast_2d(given)
        if rows.ndim != 2 or rows.shape[1] != self.env.obs_dim:
            raise UserError(f"obs has shape {given.shape}, expected ({self.env.obs_dim},) or (B, ...)")
        goals = self._goals(goal, len(rows))
        if self._now is None:
            self._now = self._begin(len(rows))
        elif len(rows) != len(self._now.numbers):
            running = len(self._now.numbers)
            raise UserError(f"obs has {len(rows)} rows, and {running} episodes are running; call reset()")
        else:
            self._remember(self._now, reward)
        action = self._next(self._now, rows, goals)
        self._now.last = rows, action
        return action[0] if single else action

    def _begin(self, count: int) -> "_Episodes":
        numbers = np.arange(count, dtype=np.int32) if self._asked is None else self._asked.copy()
        if len(numbers) != count:
            raise UserError(f"reset(episodes=...) has {len(numbers)} numbers, obs has {count} rows")
        self.chunk = 0
        past = no_past(self._policies.algo, (1, count))
        return _Episodes(numbers, self._noise(numbers), past, np.zeros(count, np.int32))

    def _noise(self, numbers: np.ndarray) -> Key[Array, "1 B"]:
        """Keys of the policy's noise in the episodes of these numbers."""
        task = jnp.full(len(numbers), self._task, jnp.int32)
        return episode_keys(self._key[None], task, jnp.asarray(numbers))[1]

    def _goals(self, goal: np.ndarray | None, count: int) -> np.ndarray | None:
        width, columns = self.env.goal_dim, list(self.env.goal_columns)
        if width is None:
            return None
        if goal is None:
            raise UserError(f"{self.env.name} is goal-conditioned: call policy(obs, goal)")
        goals = np.atleast_2d(np.asarray(goal, np.float32))
        if goals.shape[-1] == self.env.obs_dim != width:
            goals = goals[:, columns]
        if goals.shape not in ((count, width), (1, width)):
            raise UserError(f"goal has shape {np.shape(goal)}, expected ({width},) or ({count}, {width})")
        return np.broadcast_to(goals, (count, width))

    def _remember(self, now: "_Episodes", reward: np.ndarray | float | None) -> None:
        """Adds the last step to the history, except in episodes that have just begun."""
        if now.past is None or now.last is None:
            return
        if reward is None:
            raise UserError("acts with a history: call policy(obs, goal, reward of the last step)")
        obs, action = now.last
        paid = np.broadcast_to(np.asarray(reward, np.float32), len(obs))
        after = remember(now.past, jnp.asarray(obs)[None], jnp.asarray(action)[None], jnp.asarray(paid)[None])
        valid = jnp.where((now.decision == 0)[None, :, None], now.past.valid, after.valid)
        now.past = dataclasses.replace(after, valid=valid)

    def _next(self, now: "_Episodes", obs: np.ndarray, goal: np.ndarray | None) -> np.ndarray:
        """The next action of each episode, after a decision where a chunk is used up."""
        due = now.used >= self.chunk
        if due.any():
            goals = None if goal is None else jnp.asarray(goal)[None]
            decision = jnp.asarray(now.decision)[None]
            found = _act(self._policies, jnp.asarray(obs)[None], goals, now.keys, decision, now.past)
            fresh = np.clip(np.asarray(found[0]), -1, 1)
            self.chunk = fresh.shape[1]
            now.actions = fresh if due.all() else np.where(due[:, None, None], fresh, now.actions)
            now.used = np.where(due, 0, now.used)
            now.decision = now.decision + due
        action = now.actions[np.arange(len(obs)), now.used]
        now.used = now.used + 1
        return action


@dataclasses.dataclass
class _Episodes:
    """Running episodes.

    Attributes:
        numbers: number of each episode.
        keys: of the policy's noise, leading axis 1 (one seed).
        past: history, if the policy acts with one.
        decision: chunks chosen so far.
        used: actions of the current chunk that were executed.
        actions: current chunk of each episode.
        last: observations and actions of the last step.
    """

    numbers: np.ndarray
    keys: Key[Array, "1 B"]
    past: Past | None
    decision: np.ndarray
    used: np.ndarray = dataclasses.field(init=False)
    actions: np.ndarray = dataclasses.field(init=False)
    last: tuple[np.ndarray, np.ndarray] | None = None

    def __post_init__(self):
        self.used, self.actions = np.zeros_like(self.decision), np.zeros((len(self.decision), 0, 0))
