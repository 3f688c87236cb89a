"""Recorded rewards and terminations on the way to batches of chunks: stores, windows, and the sampler."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from experiments.launch.dataset import make_source
from experiments.launch.settings import DataConfig
from mac.data.convert import prepare
from mac.data.sampler import sample
from mac.data.store import Store
from mac.data.window import WindowCapacity, make_held_out, make_window, start_counts
from mac.data.window_feed import ResidentData, RotatingWindows, plan_rotation
from mac.errors import UserError
from mac.types import EnvSpec, SampleSpec, Window
from tests.helpers.hdf5_files import EPISODES, FALL, LIMIT, d4rl_arrays, write_d4rl, write_minari
from tests.helpers.small_datasets import identity, write_pair

SPEC = EnvSpec(
    "toy-walker", obs_dim=3, action_dim=2, goal_dim=None, tasks=(1,), max_steps=9, control_dt=0.05,
    recorded=True,
)  # fmt: skip
draw = jax.jit(sample, static_argnums=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    folder = tmp_path_factory.mktemp("d4rl")
    return prepare(write_d4rl(folder / "toy.hdf5", d4rl_arrays()), folder / "store", SPEC)


def rewards(store: Store) -> np.ndarray:
    """Of every row: those of `hdf5_files`, 10 * episode + step + 1, and 0 for final states."""
    want = np.zeros(store.rows)
    for i, (first, length) in enumerate(zip(store.train[0].first, store.train[0].length, strict=True)):
        want[first : first + length - 1] = 10 * i + 1 + np.arange(length - 1)
    return want


def test_store_keeps_rewards_and_terminations_and_opens_again(store: Store):
    assert store.recorded and store.episodes == 5 and store.rows == 23 + 5
    again = Store.open(store.path).train[0]
    assert again.reward is not None and again.terminated is not None
    np.testing.assert_array_equal(again.reward, rewards(store))
    np.testing.assert_array_equal(again.terminated, [how == FALL for _, how in EPISODES])


def test_minari_makes_the_same_store(store: Store, tmp_path: Path):
    path = write_minari(tmp_path / "main_data.hdf5", d4rl_arrays())
    other = prepare(tmp_path, tmp_path / "store", SPEC).train[0]
    assert path.exists()
    for name in ("obs", "action", "first", "length", "reward", "terminated"):
        np.testing.assert_array_equal(getattr(other, name), getattr(store.train[0], name))


def test_codes_leave_rewards_as_they_are(store: Store, tmp_path: Path):
    path = write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays())
    coded = prepare(path, tmp_path / "store", SPEC, "uint16")
    assert coded.dtype == "uint16"
    window = make_window(coded, identity(), SampleSpec(1, 2))
    assert window.reward is not None
    np.testing.assert_array_equal(window.reward, rewards(store))
    np.testing.assert_allclose(window.action[np.arange(28)], store.train[0].action, atol=2e-5)


def test_an_environment_with_recorded_rewards_needs_them(tmp_path: Path):
    with pytest.raises(UserError, match="holds no rewards, which toy-walker takes from its data"):
        prepare(write_pair(tmp_path), tmp_path / "store", SPEC)


def test_recorded_rewards_are_ignored_where_they_are_computed(tmp_path: Path):
    path = write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays(((8, LIMIT), (9, FALL))))
    store = prepare(path, tmp_path / "store", SPEC._replace(recorded=False))
    window = make_window(store, identity(), SampleSpec(1, 2))
    assert not store.recorded and window.reward is None and window.episodes.terminated is None


def test_a_damaged_reward_file_is_found(tmp_path: Path):
    path = write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays())
    store = prepare(path, tmp_path / "store", SPEC)
    np.save(store.path / "train-000" / "reward.npy", np.zeros(3, np.float32))
    with pytest.raises(UserError, match="damaged store"):
        Store.open(store.path)
    assert prepare(path, tmp_path / "store", SPEC).rows == 28  # made again


# Windows.


def test_mask_is_0_at_a_termination_and_at_the_state_after(store: Store):
    window = make_window(store, identity(), SampleSpec(1, 2))
    assert window.reward is not None and window.mask is not None
    np.testing.assert_array_equal(window.reward, rewards(store))
    split, want = store.train[0], np.ones(28)
    for first, length, (_, how) in zip(split.first, split.length, EPISODES, strict=True):
        if how == FALL:
            want[[first + length - 2, first + length - 1]] = 0
    np.testing.assert_array_equal(window.mask, want)


def test_chunks_start_at_every_row_before_a_terminal_state():
    length, terminated = np.asarray([6, 8, 2, 7, 5]), np.asarray([True, False, True, False, False])
    np.testing.assert_array_equal(start_counts(length, 2, terminated), [5, 4, 1, 3, 1])
    np.testing.assert_array_equal(start_counts(length, 2), [2, 4, 0, 3, 1])
    np.testing.assert_array_equal(start_counts(length, 10, terminated), [5, 0, 1, 0, 0])


def test_a_chunk_longer_than_any_episode_needs_a_termination(store: Store, tmp_path: Path):
    assert int(make_window(store, identity(), SampleSpec(1, 20)).episodes.n_starts) == 6
    path = write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays(((8, LIMIT), (9, LIMIT))))
    with pytest.raises(UserError, match="no episode is long enough for chunk=20"):
        make_window(prepare(path, tmp_path / "store", SPEC), identity(), SampleSpec(1, 20))


def test_episodes_of_one_step_are_enough_where_every_row_starts(tmp_path: Path):
    write_d4rl(tmp_path / "toy-val.hdf5", d4rl_arrays(((1, LIMIT), (1, LIMIT))))
    path = write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays(((1, LIMIT),) * 40))
    store, steps = prepare(path, tmp_path / "store", SPEC), SampleSpec(64, 1, every_row=True)
    with pytest.raises(UserError, match="the longest has 1 transition, 3 are needed"):
        make_window(store, identity(), SampleSpec(1, 1))
    with pytest.raises(UserError, match="the longest has 1 transition, 3 are needed"):
        make_source(DataConfig(resident="yes"), store, identity(), SampleSpec(64, 1), None)
    put = partial(jax.tree.map, jnp.asarray)
    whole = make_source(DataConfig(resident="yes"), store, identity(), steps, None)
    turns = make_source(DataConfig(resident="no", window=20), store, identity(), steps, None)
    assert isinstance(whole, ResidentData) and isinstance(turns, RotatingWindows)
    for window, episodes in ((whole.window(put), 40), (turns.window(1, put), 10)):
        batch = draw(window, steps, jr.key(0))
        assert len(np.unique(np.asarray(batch.obs)[:, 0])) > episodes / 2
        np.testing.assert_array_equal(batch.next_obs[:, 1], np.ones(64))
    assert make_held_out(store, identity(), SampleSpec(1, 1)) is None
    held = make_held_out(store, identity(), SampleSpec(1, 1, every_row=True))
    assert held is not None and int(held.episodes.n_steps) == 2


def test_rotating_windows_keep_rewards_with_their_rows(store: Store):
    plan = plan_rotation(store, identity(), SampleSpec(1, 2), rows=10, updates=3, seed=0)
    seen = 0
    for number in range(6):
        window = plan.window(number, partial(jax.tree.map, jnp.asarray))
        assert (
            window.reward is not None and window.mask is not None and window.episodes.terminated is not None
        )
        for first, steps, terminated in zip(
            *(
                np.asarray(x)
                for x in (window.episodes.first, window.episodes.steps, window.episodes.terminated)
            ),
            strict=True,
        ):
            if steps == 0:
                continue
            state = np.asarray(window.obs[first])
            rows = slice(first, first + steps)
            want = 10 * state[0] + 1 + np.arange(steps)
            np.testing.assert_array_equal(np.asarray(window.reward)[rows], want)
            assert (float(window.mask[first + steps - 1]) == 0) == terminated
            seen += int(terminated)
    assert seen >= 2


def test_held_out_rows_have_their_recorded_rewards(tmp_path: Path):
    write_d4rl(tmp_path / "toy-val.hdf5", d4rl_arrays(seed=1))
    store = prepare(write_d4rl(tmp_path / "toy.hdf5", d4rl_arrays()), tmp_path / "store", SPEC)
    window = make_held_out(store, identity(), SampleSpec(1, 2))
    assert window is not None and window.reward is not None and window.episodes.terminated is not None
    assert store.val is not None
    np.testing.assert_array_equal(window.action[np.arange(28)], store.val.action)


# Chunks.


@pytest.fixture(scope="module")
def window(store: Store) -> Window:
    return make_window(store, identity(), SampleSpec(1, 4))


def test_a_chunk_that_terminates_stays_there_without_reward(store: Store, window: Window):
    """Against the obvious loop over a chunk's steps, for every start and step."""
    batch = draw(window, SampleSpec(512, 4), jr.key(0))
    batch = jax.tree.map(np.asarray, batch)
    falls = {i: steps for i, (steps, how) in enumerate(EPISODES) if how == FALL}
    split, inside = store.train[0], 0
    for b in range(512):
        episode, step, _ = batch.obs[b].astype(int)
        last = falls.get(episode)
        steps = EPISODES[episode][0]
        assert step < steps if last else step < max(steps - 1 - 4, 0)
        for j in range(4):
            now = step + j
            over = last is not None and now >= last
            assert batch.rewards[b, j] == (0 if over else 10 * episode + now + 1)
            assert batch.masks[b, j] == (0 if last is not None and now >= last - 1 else 1)
            if not over:
                np.testing.assert_array_equal(batch.actions[b, j], split.action[split.first[episode] + now])
            inside += over
        np.testing.assert_array_equal(batch.next_obs[b], [episode, min(step + 4, last or 99), 0])
    assert inside > 100


def test_actions_after_terminal_states_are_of_other_rows(store: Store, window: Window):
    batch = draw(window, SampleSpec(4096, 4), jr.key(1))
    episode, step = np.asarray(batch.obs)[:, 0], np.asarray(batch.obs)[:, 1]
    split = store.train[0]
    rows = np.concatenate([np.arange(f, f + n - 1) for f, n in zip(split.first, split.length, strict=True)])
    last_of_terminated = (episode == 0) & (step == 4)  # one action, then three from elsewhere
    found = np.asarray(batch.actions)[last_of_terminated, 1:]
    # Which row each action is of: two columns of random numbers tell.
    apart = np.abs(found[:, :, None] - split.action[rows]).max(-1)
    assert (apart.min(-1) < 1e-6).all()
    source = rows[apart.argmin(-1)]
    assert (np.isin(np.diff(source, axis=1), (0, 1))).all()  # consecutive, up to that episode's end
    counts = np.asarray([(source[:, 0] == row).sum() for row in rows])
    expected = counts.sum() / len(rows)
    # Chi-squared with 22 degrees of freedom: above 48.3 once in a thousand.
    assert np.sum((counts - expected) ** 2 / expected) < 48.3


def test_without_terminations_batches_are_bitwise_the_same(store: Store):
    spec = SampleSpec(64, 4)
    unrecorded = store._replace(train=(store.train[0]._replace(terminated=None),))
    plain = make_window(unrecorded, identity(), SampleSpec(1, 4))
    none = store.train[0]._replace(terminated=np.zeros(5, bool))
    got = draw(make_window(store._replace(train=(none,)), identity(), SampleSpec(1, 4)), spec, jr.key(3))
    want = draw(plain, spec, jr.key(3))
    for name in ("obs", "actions", "next_obs"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


def test_single_steps_take_every_transition_and_terminations(window: Window):
    batch = draw(window, SampleSpec(2048, 1, every_row=True), jr.key(0))
    assert batch.masks is not None
    state = np.asarray(batch.obs)
    found = {(int(e), int(t)) for e, t, _ in state}
    assert found == {(i, t) for i, (steps, _) in enumerate(EPISODES) for t in range(steps)}
    ends = {(0, 4), (2, 0)}
    np.testing.assert_array_equal(
        np.asarray(batch.masks)[:, 0], [float((int(e), int(t)) not in ends) for e, t, _ in state]
    )


def test_padding_in_the_table_of_episodes_changes_no_draw(store: Store, window: Window):
    wide = make_window(store, identity(), SampleSpec(1, 4), room=WindowCapacity(40, 9))
    got, want = (draw(w, SampleSpec(64, 4), jr.key(5)) for w in (wide, window))
    jax.tree.map(np.testing.assert_array_equal, got, want)
