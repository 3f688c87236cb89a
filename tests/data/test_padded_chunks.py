"""Chunks that reach beyond the end of their episode, and discounted returns, against sums by hand."""

import jax
import jax.random as jr
import numpy as np
import pytest

from experiments.benchmarks.numpy_sampler import HostData
from mac.data.sampler import sample
from mac.data.window import make_window
from mac.types import Batch, SampleSpec, Window
from tests.data.test_d4rl_data import SPEC, prepare
from tests.data.test_single_steps import LENGTHS, finals, numbered, rows
from tests.helpers.hdf5_files import FALL, LIMIT, d4rl_arrays, write_d4rl
from tests.helpers.small_datasets import identity

PADDED = SampleSpec(4000, 7, padded=True, states=True)
draw = jax.jit(sample, static_argnums=1)


@pytest.fixture(scope="module", params=["device", "host"])
def batch(request: pytest.FixtureRequest) -> Batch:
    window = numbered(LENGTHS)
    if request.param == "device":
        return draw(window, PADDED, jr.key(0))
    return HostData(window).draw(np.random.default_rng(0), PADDED)


def test_padded_chunks_start_at_every_transition(batch: Batch):
    last = finals(LENGTHS)
    assert set(rows(batch.obs)) == {i for i in range(sum(LENGTHS)) if i <= last[i]}


def test_padding_is_the_final_state_with_actions_of_zero(batch: Batch):
    start = rows(batch.obs)
    last = finals(LENGTHS)[start]
    assert batch.states is not None and batch.valid is not None
    for k in range(PADDED.chunk):
        inside = start + k <= last
        np.testing.assert_array_equal(batch.valid[:, k], inside)
        np.testing.assert_array_equal(rows(batch.states[:, k]), np.minimum(start + k + 1, last + 1))
        np.testing.assert_array_equal(rows(batch.actions[:, k], 1000), np.where(inside, start + k, 0))
    np.testing.assert_array_equal(batch.next_obs, batch.states[:, -1])
    assert {0, 1} == set(np.unique(batch.valid))


GAMMA = 0.9


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Window:
    folder = tmp_path_factory.mktemp("gym")
    path = write_d4rl(folder / "toy.hdf5", d4rl_arrays(((8, LIMIT), (5, FALL))))
    spec = SampleSpec(1, 3, padded=True, return_to_go=True, return_discount=GAMMA, terminal_reward=-100.0)
    return make_window(prepare(path, folder / "store", SPEC), identity(), spec)


def test_termination_may_have_a_reward_of_its_own(recorded: Window):
    index = recorded.episodes
    assert recorded.reward is not None and index.terminated is not None
    final_action = np.asarray(index.first + index.steps - 1)
    terminal = np.asarray(recorded.reward)[final_action] == -100
    np.testing.assert_array_equal(terminal, index.terminated)
    assert np.sum(np.asarray(recorded.reward) == -100) == 1


def test_discounted_returns_are_sums_by_hand(recorded: Window):
    reward, index = np.asarray(recorded.reward, np.float64), recorded.episodes
    want = np.zeros(len(reward))
    for first, steps in zip(np.asarray(index.first), np.asarray(index.steps), strict=True):
        for t in range(first, first + steps):
            want[t] = sum(GAMMA ** (k - t) * reward[k] for k in range(t, first + steps))
    assert recorded.return_to_go is not None
    np.testing.assert_allclose(recorded.return_to_go, want, rtol=1e-6)


def test_padding_has_no_rewards_masks_or_returns(recorded: Window):
    spec = SampleSpec(400, 6, padded=True, return_to_go=True, return_discount=GAMMA)
    batch = draw(recorded, spec, jr.key(1))
    assert batch.valid is not None and batch.rewards is not None
    assert batch.masks is not None and batch.return_to_go is not None
    padding = np.asarray(batch.valid) == 0
    assert padding.any()
    for values in (batch.rewards, batch.masks, batch.return_to_go[:, :-1]):
        assert not np.asarray(values)[padding].any()
    assert not np.asarray(batch.actions)[padding].any()
    # A step's return is its reward and the discounted rest.
    rest = GAMMA * np.asarray(batch.return_to_go[:, 1:])
    np.testing.assert_allclose(batch.return_to_go[:, :-1], batch.rewards + rest, rtol=1e-5, atol=1e-5)
