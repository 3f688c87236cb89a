"""Sampler of batches with NumPy on the host, for the Python training loop of `benchmark.py`."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from mac.data.sampler import ACTION_LIMIT
from mac.types import Batch, GoalDistribution, Goals, SampleSpec, Subgoals, SubgoalSpec, Window

Rows = Int[np.ndarray, " B"]


class HostData:
    """A window's rows in host memory, for sampling with NumPy's fancy indexing.

    Batches have the same distribution as those of `mac.data.sampler.sample`, with other random numbers. A
    row is the index of a state.

    Attributes:
        starts: states at which a chunk may begin.
        steps: states at which an action is taken.
    """

    def __init__(self, window: Window):
        """Copies the window, decoded and normalised.

        Raises:
            ValueError: it has terminations, over which chunks would continue.
        """
        if window.episodes.terminated is not None:
            raise ValueError(
                "the window has terminations, which only mac.data.sampler supports; use it or omit them"
            )
        self.obs = np.asarray(window.obs[:])
        self.action = np.clip(np.asarray(window.action[:]), -ACTION_LIMIT, ACTION_LIMIT)
        self.reward = None if window.reward is None else np.asarray(window.reward)
        self.mask = None if window.mask is None else np.asarray(window.mask)
        self.returns = None if window.return_to_go is None else np.asarray(window.return_to_go)
        index = jax.tree.map(np.asarray, window.episodes)
        self.starts = _runs(index.first, np.diff(index.starts_before, append=index.n_starts))
        self.steps = _runs(index.first, index.steps)
        whole = index.steps > 0  # the others are padding
        self._first = index.first[whole]
        self._last = self._first + index.steps[whole] - 1

    def draw(self, rng: np.random.Generator, spec: SampleSpec) -> Batch:
        """Draws a batch as `spec` requests it, and sends it to the device."""
        begin = self.steps if spec.starts_anywhere else self.starts
        start = begin[rng.integers(len(begin), size=spec.batch)]
        rows, end = start[:, None] + np.arange(spec.chunk), start + spec.chunk
        valid, actions = None, self.action[np.minimum(rows, len(self.action) - 1)]
        if spec.padded:
            last = self.last_of(start)
            valid = (rows <= last[:, None]).astype(np.float32)
            rows, end = np.minimum(rows, last[:, None] + 1), np.minimum(end, last + 1)
            actions = actions * valid[..., None]
        inside = 1 if valid is None else valid
        goals, subgoals, value = self._goals(rng, spec, start) if spec.goals else (None, None, None)
        every = np.concatenate([rows, end[:, None]], axis=1)
        following = self.action[np.minimum(end, self.last_of(start))] if spec.next_action else None
        fields = {
            "obs": self.obs[start],
            "actions": actions,
            "next_obs": self.obs[end],
            "rewards": None if self.reward is None else spec.reward_scale * self.reward[rows] * inside,
            "masks": None if self.mask is None else self.mask[rows] * inside,
            "next_action": following,
            "states": self.obs[every[:, 1:]] if spec.states else None,
            "return_to_go": self._return_to_go(spec, every, value) if spec.return_to_go else None,
            "valid": valid,
        }
        sent, goals, subgoals = jax.device_put((fields, goals, subgoals))  # one call for all
        return Batch(**sent, goals=goals and Goals(**goals), subgoals=subgoals and Subgoals(**subgoals))

    def _return_to_go(
        self, spec: SampleSpec, rows: Int[np.ndarray, "B H1"], goal: Rows | None
    ) -> Float[np.ndarray, "B H1"]:
        if goal is not None:
            before_the_end = goal < self.last_of(rows[:, 0])
            return ((rows <= goal[:, None]) & before_the_end[:, None]).astype(np.float32)
        assert self.returns is not None
        return spec.reward_scale * self.returns[rows]

    def last_of(self, row: Rows) -> Rows:
        """Returns the last state with an action in the episode of each state."""
        return self._last[np.searchsorted(self._first, row, side="right") - 1]

    def goal_rows(
        self, rng: np.random.Generator, distribution: GoalDistribution, row: Rows, last: Rows
    ) -> Rows:
        """Draws a goal state for each of the states `row`; `last` is `last_of(row)`."""
        size = len(row)
        if distribution.geometric:
            later = np.minimum(row + rng.geometric(1 - distribution.discount, size), last)
        else:
            near = np.minimum(row + 1, last)
            later = near + np.rint(rng.random(size) * (last - near)).astype(row.dtype)
        anywhere = self.steps[rng.integers(len(self.steps), size=size)]
        u = rng.random(size)
        in_episode = distribution.current + distribution.trajectory
        return np.select([u < distribution.current, u < in_episode], [row, later], anywhere)

    def _goals(
        self, rng: np.random.Generator, spec: SampleSpec, row: Rows
    ) -> tuple[dict[str, Any], dict[str, Any] | None, Rows]:
        """Returns the fields of `Goals` and, if requested, of `Subgoals`, and the rows of `Goals.value`."""
        assert spec.goals is not None
        last, columns = self.last_of(row), np.asarray(spec.goals.columns)
        value, actor = (self.goal_rows(rng, d, row, last) for d in (spec.goals.value, spec.goals.actor))

        def states(rows: Rows) -> Float[np.ndarray, "B G"]:
            return self.obs[rows[:, None], columns]

        reached = (row <= value) & (value < row + spec.chunk)
        goals = {"value": states(value), "actor": states(actor), "reached": reached.astype(np.float32)}
        if spec.subgoals is None:
            return goals, None, value
        steps, goal_reached = _steps_ahead(spec.subgoals, row, last, value)
        actor_steps, _ = _steps_ahead(spec.subgoals, row, last, actor)
        return (
            goals,
            {
                "steps": steps.astype(np.float32),
                "next_obs": self.obs[row + steps],
                "reached": goal_reached.astype(np.float32),
                "value": states(row + steps),
                "actor": states(row + actor_steps),
                "ahead": states(np.minimum(row + spec.subgoals.steps, last)),
            },
            value,
        )


def _runs(first: Int[np.ndarray, " E"], count: Int[np.ndarray, " E"]) -> Int[np.ndarray, " n"]:
    """Concatenates the ranges of `count` states that begin at `first`."""
    before = np.cumsum(count) - count
    return np.arange(count.sum()) + np.repeat(first - before, count)


def _steps_ahead(spec: SubgoalSpec, row: Rows, last: Rows, goal: Rows) -> tuple[Rows, Bool[np.ndarray, " B"]]:
    """Returns the steps from `row` towards `goal`, at most n and within the episode, and whether they reach
    it."""
    limit, ahead = np.minimum(spec.steps, last - row), goal - row
    steps = np.where((ahead >= 0) & (ahead < limit), ahead, limit)
    if spec.ends_count:
        return steps, steps < spec.steps
    return steps, (ahead >= 0) & (ahead < spec.steps) & (goal <= last)
