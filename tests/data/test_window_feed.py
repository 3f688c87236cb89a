"""Windows that take turns: all rows in each epoch, equal shapes, the same again after a resume."""

import threading
from pathlib import Path
from typing import Any

import chex
import jax
import jax.random as jr
import numpy as np
import pytest

from mac.data.quantize import Codec, fit_affine, summarize
from mac.data.sampler import sample
from mac.data.store import ShardRows, Store
from mac.data.window import make_window
from mac.data.window_feed import Resident, ResidentData, Rotating, RotatingWindows, open_feed, plan_rotation
from mac.errors import UserError
from mac.run.io.logger import METRICS, read_rows
from mac.run.mesh import ALL, place, seed_mesh
from mac.run.train import RunConfig
from mac.types import Batch, SampleSpec, Window
from tests.helpers import toy_env
from tests.helpers.toy_algorithm import make_job, result, run

LENGTHS = ([6, 9, 14, 5, 8, 11, 7], [12, 6, 6, 10], [20])
SPEC = SampleSpec(batch=64, chunk=2)


def numbered_store(coded: bool = False) -> Store:
    """Three shards; observations are (row, episode) numbered through, actions (row, shard) / 1000."""
    row, episode, splits = 0, 0, []
    for shard, lengths in enumerate(LENGTHS):
        length = np.asarray(lengths)
        rows = np.arange(row, row + length.sum())
        obs = np.stack([rows, np.repeat(np.arange(episode, episode + len(length)), length)], -1)
        action = np.stack([rows, np.full(len(rows), shard)], -1) / 1000
        splits.append(
            ShardRows(obs.astype(np.float32), action.astype(np.float32), np.cumsum(length) - length, length)
        )
        row, episode = row + length.sum(), episode + len(length)
    if coded:
        both = (np.concatenate([getattr(s, name) for s in splits]) for name in ("obs", "action"))
        codec = Codec(*(fit_affine(summarize(rows)) for rows in both))
        splits = [
            ShardRows(codec.obs.encode(s.obs), codec.action.encode(s.action), s.first, s.length, codec)
            for s in splits
        ]
    return Store(Path("numbered"), "toy-v0", tuple(splits), None, ())


def rotation(rows: int = 45, updates: int = 4, seed: int = 0, coded: bool = False) -> RotatingWindows:
    return plan_rotation(
        numbered_store(coded), toy_env.identity(), SampleSpec(1, 2), rows=rows, updates=updates, seed=seed
    )


def rows_of(window: Window) -> list[int]:
    """Numbers of the rows that belong to an episode of a window, ascending."""
    first, steps = np.asarray(window.episodes.first), np.asarray(window.episodes.steps)
    at = [f + np.arange(n + 1) for f, n in zip(first, steps, strict=True) if n]
    return sorted(np.rint(np.asarray(window.obs[:])[np.concatenate(at), 0]).astype(int).tolist())


# The plan.


@pytest.mark.parametrize("rows", [20, 45, 114])
def test_blocks_are_whole_episodes_and_hold_every_row_once(rows: int):
    plan = rotation(rows)
    for shard, lengths in enumerate(LENGTHS):
        pieces = [b for b in plan.blocks if b.shard == shard]
        assert [e for b in pieces for e in range(b.first, b.last)] == list(range(len(lengths)))


@pytest.mark.parametrize("rows", [20, 45, 60])
def test_an_epoch_draws_blocks_once_and_omits_under_a_window(rows: int):
    plan = rotation(rows)
    windows = len(plan.blocks) // plan.per_window
    for epoch in range(5):
        drawn = [b for i in range(windows) for b in plan.members(epoch * windows + i)]
        assert len(drawn) == len(set(drawn)) == windows * plan.per_window > len(plan.blocks) - plan.per_window


def test_all_rows_are_drawn_equally_often():
    plan = rotation()
    windows = 600 * (len(plan.blocks) // plan.per_window)
    count = np.bincount([b for i in range(windows) for b in plan.members(i)], minlength=len(plan.blocks))
    expected = windows * plan.per_window / len(plan.blocks)
    assert (np.abs(count / expected - 1) < 0.1).all()


def test_windows_mix_the_shards_and_epochs_and_seeds_differ():
    plan, other = rotation(), rotation(seed=1)
    windows = len(plan.blocks) // plan.per_window
    mixed = [len({plan.blocks[b].shard for b in plan.members(i)}) for i in range(10 * windows)]
    assert np.mean(mixed) > 1.5
    assert [plan.members(i) for i in range(windows)] != [plan.members(windows + i) for i in range(windows)]
    assert [plan.members(i) for i in range(windows)] != [other.members(i) for i in range(windows)]


def test_order_of_an_epoch_never_changes():
    """Runs of years ago must be resumable: the order is part of the format."""
    assert rotation(20).members(7) == [4] and rotation(45, seed=5).members(3) == [0, 5]


@pytest.mark.parametrize(
    ("rows", "chunk", "said"),
    [
        (19, 2, "--data.window=19: the longest episode has 20 rows"),
        (20, 8, "--data.window=20: some windows would hold no episode long enough for chunk=8"),
    ],
)
def test_windows_that_cannot_be_filled_are_one_line(rows: int, chunk: int, said: str):
    with pytest.raises(UserError, match=said):
        plan_rotation(
            numbered_store(), toy_env.identity(), SampleSpec(1, chunk), rows=rows, updates=1, seed=0
        )


# Windows.


@pytest.mark.parametrize("coded", [False, True])
def test_windows_hold_the_rows_of_their_blocks(coded: bool):
    plan = rotation(coded=coded)
    first = np.cumsum([0, *(sum(lengths) for lengths in LENGTHS)])
    for number in range(6):
        want = []
        for piece in (plan.blocks[b] for b in plan.members(number)):
            start = first[piece.shard] + sum(LENGTHS[piece.shard][: piece.first])
            stop = first[piece.shard] + sum(LENGTHS[piece.shard][: piece.last])
            want += range(start, stop)
        assert rows_of(plan.window(number, lambda tree: tree)) == sorted(want)


def test_windows_share_one_program_and_chunks_stay_in_episodes():
    plan = rotation()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def draw(window: Window, key: jax.Array) -> Batch:
        return sample(window, SPEC, key)

    put = jax.device_put
    for number in range(6):
        batch = draw(plan.window(number, put), jr.key(number))
        obs, after = np.asarray(batch.obs), np.asarray(batch.next_obs)
        np.testing.assert_array_equal(after[:, 0], obs[:, 0] + 2)
        np.testing.assert_array_equal(after[:, 1], obs[:, 1])
        np.testing.assert_allclose(batch.actions[:, :, 0], (obs[:, :1] + [0, 1]) / 1000, rtol=1e-6)


def test_labels_are_made_by_block_in_the_environments_units(monkeypatch: pytest.MonkeyPatch):
    store, seen = numbered_store(coded=True), []
    monkeypatch.setattr("mac.data.quantize.BLOCK", 16)

    def relabel(obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        seen.append(len(obs))
        return -np.rint(obs[:, 0]), np.rint(obs[:, 0]) % 2

    window = make_window(store, toy_env.identity(), SampleSpec(1, 2), relabel)
    assert window.reward is not None and window.mask is not None
    np.testing.assert_array_equal(window.reward, -np.arange(114))
    np.testing.assert_array_equal(window.mask, np.arange(114) % 2)
    assert max(seen) == 16 and sum(seen) == 114


# The feed.


def test_feed_gives_the_planned_window_wherever_it_starts():
    plan = rotation()
    feed = Rotating(plan, jax.device_put, last=39)
    try:
        for step in (0, 3, 4, 8, 9, 36, 39, 12):  # on, within, ahead, and back
            assert rows_of(feed.at(step)) == rows_of(plan.window(step // 4, jax.device_put))
    finally:
        feed.close()


class Slow(RotatingWindows):
    """A plan whose windows are made when `gate` opens, and counted."""

    gate = threading.Event()
    made: list[int] = []  # noqa: RUF012

    def window(self, number, put):
        assert self.gate.wait(60)
        self.made.append(number)
        return super().window(number, put)


def test_next_window_is_made_in_time_and_waiting_is_counted():
    Slow.gate.set()
    feed = Rotating(Slow(*rotation()), jax.device_put, last=11)
    try:
        feed.at(0)
        assert feed.waiting == 0 and feed.loading > 0
        feed._next[1].result()  # pyright: ignore[reportOptionalSubscript]
        assert Slow.made == [0, 1]  # the second without being asked for
        Slow.gate.clear()
        feed.at(4)
        assert feed.waiting < 0.5  # it was there
        threading.Timer(0.3, Slow.gate.set).start()
        feed.at(8)
        assert feed.waiting >= 0.25
        assert Slow.made == [0, 1, 2] and feed._next is None  # nothing is read for after the last update
        assert feed.seconds == {"load": feed.loading, "wait": feed.waiting}
    finally:
        feed.close()


def test_resident_window_is_moved_once():
    moved: list[int] = []

    def put(tree: Window) -> Window:
        moved.append(1)
        return tree

    feed = open_feed(toy_env.window(), put, 100)
    assert isinstance(feed, Resident) and feed.updates is None
    assert feed.at(0) is feed.at(99)
    assert moved == [1] and feed.seconds == {}


def test_all_rows_reach_every_cpu_device_without_a_copy():
    mesh = seed_mesh(2)
    assert mesh.size == 2
    gathered: list[int] = []

    def put(tree: Any) -> Any:
        if isinstance(tree, np.ndarray):
            gathered.append(tree.ctypes.data)
        return place(mesh, tree, ALL)

    feed = open_feed(ResidentData(numbered_store(coded=True), toy_env.identity(), SampleSpec(1, 2)), put, 100)
    for column, address in zip((feed.at(0).obs, feed.at(0).action), gathered, strict=True):
        shards = column.stored.addressable_shards
        assert [shard.data.unsafe_buffer_pointer() for shard in shards] == [address] * 2
    assert rows_of(feed.at(0)) == list(range(114)) and list(feed.seconds) == ["load"]


# Training.


def small_plan() -> RotatingWindows:
    """Windows of 5 updates, while segments are of 2 and checkpoints every 4."""
    return rotation(updates=5)


def test_run_over_windows_resumes_to_the_same_bits(tmp_path: Path):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    run(make_job(window=small_plan()), straight)
    assert run(make_job(7, window=small_plan()), broken).seconds.keys() >= {"load", "wait"}
    run(make_job(window=small_plan()), broken, resume=True)
    assert result(straight)["arrays"] == result(broken)["arrays"]
    other = tmp_path / "other"
    run(make_job(window=rotation(updates=5, seed=9)), other)
    assert result(other)["arrays"] != result(straight)["arrays"]


def test_no_segment_spans_two_windows(tmp_path: Path):
    """Segments would be of 4, a window serves 6: so they are of 2, except the last."""
    config = RunConfig(segment=4, eval_every=100, checkpoint_every=100)
    run(make_job(15, window=rotation(updates=6), run=config), tmp_path)
    ends = [row["step"] for row in read_rows(tmp_path / METRICS) if row["seed"] == 3 and "walk/loss" in row]
    assert ends == [2, 4, 6, 8, 10, 12, 14, 15]
