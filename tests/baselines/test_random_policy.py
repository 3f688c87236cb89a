"""Uniform random actions as a yardstick: what they are, and where they are shown."""

import csv
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from baselines.random_policy import UniformPolicy
from experiments import report
from mac.run.evaluate import Policies, evaluate
from tests.commands.test_evaluate_command import ENV, again, error_of
from tests.helpers.toy_env import SPEC, PointEnv, identity


def test_random_actions_are_uniform_and_new_in_every_step():
    algo = UniformPolicy(SPEC)
    state, keys = algo.init(jr.key(0)), jr.split(jr.key(1), 2)
    assert not jax.tree.leaves(state)
    played = evaluate(Policies(algo, identity(SPEC.obs_dim), state), PointEnv(), 3, keys)
    assert played.success.shape == (2, len(SPEC.tasks), 3)
    drawn = np.asarray(
        jax.vmap(lambda key: algo.act(state, jnp.zeros((5, 2)), None, key))(jr.split(keys[0], 2000))
    )
    assert drawn.shape == (2000, 5, 1, 2) and len(np.unique(drawn)) > 19_000
    np.testing.assert_allclose(np.quantile(drawn, [0, 0.25, 0.5, 0.75, 1]), [-1, -0.5, 0, 0.5, 1], atol=0.03)


@pytest.mark.slow
def test_random_actions_may_play_the_same_episodes(copied: Path, tmp_path: Path, capsys: Any):
    line = again(copied, "--policy", "random", "--episodes", "2")
    said = capsys.readouterr().out
    assert f"random actions on {ENV}: 2 seeds, from" in said and "after 10 updates" in said
    assert line["policy"] == "random" and line["step"] == 10
    assert [(row["step"], row["seed"], row["episodes"]) for row in line["rows"]] == [(0, 0, 2), (0, 1, 2)]
    out = tmp_path / "table.csv"
    assert report.main([str(copied), "--out", str(out), "--picture", str(tmp_path / "curves.png")]) == 0
    assert "random actions" in capsys.readouterr().out
    rows = list(csv.DictReader(line for line in out.read_text().splitlines() if not line.startswith("#")))
    assert [(row["algo"], row["updates"], row["episodes"]) for row in rows] == [
        ("mac", "10", "1"),
        ("random", "0", "2"),
    ]
    assert "--policy random" in error_of(
        capsys, str(copied), "--policy", "random", "--hp", "candidates_test=1"
    )
