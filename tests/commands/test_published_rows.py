"""Rows of `hparams.toml`: a published source is given to the environments that it reports only."""

import fnmatch
import itertools
import re
from typing import Any

import pytest

from baselines import REGISTRY, get_algorithm
from envs_mjx.registry import names, parse
from experiments.launch.hparams import HPARAMS, load_rows, merge_rows, row_applies
from experiments.launch.settings import PRESETS, settings_from_dict

MANIPULATION = ("cube-single", "cube-double", "scene", "puzzle-3x3", "puzzle-4x4")
LOCOMOTION = ("antmaze-large", "antmaze-giant", "humanoidmaze-medium", "humanoidmaze-large")
REPORTED = {
    "(FQL)": [
        *(f"{name}-play-singletask*" for name in MANIPULATION),
        *(f"{name}-navigate-singletask*" for name in LOCOMOTION),
    ],
    "(MAC)": [
        *(f"{name}-play-singletask*" for name in MANIPULATION),
        *(f"cube-{size}-play-oraclerep-v0" for size in ("double", "octuple")),
        *(f"puzzle-{size}-play-oraclerep-v0" for size in ("3x3", "4x5")),
        *(f"humanoidmaze-{size}-navigate-oraclerep-v0" for size in ("medium", "giant")),
    ],
    "(horizon reduction)": [
        *(f"{name}-oraclerep-v0" for name in ("cube-octuple-play", "puzzle-4x5-play")),
        "humanoidmaze-giant-navigate-oraclerep-v0",
    ],
    "(OGBench)": ["*maze-*-oraclerep-v0"],  # its manipulation tasks end with puzzle-4x6 and cube-quadruple
    "Kostrikov et al. 2022": ["*-v2"],
    "Tarasov et al. 202": ["*-v2"],
    "Hansen-Estruch et al. 2023": ["*-v2"],
    "Kumar et al. 2020": ["*-v2"],
    "Park and Lee 2024": ["*-v2"],
    "Jiang et al. 2023": ["*-v2"],
}
"""By words of a source: the environments that it has runs of."""
OURS = re.compile(r"this project|unknown|laptop|as for|as above|recalled")
"""Words by which a source says that values are published for not all of what it serves, or for none."""
ROWS = load_rows(HPARAMS)


def claimed(row: dict[str, Any]) -> list[str]:
    """What the publication reports that a row claims to follow; empty if it claims none."""
    if OURS.search(row["source"]):
        return []
    return next(known for words, known in REPORTED.items() if words in row["source"])


GYM: dict[tuple[str, str], dict[str, Any]] = {
    ("mac_fql", "hopper-medium-v2"): {"candidates": 1, "candidates_test": 1},
    ("mopo", "hopper-random-v2"): {"patience": 20, "entropy_in_target": True, "temperature_limit": 1.0},
    ("mopo", "halfcheetah-medium-replay-v2"): {"patience": 4, "rollout": 5, "penalty": 0.5},
    ("mobile", "hopper-medium-v2"): {"temperature": 0.2, "temperature_limit": 0.0, "penalty": 1.5},
    ("mobile", "walker2d-medium-expert-v2"): {
        "entropy_in_target": False,
        "target_range": [0.0, float("inf")],
        "patience": 39,
        "temperature_limit": 1.0,
    },
    ("leq", "hopper-medium-replay-v2"): {"patience": 8, "pretrain": 200_000, "expansion": 5, "elites": 5},
    ("tt", "walker2d-medium-replay-v2"): {"warmup": 0.0038},
    ("tt", "halfcheetah-medium-expert-v2"): {"warmup": 0.04},
}


@pytest.mark.parametrize(("algo", "env"), GYM)
def test_gym_rows_have_the_published_arrangement(algo: str, env: str):
    """Values of the methods' own code that are not those of the MAC paper's runs."""
    merged = merge_rows(ROWS, algo, parse(env), "paper")
    assert {name: merged["hp"][name] for name in GYM[algo, env]} == GYM[algo, env]
    values = {"algo": algo, "env": env, "preset": "paper", **merged}
    settings_from_dict(values, get_algorithm(algo).config, "row")  # which checks types and ranges


@pytest.mark.parametrize("number", range(len(ROWS)))
def test_row_with_a_published_source_serves_what_it_reports(number: int):
    row = ROWS[number]
    if known := claimed(row):
        cases = itertools.product(REGISTRY, PRESETS[1:])
        fitting = [(algo, preset) for algo, preset in cases if row_applies(row, algo, None, preset)]
        for (algo, preset), env in itertools.product(fitting, names()):
            # Rows of a task also serve its twin, which differs in goals or file only.
            twin = "singletask" not in env and "oraclerep" not in env and not env.endswith("-v2")
            if row_applies(row, algo, parse(env), preset) and not twin:
                assert any(fnmatch.fnmatchcase(env, pattern) for pattern in known), (row["source"], env)


def test_rows_that_serve_more_than_is_published_are_found():
    wide = {"algo": "iql", "env": "*-singletask*", "source": "Park et al. 2025 (FQL)"}
    known = claimed(wide)
    assert row_applies(wide, "iql", parse("antmaze-medium-stitch-singletask-v0"), "paper")
    assert not any(fnmatch.fnmatchcase("antmaze-medium-stitch-singletask-v0", pattern) for pattern in known)


HUMANOID, GIANT = "humanoidmaze-medium-navigate-singletask-v0", "antmaze-giant-navigate-singletask-task3-v0"


@pytest.mark.parametrize(
    ("algo", "env", "want"),
    [
        ("fql", "antmaze-large-navigate-singletask-v0", {"alpha": 10.0, "combine": "min", "discount": 0.99}),
        ("fql", GIANT, {"alpha": 10.0, "combine": "min", "discount": 0.995}),
        ("fql", HUMANOID, {"alpha": 30.0, "combine": "mean", "discount": 0.995}),
        ("fql", "humanoidmaze-large-navigate-singletask-task2-v0", {"alpha": 30.0, "discount": 0.995}),
        ("fql", "cube-double-play-singletask-v0", {"alpha": 300.0, "discount": 0.99}),
        ("iql", HUMANOID, {"alpha": 10.0, "discount": 0.995}),
        ("rebrac", HUMANOID, {"alpha_actor": 0.01, "alpha_critic": 0.01, "discount": 0.995}),
        ("ifql", HUMANOID, {"candidates": 32, "discount": 0.995}),
        ("rebrac", "hopper-expert-v2", {"alpha_actor": 0.1, "alpha_critic": 0.1, "actor_coasts": False}),
        (
            "rebrac",
            "walker2d-full-replay-v2",
            {"alpha_critic": 0.01, "actor_first": True},
        ),
    ],
)
def test_paper_preset_has_the_published_values(algo: str, env: str, want: dict[str, Any]):
    got = merge_rows(ROWS, algo, parse(env), "paper")
    assert got["steps"] == 1_000_000 and {key: got["hp"][key] for key in want} == want


@pytest.mark.parametrize("algo", ["iql", "rebrac", "ifql", "idql", "fql"])
def test_tasks_without_published_values_have_no_paper_preset(algo: str):
    reported = [f"{name}-play-singletask*" for name in MANIPULATION]
    if algo != "idql":
        mazes = LOCOMOTION if algo == "fql" else ("humanoidmaze-medium",)
        reported += [f"{name}-navigate-singletask*" for name in mazes]
    for env in names():
        if "singletask" in env:
            whole = any("steps" in row and row_applies(row, algo, parse(env), "paper") for row in ROWS)
            assert whole == any(fnmatch.fnmatchcase(env, pattern) for pattern in reported), env
            assert "steps" in merge_rows(ROWS, algo, parse(env), "laptop")


def test_every_dataset_of_d4rl_has_weights_of_its_own_for_rebrac():
    for env in fnmatch.filter(names(), "*-v2"):
        own = [
            row for row in ROWS if row.get("env") == env and row_applies(row, "rebrac", parse(env), "paper")
        ]
        assert len(own) == 1 and set(own[0]["hp"]) == {"alpha_actor", "alpha_critic"}, env


def test_iql_on_d4rl_follows_one_paper():
    """Kostrikov et al. 2022 scale rewards and leave observations as they are, as IDQL does."""
    for env in ("hopper-medium-expert-v2", "walker2d-medium-v2"):
        iql, idql = (merge_rows(ROWS, algo, parse(env), "paper") for algo in ("iql", "idql"))
        assert iql["data"]["normalize"] == idql["data"]["normalize"] == "none"
        assert iql["hp"]["reward_scale"] == idql["hp"]["reward_scale"] < 1
        assert (iql["hp"]["expectile"], iql["hp"]["alpha"]) == (0.7, 3.0)


@pytest.mark.parametrize("preset", PRESETS[1:])
def test_clones_with_goals_imitate_the_way_to_later_states_only(preset: str):
    for env in names():
        if "oraclerep" in env:
            hp = merge_rows(ROWS, "flow_bc", parse(env), preset)["hp"]
            assert hp["actor_goals"] == [0.0, 1.0, 0.0] and hp["actor_norm"], env
            far = preset == "laptop" and "maze" in env
            assert hp["actor_goals_later"] == ("uniform" if far else "geometric"), env
