"""Hyperparameters of the ablations of MAC: what they lack, their chunk lengths, their rows by environment."""

from typing import Any

import pytest

from envs_mjx.registry import parse as parse_env
from experiments.launch.hparams import HPARAMS, load_rows, merge_rows
from experiments.launch.settings import parse_command_line
from mac.ablations.gaussian import GaussianConfig
from mac.ablations.mac_fql import MACFQLConfig
from mac.ablations.no_distillation import NoDistillConfig
from mac.errors import UserError
from tests.helpers.numpy_ablations import KINDS


@pytest.mark.parametrize(
    ("config", "changes", "start"),
    [
        (GaussianConfig, {"flow_steps": 5}, "--hp.flow-steps=5: "),
        (GaussianConfig, {"flow_steps_test": 10}, "--hp.flow-steps-test=10: "),
        (MACFQLConfig, {"flow_steps_test": 10}, "--hp.flow-steps-test=10: "),
        (MACFQLConfig, {"alpha": -0.1}, "--hp.alpha=-0.1: "),
        (MACFQLConfig, {"alpha": float("nan")}, "--hp.alpha=nan: "),
        (NoDistillConfig, {"flow_steps_test": 10}, "--hp.flow-steps-test=10: "),
        (NoDistillConfig, {"flow_steps": 2, "one_step": "regression"}, "--hp.flow-steps=2: "),
    ],
)
def test_setting_that_a_method_lacks_is_named_in_one_line(config: Any, changes: dict, start: str):
    with pytest.raises(UserError, match=f"^{start}.*") as caught:
        config(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("chunk", [1, 5, 10, 25])
def test_default_of_executed_actions_fits_any_chunk(chunk: int):
    for _, config, own in KINDS.values():
        cfg = config(**own, chunk=chunk)
        assert cfg.execute == 1
    with pytest.raises(UserError, match=f"^--hp.execute={chunk + 1}: must be 1 to --hp.chunk={chunk};"):
        config(chunk=chunk, execute=chunk + 1)


@pytest.mark.parametrize("preset", ["paper", "laptop"])
@pytest.mark.parametrize(
    ("env", "alpha"),
    [
        ("cube-single-play-singletask-task2-v0", 1.0),
        ("cube-double-play-singletask-task2-v0", 0.3),
        ("cube-double-play-oraclerep-v0", 0.3),
        ("scene-play-singletask-task2-v0", 1.0),
        ("puzzle-4x4-play-singletask-task4-v0", 1.0),
    ],
)
def test_fql_extraction_has_one_sample_and_alpha_by_environment(env: str, alpha: float, preset: str):
    hp = merge_rows(load_rows(HPARAMS), "mac_fql", parse_env(env), preset)["hp"]
    assert (hp["alpha"], hp["candidates"], hp["candidates_test"]) == (alpha, 1, 1)
    own = {"alpha", "candidates", "candidates_test", "flow_steps_test"}
    of_mac = merge_rows(load_rows(HPARAMS), "mac", parse_env(env), preset)["hp"]
    assert {k: v for k, v in hp.items() if k not in own} == {k: v for k, v in of_mac.items() if k not in own}


@pytest.mark.parametrize("algo", ["mac", "mac_gaussian"])
def test_chunk_shorter_than_executed_names_both_flags(algo: str):
    argv = ["--algo", algo, "--preset", "laptop", "--hp.chunk", "1"]
    with pytest.raises(UserError) as caught:
        parse_command_line(argv)
    assert str(caught.value) == "--hp.execute=5: must be 1 to --hp.chunk=1; change either"
    assert parse_command_line([*argv, "--hp.execute", "1"])[0].hp.chunk == 1
