"""Sweeps: many configurations in one program, each with the numbers of a run of its own."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from baselines import REGISTRY
from experiments import report
from experiments.launch.saved_run import open_run
from experiments.launch.settings import parse_command_line
from experiments.launch.sweep import variants
from experiments.run import main
from mac.algorithm import AbstractAlgorithm
from mac.errors import UserError
from mac.run.io.logger import EVAL, METRICS, read_rows
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.mesh import seed_keys, seed_mesh
from mac.run.segment import init, segment
from tests.helpers.algorithm_cases import GOALS_ONLY, make
from tests.helpers.command_line import SIZES, content, error_of, params
from tests.helpers.pytest_params import slow_except
from tests.helpers.toy_env import window

SWEEP = ["--sweep", "hp.lr=1e-3,1e-2", "hp.discount=0.99"]
FOLDERS = {"lr=0.001,discount=0.99": ["1e-3", "0.99"], "lr=0.01,discount=0.99": ["1e-2", "0.99"]}
USUAL = next(iter(FOLDERS))
"""The configuration of the other tests, whose programs are compiled once."""
MODES_OF = [(name, "goals" if name in GOALS_ONLY else "reward") for name in REGISTRY]
RETURNS_OF_THE_DATA = ("tap", "tt")
"""Methods that read discounted returns of the data, which are computed once for all configurations."""
OTHER = 0.95
"""By which the second configuration's numbers are multiplied: all stay in their ranges."""


def trained(algo: AbstractAlgorithm, swept: Mapping[str, Any], lanes: int) -> list[np.ndarray]:
    """The networks after three updates of `lanes` lanes, all of seed 0."""
    mesh, keys = seed_mesh(1), jnp.tile(seed_keys(0, 1), lanes)
    steps = jnp.arange(3, dtype=jnp.int32)
    state = init(algo, mesh, keys, swept)
    end, _ = segment(algo, mesh, window(algo.sample.chunk), keys, steps, state)
    return [np.asarray(x) for x in jax.tree.leaves(end.nets)]


@pytest.mark.parametrize(("name", "mode"), slow_except([("mac", "reward"), ("sharsa", "goals")], MODES_OF))
def test_every_number_that_may_be_swept_may_be_traced(name: str, mode: str):
    algo: Any = make(name, mode)
    swept = {each: jnp.asarray([getattr(algo.cfg, each)], jnp.float32) for each in algo.cfg.sweepable()}
    assert {"lr", "tau_ema"} <= set(swept) and "cooldown" not in swept
    assert ("discount" in swept) == (name not in RETURNS_OF_THE_DATA)
    shapes = jax.eval_shape(lambda values: trained_shapes(algo, values), swept)
    assert jax.tree.leaves(shapes)


def trained_shapes(algo: AbstractAlgorithm, swept: Mapping[str, Any]) -> Any:
    """What an update, an action and a prediction need is traced; nothing is computed."""
    mesh, keys = seed_mesh(1), seed_keys(0, 1)
    state = init(algo, mesh, keys, swept)
    end, metrics = segment(algo, mesh, window(algo.sample.chunk), keys, jnp.arange(2), state)
    one = jax.tree.map(lambda x: x[0], end)
    obs = jnp.zeros((1, algo.env.obs_dim))
    goal = None if algo.env.goal_dim is None else jnp.zeros((1, algo.env.goal_dim))
    here = algo.with_hparams(one.swept)
    return end, metrics, here.act(one, obs, goal, keys[0]), here.predict(one, obs, goal, keys[0])


def has_effect(algo: Any, name: str) -> bool:
    """Whether a number does not have to be left out, since the method or the environment ignores it."""
    try:
        dataclasses.replace(algo.cfg, **{name: OTHER * getattr(algo.cfg, name)}).check_env(algo.env)
    except UserError as error:
        assert str(error).endswith("leave it out")
        return False
    return True


@pytest.mark.parametrize(("name", "mode"), slow_except([("iql", "reward")], MODES_OF))
def test_lanes_are_what_algorithms_of_their_own_numbers_are(name: str, mode: str):
    """All numbers at once, in a second lane beside the algorithm's own; but for what the method lacks."""
    algo: Any = make(name, mode)
    usual = {each: getattr(algo.cfg, each) for each in algo.cfg.sweepable() if has_effect(algo, each)}
    assert ("reward_scale" in usual) == (mode != "goals" and name != "tt")
    other = {each: OTHER * value for each, value in usual.items()}
    swept = {each: jnp.asarray([usual[each], other[each]], jnp.float32) for each in usual}
    both = trained(algo, swept, 2)
    for lane, values in enumerate((usual, other)):
        changed = REGISTRY[name].algorithm(dataclasses.replace(algo.cfg, **values), algo.env)
        alone = trained(changed, {}, 1)
        assert any(x.size for x in alone)
        for mine, theirs in zip(both, alone, strict=True):
            np.testing.assert_allclose(mine[lane], theirs[0], rtol=2e-3, atol=2e-5)


@pytest.fixture(scope="module")
def swept(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep of 10 updates."""
    folder = tmp_path_factory.mktemp("sweep") / "run"
    assert main([*SIZES, *data, "--steps", "10", "--out", str(folder), *SWEEP]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("folder", FOLDERS)
def test_each_configuration_leaves_the_run_of_its_own(
    folder: str, swept: Path, data: list[str], tmp_path: Path
):
    assert {path.name for path in swept.iterdir() if path.is_dir()} == set(FOLDERS)
    lr, discount = FOLDERS[folder]
    flags = ["--hp.lr", lr, "--hp.discount", discount, "--steps", "10", "--out", str(tmp_path / "own")]
    assert main([*SIZES, *data, *flags]) == 0
    mine, theirs = open_run(swept / folder), open_run(tmp_path / "own")
    assert mine.settings == dataclasses.replace(theirs.settings, out=mine.settings.out)
    chex.assert_trees_all_close(mine.state, theirs.state, rtol=1e-3, atol=1e-5)
    for name in (EVAL, METRICS):
        pairs = zip(read_rows(swept / folder / name), read_rows(tmp_path / "own" / name), strict=True)
        for row, own in pairs:
            assert row.keys() == own.keys()
            assert (row["step"], row["seed"]) == (own["step"], own["seed"])
            if name == METRICS:
                wanted = [own[key] for key in row]
                np.testing.assert_allclose(list(row.values()), wanted, rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_a_sweep_resumes_to_the_same_bits(swept: Path, data: list[str], tmp_path: Path):
    """Also where one configuration has a checkpoint that the others lack, as after a kill between them."""
    cut = tmp_path / "cut"
    flags = ["--run.checkpoint-every", "5", "--run.keep", "9"]
    assert main([*SIZES, *data, *flags, "--steps", "10", "--out", str(cut), *SWEEP]) == 0
    gone = cut / list(FOLDERS)[1] / CHECKPOINTS / "000000010"
    for path in sorted(gone.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    gone.rmdir()
    assert main(["--out", str(cut), "--resume"]) == 0
    for folder in FOLDERS:
        assert params(cut / folder) == params(swept / folder)
        assert (cut / folder / EVAL).read_bytes() == (swept / folder / EVAL).read_bytes()


@pytest.mark.slow
def test_report_compares_the_runs_of_a_sweep(swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    before = content(swept)
    out, picture = tmp_path / "table.csv", tmp_path / "curves.png"
    assert report.main([str(swept), "--out", str(out), "--picture", str(picture)]) == 0
    said = capsys.readouterr().out
    assert "mac lr=0.001" in said and "mac lr=0.01" in said
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == 1 + len(FOLDERS) and lines[0].startswith("algo,env,preset,task,measure,value")
    assert picture.read_bytes().startswith(b"\x89PNG") and content(swept) == before


def test_report_of_a_folder_without_runs_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert report.main([str(tmp_path)]) == 2
    assert "is no run and holds none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["hp.chunk=5,10"], "chunk is static"),
        (["hp.cooldown=0,0.5"], "cooldown is static"),
        (["hp.lrr=1,2"], "did you mean 'lr'"),
        (["lr=1,2"], "write hp.NAME=V1,V2"),
        (["hp.lr"], "write hp.NAME=V1,V2"),
        (["hp.lr=1,x"], "must be numbers"),
        (["hp.lr=1,1.0"], "twice"),
        (["hp.lr=1", "hp.lr=2"], "twice"),
        (["hp.lr=1,-1"], "must be positive"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_one_line(
    asked: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    line = error_of(capsys, [*SIZES, "--sweep", *asked, "--out", str(tmp_path / "o")])
    assert said in line and not (tmp_path / "o").exists()


def test_values_that_hardly_differ_have_folders_of_their_own():
    settings, _ = parse_command_line([*SIZES, "--sweep", "hp.lr=0.0012345678,0.0012345679,1e-3"])
    assert [each.name for each in variants(settings)] == ["lr=0.0012345678", "lr=0.0012345679", "lr=0.001"]


@pytest.mark.slow
def test_the_folder_of_a_sweep_tells_what_was_swept(swept: Path):
    assert json.loads((swept / "config.json").read_text())["sweep"] == SWEEP[1:]
