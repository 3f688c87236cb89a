"""D4RL from the command line: a real environment's file, its training, scores, and evaluation again."""

import dataclasses
from pathlib import Path
from typing import Any

import h5py
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from envs_mjx.registry import make
from experiments import evaluate, run
from mac.data.convert import prepare
from mac.data.sampler import sample
from mac.data.window import make_window
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.types import SampleSpec
from tests.helpers.gym_dataset import write_random
from tests.helpers.small_datasets import identity

pytestmark = pytest.mark.promotion
ENV = "hopper-random-v2"
SMALL = [
    "--preset", "laptop", "--env", ENV, "--seeds", "2", "--steps", "4", "--hp.batch", "8", "--hp.hidden", "8",
    "--hp.rollout", "2", "--hp.chunk", "4", "--hp.flow-steps", "2", "--hp.candidates", "2",
    "--hp.candidates-test", "2", "--run.segment", "2", "--run.eval-every", "4", "--eval.episodes", "2",
    "--eval.engine", "c",
]  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("gym") / "hopper.hdf5", "hopper", episodes=30)


@pytest.fixture(scope="module")
def finished(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "hopper"
    data = ["--data.path", str(file), "--data.dir", str(folder.parent / "data")]
    assert run.main([*SMALL, *data, "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_run_reports_scores_of_returns(finished: Path, capsys: pytest.CaptureFixture[str]):
    rows = list(read_rows(finished / EVAL))
    assert len(rows) == 2
    for row in rows:
        score = 100 * (row["return"] + 20.272305) / (3234.3 + 20.272305)
        assert row["score"] == pytest.approx(score, rel=1e-5)
        assert 0 < row["length"] < 200 and np.isfinite(row["predicted_return"])
    losses = list(read_rows(finished / METRICS))
    assert any(np.isfinite(row.get("model/termination_loss", np.nan)) for row in losses)
    capsys.readouterr()
    assert evaluate.main([str(finished), "--engine", "c", "--episodes", "2"]) == 0
    said = capsys.readouterr().out
    assert "normalised score" in said and "in training" in said and "success" not in said
    mean = np.mean([row["score"] for row in rows])
    assert f"in training  {mean:.1f} after 4 updates" in said


def test_chunks_of_a_real_file_lead_where_the_simulator_leads(file: Path, tmp_path: Path):
    """A drawn chunk, executed in the environment from the chunk's own state, ends in its next state."""
    env = make(ENV, "c")
    store = prepare(file, tmp_path / "store", env.spec)
    with h5py.File(file) as source:
        fallen = int(source["terminals"][()].sum())
    assert store.train[0].terminated is not None and int(store.train[0].terminated.sum()) == fallen > 20
    batch = jax.jit(sample, static_argnums=1)(
        make_window(store, identity(11), SampleSpec(1, 4)), SampleSpec(256, 4), jr.key(0)
    )
    batch = jax.tree.map(np.asarray, batch)
    assert 0.1 < (batch.masks.min(-1) == 0).mean() < 0.9

    def play(obs: jax.Array, actions: jax.Array) -> Any:
        """The observation lacks x, which moves nothing, and clips velocities, which are below 10 here."""
        start = env.reset(jr.key(0), jnp.asarray(1))
        state = dataclasses.replace(
            start, motion=env.engine.load(jnp.concatenate([jnp.zeros(1), obs[:5]]), obs[5:])
        )
        rewards = []
        for action in actions:
            before = state.done
            state = env.step(state, action)
            rewards.append(jnp.where(before, 0.0, state.reward))
        return state.obs, jnp.stack(rewards), state.done

    slow = np.abs(batch.obs[:, 5:]).max(-1) < 9
    obs, rewards, done = jax.jit(jax.vmap(play))(batch.obs[slow][:64], batch.actions[slow][:64])
    np.testing.assert_allclose(obs, batch.next_obs[slow][:64], atol=2e-3)
    np.testing.assert_allclose(rewards, batch.rewards[slow][:64], atol=2e-2)
    np.testing.assert_array_equal(np.asarray(done), batch.masks[slow][:64].min(-1) == 0)
