"""Button puzzles as decision problems whose boards are all known: values, success, fewest presses."""

from typing import NamedTuple

import numpy as np

from envs_mjx.manipulation.scene_simulation import influence

LARGEST = 16
"""Buttons of the largest puzzle whose boards are all held in memory."""


def is_solvable(grid: tuple[int, int]) -> bool:
    """Returns whether a scene's grid of buttons is a puzzle that is solved exactly; (0, 0) is none."""
    return 0 < grid[0] * grid[1] <= LARGEST


def as_bits(wrong: np.ndarray) -> np.ndarray:
    """Returns int[...], the boards of bool[..., buttons], which buttons are wrong."""
    return wrong @ (1 << np.arange(wrong.shape[-1]))


class Puzzle(NamedTuple):
    """All boards of a puzzle as bits: which buttons are wrong. Board 0 is solved.

    Attributes:
        after: int[boards, choices], the board after each press, and after waiting in the last column.
        wrong: float[boards], number of wrong buttons.
    """

    after: np.ndarray
    wrong: np.ndarray

    @classmethod
    def of(cls, grid: tuple[int, int]) -> "Puzzle":
        """Returns the puzzle of a grid of (rows, columns) buttons."""
        buttons = grid[0] * grid[1]
        boards = np.arange(2**buttons)
        presses = as_bits(influence(buttons, grid))
        after = boards[:, None] ^ np.append(presses, 0)
        return cls(after, ((boards[:, None] >> np.arange(buttons)) & 1).sum(axis=1).astype(float))

    def without_waiting(self) -> "Puzzle":
        """Returns the puzzle in which every decision is a press."""
        return self._replace(after=self.after[:, :-1])

    def presses(self) -> np.ndarray:
        """Returns int[boards], the fewest presses that solve each board; -1 where none do."""
        found = np.where(self.wrong == 0, 0, -1)
        for count in range(len(self.wrong)):
            new = (found < 0) & (found[self.after] == count).any(axis=1)
            if not new.any():
                break
            found[new] = count + 1
        return found

    def values(self, discount: float, steps: int, candidates: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns V and Q of the policy that takes the best of N uniform draws, by value iteration.

        Args:
            discount: of one control step.
            steps: control steps of a decision, each of which costs the wrong buttons before it.
            candidates: N; None takes the best of all choices.
        Returns:
            float[boards] and float[boards, choices]. The solved board ends the episode.
        """
        factor = discount**steps
        cost = -self.wrong * (1 - factor) / (1 - discount)
        share = rank_probabilities(self.after.shape[1], candidates)
        value = np.zeros(len(self.wrong))
        while True:
            q = cost[:, None] + factor * value[self.after]
            new = -np.sort(-q, axis=1) @ share
            new[0] = 0
            if np.abs(new - value).max() <= 1e-9 * max(1.0, np.abs(new).max()):
                return new, q
            value = new

    def success(self, q: np.ndarray, board: int, decisions: int, candidates: int) -> float:
        """Returns the probability that the best of N uniform draws by `q` solves a board in time."""
        share = rank_probabilities(self.after.shape[1], candidates)
        ranked = np.take_along_axis(self.after, np.argsort(-q, axis=1, kind="stable"), axis=1)
        at = np.zeros(len(self.wrong))
        at[board] = 1
        for _ in range(decisions):
            solved, at[0] = at[0], 0
            at = np.bincount(ranked.ravel(), (at[:, None] * share).ravel(), len(at))
            at[0] += solved
        return float(at[0])

    def left(self, q: np.ndarray, board: int) -> int:
        """Returns the wrong buttons where the greedy policy of `q` stays, or goes in circles."""
        for _ in range(len(self.wrong)):
            after = int(self.after[board, q[board].argmax()])
            if after in (board, 0):
                return int(self.wrong[after])
            board = after
        return int(self.wrong[board])


def rank_probabilities(choices: int, candidates: int | None) -> np.ndarray:
    """Returns the probability that the best of N uniform draws is the best choice, the second best, ...

    Args:
        candidates: N; None always finds the best.
    """
    better = np.arange(choices + 1) / choices
    if candidates is None:
        return (np.arange(choices) == 0).astype(float)
    return -np.diff((1 - better) ** candidates)
