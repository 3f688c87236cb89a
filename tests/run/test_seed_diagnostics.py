"""An algorithm's own metrics in a run: when, from what data, and the same after a resume."""

from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from mac.data.store import ShardRows, Store
from mac.data.window import make_held_out
from mac.run.io.logger import METRICS, read_rows
from mac.types import Metrics, SampleSpec, Window
from tests.helpers import toy_env
from tests.helpers.toy_algorithm import Walk, make_job, result, run


class Watchful(Walk):
    """Tells where it is, the first row of the data, and a random number; expects its own place of itself."""

    @property
    def step_discount(self) -> float:
        return 0.9

    def predict(self, state: Any, obs: Any, goal: Any, key: Any) -> jax.Array:
        return jnp.broadcast_to(state.nets["place"][0], (len(obs),))

    def diagnose(self, state: Any, window: Window, key: Any) -> Metrics:
        return {
            "diagnostics/place": state.nets["place"][0],
            "diagnostics/data": window.obs[jnp.zeros((), jnp.int32)][0],
            "diagnostics/noise": jr.uniform(key),
        }


def diagnoses(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_rows(folder / METRICS) if "diagnostics/noise" in row]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    run(make_job(algo=Watchful()), folder)
    return folder


def test_every_evaluation_has_a_row_of_each_seed(straight: Path):
    rows = diagnoses(straight)
    assert [(row["step"], row["seed"]) for row in rows] == [(8, 3), (8, 4), (12, 3), (12, 4)]
    assert len({row["diagnostics/noise"] for row in rows}) == 4
    assert len({row["diagnostics/place"] for row in rows}) == 4
    for row in rows:
        assert row["diagnostics/predicted_return"] == pytest.approx(row["diagnostics/place"], rel=1e-5)


def test_rows_of_updates_have_no_diagnoses(straight: Path):
    updates = [row for row in read_rows(straight / METRICS) if "walk/loss" in row]
    assert [row["step"] for row in updates if row["seed"] == 3] == [2, 4, 6, 8, 10, 12]
    assert not any(name.startswith("diagnostics/") for row in updates for name in row)


def test_resumed_run_repeats_the_same_bits(straight: Path, tmp_path: Path):
    run(make_job(6, algo=Watchful()), tmp_path)
    run(make_job(algo=Watchful()), tmp_path, resume=True)
    rows = [row for row in diagnoses(tmp_path) if row["step"] != 6]  # the end of the shorter run
    assert rows == diagnoses(straight)
    assert result(tmp_path)["arrays"] == result(straight)["arrays"]


def test_seed_is_itself_when_alone(straight: Path, tmp_path: Path):
    run(make_job(algo=Watchful(), seed=4, seeds=1), tmp_path)
    together = [row for row in diagnoses(straight) if row["seed"] == 4]
    for got, want in zip(diagnoses(tmp_path), together, strict=True):
        assert got == pytest.approx(want, rel=1e-5)


def test_data_held_out_are_looked_at_if_there_are_any(straight: Path, tmp_path: Path):
    other = toy_env.window(seed=5)
    run(make_job(algo=Watchful(), held_out=other), tmp_path)
    for folder, data in ((straight, toy_env.window()), (tmp_path, other)):
        seen = [row["diagnostics/data"] for row in diagnoses(folder)]
        assert seen == pytest.approx([float(data.obs.stored[0, 0])] * 4)
    assert result(tmp_path)["arrays"] == result(straight)["arrays"]  # looking changes nothing


def test_diagnosis_is_compiled_once(tmp_path: Path):
    class Watched(Watchful):
        diagnose = chex.assert_max_traces(Watchful.diagnose, n=1)

    run(make_job(algo=Watched()), tmp_path)
    assert len(diagnoses(tmp_path)) == 4


def test_algorithm_that_says_nothing_leaves_no_row(tmp_path: Path):
    run(make_job(8), tmp_path)
    assert all("walk/loss" in row for row in read_rows(tmp_path / METRICS))


def split(seed: int, lengths: list[int]) -> ShardRows:
    rows, length = (
        np.random.default_rng(seed).normal(size=(sum(lengths), 2)).astype(np.float32),
        np.asarray(lengths),
    )
    return ShardRows(rows, np.tanh(rows), np.cumsum(length) - length, length)


def held_out(lengths: list[int], rows: int = 100, chunk: int = 2) -> Window | None:
    store = Store(Path("store"), "toy", (split(0, [20, 20]),), split(1, lengths), ())
    return make_held_out(store, toy_env.identity(), SampleSpec(1, chunk), rows)


def test_held_out_rows_are_whole_validation_episodes():
    rows = split(1, [6, 5, 7]).obs
    for room, want in ((100, 18), (17, 11), (10, 6), (1, 6)):
        window = held_out([6, 5, 7], room)
        assert window is not None and window.reward is None and window.mask is None
        np.testing.assert_allclose(window.obs[jnp.arange(want)], rows[:want], rtol=1e-6)
        assert len(window.obs) == want


def test_no_data_are_held_out_where_no_chunk_fits():
    store = Store(Path("store"), "toy", (split(0, [20]),), None, ())
    assert make_held_out(store, toy_env.identity(), SampleSpec(1, 2)) is None
    assert held_out([4, 4], chunk=3) is None
