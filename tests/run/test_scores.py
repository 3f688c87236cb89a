"""Results are scores or returns where data record rewards; elsewhere they are successes, as ever."""

import io
import json
import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from mac.run.io.eval_rows import Evaluation, eval_rows
from mac.run.io.logger import EVAL, read_rows
from mac.run.report import score as measure
from mac.run.report.plot import _draw
from mac.run.report.score import RETURN, SCORE, SUCCESS, measure_of, normalised_score
from mac.run.report.stats import learning_curve
from mac.run.report.table import results_table
from mac.types import Episodes
from tests.helpers import toy_algorithm, toy_env

RAW = toy_env.FALL_SPEC._replace(score_range=None)
LOW, HIGH = -10.0, 30.0  # of FALL_SPEC


def episodes(returns: np.ndarray) -> Episodes:
    """Episodes with these returns, [S, tasks, E]; none is a success."""
    none = jnp.zeros(returns.shape, jnp.int32)
    return Episodes(none > 0, jnp.asarray(returns, jnp.float32), none + 5, none)


@pytest.mark.parametrize(
    ("low", "high", "returns", "score"),
    [
        (-20.272305, 3234.3, 3234.3, 100.0),
        (-20.272305, 3234.3, -20.272305, 0.0),
        (-20.272305, 3234.3, 1607.0138475, 50.0),
        (1.629008, 4592.3, 2297.0, 50.0007),
        (-280.178953, 12135.0, 12135.0 * 2, 197.7435),
    ],
)
def test_normalised_score_is_the_published_formula(low: float, high: float, returns: float, score: float):
    assert normalised_score(np.asarray(returns), (low, high)) == pytest.approx(score, rel=1e-5, abs=1e-9)


def test_the_environment_decides_what_is_measured():
    assert [measure_of(spec) for spec in (toy_env.SPEC, toy_env.GOAL_SPEC, toy_env.FALL_SPEC, RAW)] == [
        SUCCESS, SUCCESS, SCORE, RETURN,
    ]  # fmt: skip


def test_rows_have_the_score_of_the_mean_return():
    returns = np.asarray([[[10.0, 30.0]], [[-10.0, 0.0]]])
    rows = eval_rows(Evaluation(7, (1,), episodes(returns), "c", "here", toy_env.FALL_SPEC), (0, 1))
    assert [row["return"] for row in rows] == [20.0, -5.0]
    assert [row["score"] for row in rows] == pytest.approx([75.0, 12.5])
    assert {row["measure"] for row in rows} == {"score"}
    raw = eval_rows(Evaluation(7, (1,), episodes(returns), "c", "here", RAW), (0, 1))
    assert all("score" not in row and row["measure"] == "return" for row in raw)


def test_rows_of_other_environments_are_as_they_were():
    known = Evaluation(7, (1,), episodes(np.asarray([[[10.0, 30.0]]])), "c", "here", toy_env.SPEC)
    assert eval_rows(known, (0,)) == eval_rows(known._replace(spec=None), (0,))


def test_scores_of_all_episodes_average_to_the_score_of_the_mean():
    returns = np.random.default_rng(0).normal(10, 20, (3, 1, 5))
    got = measure.values(toy_env.FALL_SPEC, episodes(returns)).mean((1, 2))
    np.testing.assert_allclose(got, normalised_score(returns.mean((1, 2)), (LOW, HIGH)), rtol=1e-5)
    np.testing.assert_allclose(measure.values(RAW, episodes(returns)), returns, rtol=1e-6)
    assert not measure.values(toy_env.SPEC, episodes(returns)).any()


# What a user sees.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the smallest algorithm on the table with an edge."""
    folder = tmp_path_factory.mktemp("run")
    env = toy_env.EdgeEnv()
    job = toy_algorithm.make_job(
        algo=toy_algorithm.Walk(env=env.spec), env=env, window=toy_env.falling_window()
    )
    toy_algorithm.run(job, folder)
    return folder


def test_a_run_writes_scores(folder: Path):
    rows = list(read_rows(folder / EVAL))
    assert len(rows) == 4  # two seeds, at 8 and 12
    for row in rows:
        assert row["score"] == pytest.approx(100 * (row["return"] - LOW) / (HIGH - LOW), rel=1e-6)
        assert row["measure"] == "score" and row["success"] == 0


def shown(rows: list[dict]) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(results_table(learning_curve(rows), title="a run"))
    return console.export_text()


def row(step: int, seed: int, ret: float, **more: object) -> dict:
    return {"step": step, "seed": seed, "task": 1, "success": 0.0, "return": 40 * ret, "episodes": 3} | more


def test_table_shows_scores_and_not_percentages():
    rows = [row(s, i, 10.0 * i + s, score=10.0 * i + s, measure="score") for s in (1, 2) for i in (1, 2)]
    text = shown(rows)
    assert "normalised score" in text and "%" not in text.replace("95%", "") and "success" not in text
    assert "17.0" in text  # at step 2: 12 and 22
    assert learning_curve(rows).measure is SCORE


def test_table_shows_returns_without_reference_returns():
    rows = [row(1, i, 30.0 * i, measure="return") for i in (1, 2)]
    text = shown(rows)
    assert "1,800.0" in text and "return" in text and "%" not in text.replace("95%", "")


def test_table_of_successes_is_as_it_was():
    rows = [row(1, i, 0.0) | {"success": 0.25 * i} for i in (1, 2)]
    text = shown(rows)
    assert "37.5%" in text and text.split("\n")[2].split("┃")[1].strip() == "success"


def test_picture_of_scores_has_their_axis():
    from matplotlib.figure import Figure

    axes = Figure().add_subplot()
    rows = [row(s, i, 0, score=80.0 + s, measure="score") for s in (1, 2) for i in (1, 2)]
    _draw(axes, learning_curve(rows))
    assert axes.get_ylabel().startswith("normalised score")
    low, high = axes.get_ylim()
    assert 70 < low < 81 and 82 < high < 90


def test_a_row_that_lacks_its_measure_is_an_error():
    with pytest.raises(Exception, match="line 1: score is missing"):
        learning_curve([row(1, 0, 3.0, measure="score")])


def test_rows_are_json(folder: Path):
    for line in (folder / EVAL).read_text().splitlines():
        assert math.isfinite(json.loads(line)["score"])
