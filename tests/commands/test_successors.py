"""Successors of chunks: distances in closed form, the exits of the simulator, and what is refused."""

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.locomotion.maze_env import MazeEnv
from envs_mjx.locomotion.mazes import TELEPORT_RADIUS
from envs_mjx.registry import make
from experiments.model_error import main
from experiments.model_error_study import successors
from experiments.model_error_study.rows import SuccessorRow
from experiments.model_error_study.successors import (
    Chunks,
    draw,
    energy_distance,
    exit_shares,
    find_chunks,
    simulate,
    successor_table,
    total_variation,
)
from mac.chunk_dynamics import make_dynamics
from mac.config import Config
from mac.errors import UserError
from mac.nn.frozen import Numerics
from tests.helpers.toy_env import from_rows, identity

EXITS = np.asarray([[0.0, 0.0], [30.0, 40.0]])


@cache
def teleport() -> MazeEnv:
    env = make("pointmaze-teleport-navigate-oraclerep-v0", "c")
    assert isinstance(env, MazeEnv)
    return env


# Distances in closed form.


def two_exits(first: int, count: int = 400) -> np.ndarray:
    """`first` draws at the first exit and the rest at the second."""
    return EXITS[(np.arange(count) >= first).astype(int)]


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.25, 0.5), (1.0, 0.0), (0.3, 0.9)])
def test_energy_distance_of_two_exits_follows_their_shares(p: float, q: float):
    """Exits d apart: 2 d (p + q - 2 p q) - 2 d p (1 - p) - 2 d q (1 - q) = 2 d (p - q)²."""
    count = 400
    got = energy_distance(two_exits(round(p * count)), two_exits(round(q * count)))
    # Without pairs of a draw with itself the last two terms are larger by count / (count - 1).
    bias = sum(2 * 50 * share * (1 - share) / (count - 1) for share in (p, q))
    assert got == pytest.approx(2 * 50 * (p - q) ** 2 - bias, rel=1e-9, abs=1e-9)


def test_energy_distance_of_a_state_between_the_exits():
    """The mean of exits d apart with shares p and 1 - p is 2 p (1 - p) d away from them, and they from each
    other: 4 p (1 - p) d - 2 p (1 - p) d."""
    between = np.broadcast_to(0.25 * EXITS[0] + 0.75 * EXITS[1], (400, 2))
    want = 2 * 0.25 * 0.75 * 50
    assert energy_distance(between, two_exits(100)) == pytest.approx(want, rel=5e-3)


def test_estimate_is_without_bias_for_few_draws():
    rng = np.random.default_rng(0)
    found = [energy_distance(rng.normal(size=(4, 2)), rng.normal(size=(4, 2))) for _ in range(4000)]
    assert abs(np.mean(found)) < 4 * np.std(found) / 4000**0.5


def test_shares_count_the_nearest_exit_and_what_is_near_none():
    ends = np.asarray([[0.0, 3.0], [1.0, 0.0], [30.0, 41.0], [15.0, 20.0]])
    np.testing.assert_allclose(exit_shares(ends, EXITS), [0.5, 0.25, 0.25])
    assert total_variation(np.asarray([0.5, 0.25, 0.25]), np.asarray([0.0, 0.5, 0.5])) == 0.5


# The simulator.


def at_entrance(count: int, away: float) -> Chunks:
    """Walkers `away` from the centre of the first entrance, that go to it and then stay."""
    (x, y), *_ = teleport().maze.entrances
    obs = np.broadcast_to(np.float32([x, y + away]), (count, 2)).copy()
    actions = np.zeros((count, 6, 2), np.float32)
    actions[:, :3, 1] = -0.9
    return Chunks(obs, actions)


def test_repeated_chunk_leaves_by_every_exit_equally_often():
    env, draws = teleport(), 300
    ends = simulate(env, at_entrance(1, TELEPORT_RADIUS + 0.3), draws, seed=0)
    shares = exit_shares(ends, env.maze.exits)[0]
    assert shares[-1] == 0
    np.testing.assert_allclose(shares[:-1], 1 / 3, atol=4 * (2 / 9 / draws) ** 0.5)
    other = simulate(env, at_entrance(1, TELEPORT_RADIUS + 0.3), draws, seed=1)
    assert not np.array_equal(ends, other)


def test_chunk_that_enters_none_ends_in_one_place():
    chunks = at_entrance(1, TELEPORT_RADIUS + 1.5)
    ends = simulate(teleport(), chunks, 5, seed=0)
    np.testing.assert_allclose(ends, np.broadcast_to(ends[:, :1], ends.shape), atol=1e-5)
    moved = chunks.obs[0] + 0.2 * chunks.actions[0].sum(axis=0)
    np.testing.assert_allclose(ends[0, 0], moved, atol=0.05)


def test_chunks_are_sorted_by_whether_they_enter():
    """A walk past the entrance, and one far away from it."""
    env = teleport()
    (x, y), *_ = env.maze.entrances
    steps = 0.2 * np.arange(-20, 20)
    near = np.stack([np.full(40, x), y + 1.5 * steps], axis=-1)
    far = near + np.asarray([0.0, 1000.0])
    obs = np.concatenate([near, far]).astype(np.float32)
    data = from_rows(obs, np.zeros((80, 2), np.float32), np.asarray([40, 40]), 5)
    found = find_chunks(data, identity(), env, 5, 16, seed=0)
    assert set(found) == {"teleporter", "elsewhere"}
    away = np.linalg.norm(found["teleporter"].obs - [x, y], axis=-1)
    assert (away > TELEPORT_RADIUS).all() and (away < TELEPORT_RADIUS + 5 * 0.3).all()
    assert found["teleporter"].actions.shape == (16, 5, 2)
    with pytest.raises(UserError, match=r"--contexts=9000: .* are at place 'teleporter'"):
        find_chunks(data, identity(), env, 5, 9000, seed=0)


# The models.


@pytest.mark.parametrize("kind", ["deterministic", "gaussian", "flow"])
def test_draws_have_axes_of_seeds_chunks_and_repetitions(kind: Any):
    cfg = Config(chunk=6, hidden=(8,), dynamics=kind)
    dynamics = make_dynamics(cfg, Numerics())
    nets = jax.vmap(lambda key: dynamics.net(cfg, 2, 12, key))(jr.split(jr.key(0), 3))
    normalizer = dataclasses.replace(identity(), center=jnp.asarray([4.0, -3.0]))
    chunks = at_entrance(2, 2.0)
    got = draw(dynamics, cfg, nets, normalizer, chunks, 5, seed=1)
    assert got.shape == (3, 2, 5, 2) and (np.ptp(got, axis=2).min() > 0) == (kind != "deterministic")
    if kind == "deterministic":
        net = jax.tree.map(lambda x: x[1], nets)
        s = normalizer.apply(jnp.asarray(chunks.obs))
        want = normalizer.invert(s + net(s, jnp.asarray(chunks.actions.reshape(2, -1))))
        np.testing.assert_allclose(got[1, :, 3], want, rtol=1e-5)


def test_table_has_a_line_per_run_with_intervals():
    row = SuccessorRow(
        "runs/a", "mac", "e", "flow", 1, 25, 9, 0, "teleporter", 4, 8, 2.0, 0.1, "1 0", "1 0", 0.5, 5, -3.0,
        -4.0, "made",
    )  # fmt: skip
    rows = [
        dataclasses.replace(row, place=place, seed=seed, energy=2.0 + seed)
        for place in successors.PLACES
        for seed in (0, 1)
    ]
    table = successor_table(rows, "made")
    cells = [list(column.cells) for column in table.columns]
    assert len(cells[0]) == 1 and cells[1] == ["flow"] and cells[2] == ["2.5 (2 to 3)"]
    assert cells[-1] == ["1 (1 to 1)"]


# The command.


def error_of(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_flags_without_effect_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    out = ("--out", str(tmp_path))
    said = error_of(capsys, *out, "--successors", "8")
    assert "--successors=8: name runs" in said and "--policy" in said
    assert "--successors=1: must be at least 2" in error_of(
        capsys, *out, "--steps", "0", "--policy", str(tmp_path), "--successors", "1"
    )
    assert "--contexts=0" in error_of(capsys, *out, "--contexts", "0")


@pytest.mark.slow
def test_run_of_another_environment_is_refused(finished: Path):
    with pytest.raises(UserError, match=r"cube-single.*; name runs of pointmaze-teleport"):
        successors.successor_rows(finished, 4, 8, 0, {})
