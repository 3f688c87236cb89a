"""A saved run's policy for any loop: `policy = mac.load(RUN); action = policy(obs, goal)`."""

import dataclasses
import importlib
from collections.abc import Sequence
from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

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
        chunk: actions executed per decision; 0 before the first.
    """

    def __init__(self, policies: Policies, key: Key[Array, ""]):
        """`policies` has one seed; `key` is that of its evaluation (`evaluation_keys`)."""
        self._policies, self._key = policies, key
        self.env: EnvSpec = policies.algo.env
        self.chunk = 0
        self.reset()

    def reset(self, *, task: int | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes; call it wherever the environment is reset.

        Args:
            task: the episodes' task, 1-based; None is the environment's first.
            episodes: number of each episode of the batch; None counts from 0. Single observations are a
                batch of one.
        """
        self._task = self.env.tasks[0] if task is None else task
        self._numbers = None if episodes is None else np.asarray(episodes, np.int32)
        self._actions: np.ndarray | None = None

    def restart(self, ended: np.ndarray) -> None:
        """Begins new episodes in a part of the batch, whose numbers follow the largest one so far.

        Args:
            ended: [B], True where an episode has ended.
        """
        if self._actions is None:
            return
        at = np.flatnonzero(ended)
        self._numbers[at] = self._numbers.max() + 1 + np.arange(len(at), dtype=np.int32)  # pyright: ignore[reportOptionalSubscript, reportOptionalMemberAccess]
        self._place(at)
        self._used[at], self._decision[at] = self.chunk, 0
        if self._past is not None:
            self._past = dataclasses.replace(self._past, valid=self._past.valid.at[:, at].set(False))

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
            reward: of the step before, read by policies that act with a history (`tt`).
        Raises:
            UserError: an argument is missing or has another shape.
        """
        given = np.asarray(obs, np.float32)
        single, rows = given.ndim == 1, np.atleast_2d(given)
        if rows.ndim != 2 or rows.shape[1] != self.env.obs_dim:
            raise UserError(f"obs has shape {given.shape}, expected ({self.env.obs_dim},) or (B, ...)")
        goals = self._goals(goal, len(rows))
        if self._actions is None:
            self._begin(len(rows))
        elif len(rows) != len(self._numbers):  # pyright: ignore[reportArgumentType]
            raise UserError(
                f"obs has {len(rows)} rows, and the episodes are {len(self._actions)}; call reset()"
            )
        else:
            self._remember(reward)
        action = self._next(rows, goals)
        self._last = rows, action
        return action[0] if single else action

    def _begin(self, count: int) -> None:
        if self._numbers is None:
            self._numbers = np.arange(count, dtype=np.int32)
        if len(self._numbers) != count:
            raise UserError(f"reset(episodes=...) has {len(self._numbers)} numbers, obs has {count} rows")
        self._keys = jax.random.split(self._key, (1, count))
        self._place(np.arange(count))
        self._decision = np.zeros(count, np.int32)
        self._used = np.zeros(count, np.int32)
        self._past: Past | None = no_past(self._policies.algo, (1, count))

    def _place(self, at: np.ndarray) -> None:
        """Sets the keys of the policy's noise of some episodes."""
        assert self._numbers is not None
        task = jnp.full(len(at), self._task, jnp.int32)
        _, noise = episode_keys(self._key[None], task, jnp.asarray(self._numbers[at]))
        self._keys = self._keys.at[:, at].set(noise)

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

    def _remember(self, reward: np.ndarray | float | None) -> None:
        if self._past is None:
            return
        if reward is None:
            raise UserError(
                "this policy acts with a history: call policy(obs, goal, reward_of_the_last_step)"
            )
        obs, action = self._last
        paid = np.broadcast_to(np.asarray(reward, np.float32), len(obs))
        before = self._past.valid
        self._past = remember(self._past, obs[None], action[None], jnp.asarray(paid[None]))
        # An episode that has just begun has no last step.
        fresh = (self._decision == 0) & (self._used == self.chunk)
        valid = jnp.where(fresh[None, :, None], before, self._past.valid)
        self._past = dataclasses.replace(self._past, valid=valid)

    def _next(self, obs: np.ndarray, goal: np.ndarray | None) -> np.ndarray:
        """The next action of each episode, after a decision where a chunk is used up."""
        count = len(obs)
        due = np.ones(count, bool) if self._actions is None else self._used >= self.chunk
        if due.any():
            goals = None if goal is None else jnp.asarray(goal)[None]
            decision = jnp.asarray(self._decision)[None]
            found = _act(self._policies, jnp.asarray(obs)[None], goals, self._keys, decision, self._past)
            fresh = np.clip(np.asarray(found[0]), -1, 1)
            self._actions = np.where(
                due[:, None, None], fresh, fresh if self._actions is None else self._actions
            )
            self.chunk = fresh.shape[1]
            self._used = np.where(due, 0, self._used)
            self._decision = self._decision + due
        assert self._actions is not None
        action = self._actions[np.arange(count), self._used]
        self._used = self._used + 1
        return action
