"""Tests of `--list`, and that every listed method can be run."""

import fnmatch
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from baselines import REGISTRY
from envs_mjx.locomotion.gym_env import never_terminal
from envs_mjx.registry import names, parse
from experiments.launch.hparams import HPARAMS, build, load_rows, merge_rows
from experiments.launch.listing import settings_of
from experiments.launch.settings import PRESETS
from experiments.run import main
from mac.data.normalize import fit_normalizer
from mac.data.quantize import summarize
from mac.data.store import Statistics
from mac.errors import UserError
from mac.mbpo import AbstractMBPO
from mac.types import EnvSpec
from tests.helpers.toy_env import GOAL_SPEC, SPEC


def example(pattern: str) -> tuple[str, EnvSpec]:
    """An environment that a pattern fits, and a small stand-in for its specification."""
    env = next(name for name in names() if fnmatch.fnmatchcase(name, pattern))
    kind = SPEC._replace(recorded=True, terminal=never_terminal) if env.endswith("-v2") else SPEC
    return env, GOAL_SPEC if "oraclerep" in env else kind


def test_list_shows_every_algorithm_with_its_paper_and_settings(capsys: pytest.CaptureFixture[str]):
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name, entry in REGISTRY.items():
        block = shown.split(f"\n{name} " if name != "mac" else f"{name} ", 1)[1]
        for fact in (
            entry.title,
            entry.arxiv,
            str(entry.year),
            entry.learns.split(",")[0],
            "--preset laptop",
        ):
            assert fact in block.split("\n\n")[0], (name, fact)


@pytest.mark.parametrize("name", REGISTRY)
def test_settings_that_are_listed_build_the_algorithm(name: str):
    """An environment of each pattern, both presets."""
    rows = load_rows(HPARAMS)
    found = settings_of(name, rows)
    assert "laptop" in found and "auto" not in found
    for preset, patterns in found.items():
        for pattern in patterns:
            env, spec = example(pattern)
            values = merge_rows(rows, name, parse(env), preset)
            hp: Any = build(REGISTRY[name].config, values["hp"], "hparams.toml")
            algo = REGISTRY[name].algorithm(hp, spec, values["steps"])
            # Soft actor-critic's batch is both kinds of steps together; LEQ's imagined starts are others.
            imagined = algo.replay.batch if algo.replay and isinstance(algo, AbstractMBPO) else 0
            if not getattr(hp, "model_batch", 0):
                assert algo.sample.batch + imagined == hp.batch
            assert values["steps"] >= 1000


def test_every_method_has_settings_for_single_tasks_or_for_goals():
    rows = load_rows(HPARAMS)
    for name in REGISTRY:
        patterns = settings_of(name, rows)["laptop"]
        assert {"*-singletask*", "*-oraclerep-*"} & set(patterns), name


@pytest.mark.parametrize(
    ("env", "rows_of"),
    {
        "cube-single-play-v0": "cube-single-play-oraclerep-v0",
        "antmaze-giant-navigate-v0": "antmaze-giant-navigate-oraclerep-v0",
        "mujoco/walker2d/medium-v0": "walker2d-medium-v2",
        "cube-single-play-oraclerep-v0": "cube-single-play-oraclerep-v0",
        "cube-single-play-singletask-v0": "cube-single-play-singletask-v0",
        "hopper-medium-v2": "hopper-medium-v2",
    }.items(),
)
def test_rows_serve_environments_that_differ_in_goals_only(env: str, rows_of: str):
    rows = load_rows(HPARAMS)
    assert parse(env).hparams_of == rows_of and rows_of in names()
    got, want = (merge_rows(rows, "mac", parse(name), "laptop") for name in (env, rows_of))
    assert got == want and got["steps"] > 0


def test_mac_has_settings_for_every_environment():
    rows = load_rows(HPARAMS)
    for env, preset in itertools.product(names(), PRESETS[1:]):
        assert "steps" in merge_rows(rows, "mac", parse(env), preset), (env, preset)


def test_goal_method_without_goals_is_refused():
    with pytest.raises(UserError, match="has no goals"):
        REGISTRY["sharsa"].algorithm(REGISTRY["sharsa"].config(), SPEC)


@pytest.mark.parametrize("how", ["minmax", "standard", "none"])
def test_observations_are_normalised_as_asked(how: Any):
    obs = np.asarray([[0.0, 5.0], [4.0, 5.0], [2.0, 5.0]], np.float32)
    got = fit_normalizer(how, Statistics(summarize(obs), None))[0].apply(jnp.asarray(obs))
    want = {
        "minmax": (obs - [2, 5]) / [2.001, 0.001],
        "standard": (obs - [2, 5]) / [(8 / 3) ** 0.5 + 0.001, 0.001],
        "none": obs,
    }[how]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
