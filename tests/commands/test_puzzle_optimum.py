"""Exact solutions of button puzzles, against enumeration and simulation in plain Python."""

import csv
import itertools

import numpy as np
import pytest

from envs_mjx.manipulation.observation import goal_columns
from envs_mjx.manipulation.tasks import task_table
from envs_mjx.registry import make
from experiments import puzzle_optimum
from experiments.puzzle_optimum import Args, measure
from experiments.puzzle_study.boards import Puzzle, rank_probabilities
from experiments.puzzle_study.presses import compare, play, presses_of

GRID = (3, 3)


def toggled(board: np.ndarray, button: int) -> np.ndarray:
    """Presses a button of a board of booleans, neighbour by neighbour."""
    out = board.copy()
    row, column = divmod(button, GRID[1])
    for r, c in ((row, column), (row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
        if 0 <= r < GRID[0] and 0 <= c < GRID[1]:
            out[r * GRID[1] + c] ^= True
    return out


def as_bits(board: np.ndarray) -> int:
    return sum(int(wrong) << i for i, wrong in enumerate(board))


def wrong_at_start(task: int) -> np.ndarray:
    start, goal = task_table("puzzle-3x3")
    return start.buttons[task - 1] ^ goal.buttons[task - 1]


@pytest.mark.parametrize("task", range(1, 6))
def test_fewest_presses(task):
    start = wrong_at_start(task)

    def solves(presses: tuple[int, ...]) -> bool:
        board = start
        for button in presses:
            board = toggled(board, button)
        return not board.any()

    fewest = next(k for k in range(10) if any(map(solves, itertools.combinations(range(9), k))))
    assert Puzzle.of(GRID).presses()[as_bits(start)] == fewest


def test_rank_probabilities_count_all_draws():
    best = [min(draw) for draw in itertools.product(range(4), repeat=3)]
    counted = np.bincount(best, minlength=4) / len(best)
    np.testing.assert_allclose(rank_probabilities(4, 3), counted, atol=1e-12)
    np.testing.assert_array_equal(rank_probabilities(4, None), [1, 0, 0, 0])


@pytest.mark.parametrize("candidates", [None, 2])
def test_values_by_recursion(candidates):
    puzzle, discount, steps = Puzzle.of((2, 2)), 0.9, 3
    value, q = puzzle.values(discount, steps, candidates)
    by_hand = dict.fromkeys(range(16), 0.0)
    choices = [0b0111, 0b1011, 0b1101, 0b1110, 0]  # each press of a 2x2 spares the opposite corner
    for _ in range(150):
        known = by_hand
        by_hand = {0: 0.0}
        for board in range(1, 16):
            cost = -sum(discount**i * board.bit_count() for i in range(steps))
            returns = [cost + discount**steps * known[board ^ mask] for mask in choices]
            draws = itertools.product(returns, repeat=candidates or 1)
            by_hand[board] = max(returns) if candidates is None else np.mean([max(draw) for draw in draws])
    np.testing.assert_allclose(value, [by_hand[board] for board in range(16)], rtol=1e-6)
    assert q.shape == (16, 5)


def test_success_by_simulation():
    puzzle, start = Puzzle.of(GRID).without_waiting(), wrong_at_start(1)
    _, q = puzzle.values(0.99, 32, 2)
    rng, solved, episodes = np.random.default_rng(0), 0, 3000
    for _ in range(episodes):
        board = start
        for _ in range(4):
            drawn = rng.integers(9, size=2)
            board = toggled(board, max(drawn, key=lambda button, now=board: q[as_bits(now), button]))
            if not board.any():
                solved += 1
                break
    exact = puzzle.success(q, as_bits(start), 4, 2)
    assert 0.05 < exact < 0.95
    assert abs(solved / episodes - exact) < 4 * np.sqrt(exact * (1 - exact) / episodes)


def test_discount_decides_which_tasks_are_worth_solving():
    rows = {(row.discount, row.task): row for row in measure(Args(discounts=(0.99, 0.999)))}
    assert [rows[0.99, task].left for task in range(1, 6)] == [0, 1, 1, 1, 1]
    assert [rows[0.999, task].left for task in range(1, 6)] == [0] * 5
    for task in range(1, 6):
        short, long = rows[0.99, task], rows[0.999, task]
        assert max(short.success_press, short.success_wait) < 0.01 or task == 1
        assert min(long.success_press, long.success_wait) > 0.99
        assert short.best >= short.still
        assert short.still == pytest.approx(-100 * short.wrong)


def test_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "optimum.csv"
    assert puzzle_optimum.main(["--discounts", "0.9", "--out", str(out)]) == 0
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert [row["presses"] for row in csv.DictReader(lines)] == ["2", "5", "8", "9", "7"]
    assert "best of N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--env", "puzzle-4x5"], "take puzzle-3x3 or puzzle-4x4"),
        (["--env", "scene"], "take puzzle-3x3 or puzzle-4x4"),
        (["--discounts", "1.0"], "between 0 and 1"),
        (["--press-steps", "0"], "must be at least 1"),
    ],
)
def test_bad_input_is_one_line(flags, said, capsys):
    assert puzzle_optimum.main(flags) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_presses_of_a_known_sequence():
    puzzle, board = Puzzle.of(GRID).without_waiting(), wrong_at_start(1)
    _, q = puzzle.values(0.99, 32, None)
    history = [board, board]
    for button in (0, 4, 4, 8):  # 0 and 8 solve the task, 4 twice is a detour
        history += [toggled(history[-1], button)] * 2
    boards = np.array([[as_bits(b), as_bits(board)] for b in history])  # the second lane never presses
    presses = presses_of(puzzle, boards)
    assert [button for _, button in presses] == [0, 4, 4, 8]
    assert [before for before, _ in presses] == [as_bits(history[i]) for i in (0, 2, 4, 6)]
    nearer, best = compare(puzzle, q, presses)
    assert nearer == 0.75  # back from the detour counts
    assert best == 0.75
    assert all(np.isnan(compare(puzzle, q, [])))


class Lifting:
    """A policy that raises the arm; with actions of 0 it sinks onto the buttons, in OGBench too."""

    def reset(self, *, task):
        del task

    def __call__(self, obs, goal):
        assert goal is None
        return np.tile([0.0, 0.0, 1.0, 0.0, 0.0], (len(obs), 1))


def test_a_raised_arm_leaves_the_buttons():
    env = make("puzzle-3x3-play-singletask-task4-v0")
    solved, seen = play(env, Lifting(), 4, 2, list(goal_columns(env.scene)))
    start = task_table("puzzle-3x3")[0].buttons[3]
    assert seen.shape == (501, 2, 9)
    assert (seen == start).all()
    assert not solved.any()


def test_folder_that_is_no_run_on_a_puzzle_is_one_line(finished, tmp_path, capsys):
    for folder, said in ((tmp_path, "no run"), (finished, "no puzzle with an exact solution")):
        assert puzzle_optimum.main(["--run", str(folder)]) == 2
        error = capsys.readouterr().err
        assert str(folder) in error and said in error
        assert len(error.strip().splitlines()) == 1
