"""Tests of `--dry-run`: sizes of the paper's runs against hand calculation, memory, and messages."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Array

from baselines import REGISTRY
from envs_mjx.registry import parse
from experiments.launch import cost_estimate, dataset
from experiments.launch.hparams import HPARAMS, build, load_rows, merge_rows
from mac.algorithm import AbstractAlgorithm
from mac.free_memory import Memory
from mac.run.cost.flops import Operations, sum_operations
from mac.types import EnvSpec
from tests.helpers.toy_env import GOAL_SPEC, SPEC

GB = 10**9
NEED = cost_estimate.TrainingMemory(data=2 * GB, state=4 * GB, scratch=GB, seeds=4, devices=1, together=2)


def paper(name: str, obs: int, goal: int | None, **changes: int) -> tuple[AbstractAlgorithm, EnvSpec]:
    """MAC as the paper trains it in an environment of 5 actions, but for `changes`."""
    columns = () if goal is None else tuple(range(goal))
    spec = EnvSpec(name, obs, 5, goal, (1,), 500, 0.05, columns)
    rows = merge_rows(load_rows(HPARAMS), "mac", parse(name), "paper")
    hp = build(REGISTRY["mac"].config, rows["hp"] | changes, "hparams.toml")
    return REGISTRY["mac"].algorithm(hp, spec, rows["steps"]), spec


def imagined_products(obs: int, goal: int, width: int, batch: int, candidates: int) -> int:
    """Operations of the products in ten imagined chunks of ten actions of five numbers."""
    chunk, hidden = 50, 3 * width * width
    # State and goal are multiplied once per state; noise and all that follows, once per candidate.
    choice = 2 * (obs + goal) * width + candidates * (3 * chunk * width + 2 * hidden + width)
    model = (obs + chunk) * width + hidden + width * obs
    outcome = (obs + chunk) * width + hidden + width  # and of the goal, which stays, once
    return 2 * batch * (10 * (choice + model + outcome) + goal * width)


@pytest.mark.parametrize(
    ("name", "obs", "goal", "width", "batch", "candidates", "gflop"),
    [
        ("cube-double-play-oraclerep-v0", 37, 6, 1024, 1024, 8, 1583.0),
        ("puzzle-4x5-play-oraclerep-v0", 99, 20, 256, 1024, 32, 335.9),
        ("cube-single-play-singletask-task2-v0", 28, None, 512, 256, 8, 102.3),
    ],
)
def test_paper_sizes_cost_what_xla_counts(
    name: str, obs: int, goal: int | None, width: int, batch: int, candidates: int, gflop: float
):
    # `gflop` is within 0.1% of XLA's count with each loop as often as it runs: 1582.4, 336.3 and 102.3
    # (jaxlib 0.10.2, CPU).
    parts = cost_estimate.make_plan(*paper(name, obs, goal), rows=1000, seeds=1).parts
    assert parts["imagination"].matmuls == imagined_products(obs, goal or 0, width, batch, candidates)
    assert sum_operations(parts).flops / 1e9 == pytest.approx(gflop, rel=0.01)


def test_parameters_are_those_of_networks():
    """A size that is a static field is no network, nor is one that a setting does not have."""

    class Nets(eqx.Module):
        q: tuple[eqx.nn.Linear, ...]
        chunk: int = eqx.field(static=True)
        success: eqx.nn.Linear | None = None
        weight: Array | None = None

    def make() -> Nets:
        return Nets((eqx.nn.Linear(3, 2, key=jax.random.key(0)),) * 2, chunk=5, weight=jnp.ones(()))

    assert cost_estimate.parameter_counts(jax.eval_shape(make)) == {"q": 2 * (3 * 2 + 2), "weight": 1}


@pytest.mark.slow
def test_paper_size_agrees_with_xla_where_it_counts_all_turns():
    once = paper("cube-single-play-singletask-task2-v0", 28, None, rollout=1, flow_steps=1)
    sizes = cost_estimate.make_plan(*once, rows=1000, seeds=1)
    theirs = jax.jit(sizes.update).lower(*sizes.args).compile().cost_analysis() or {}
    assert sum_operations(sizes.parts).flops == pytest.approx(theirs["flops"], rel=0.02)
    assert cost_estimate.compile_update(sizes).traffic == pytest.approx(theirs["bytes accessed"], rel=0.02)


def test_peak_holds_data_networks_and_scratch_of_active_seeds():
    assert NEED.peak == (2 + 4 + 2 * 1) * GB
    # Two accelerators hold the data each, and half of the seeds, all of which are at work.
    assert NEED._replace(devices=2, together=4).peak == (2 + (4 + 4) // 2) * GB


def test_memory_says_whether_there_is_enough():
    def verdict(free: int | None) -> str:
        return cost_estimate.memory_lines(NEED, Memory(free, free, shared=True))[0]

    assert verdict(8 * GB).endswith("8.0 GB in all, of 8.0 GB free: enough")
    assert "NOT ENOUGH" in verdict(8 * GB - 1) and "--seeds" in verdict(8 * GB - 1)
    assert "not known" in verdict(None)


def test_verdict_names_what_takes_most_of_the_memory():
    def verdict(replay: int) -> str:
        need = NEED._replace(replay=replay)
        return cost_estimate.memory_lines(need, Memory(GB, GB, shared=False))[0]

    assert verdict(GB).endswith("a smaller --hp.batch")
    assert verdict(9 * GB).endswith("a smaller --hp.rollout-starts or --hp.rollouts-kept")


def test_memory_of_an_accelerator_is_said_on_a_cpu():
    said = cost_estimate.memory_lines(NEED, Memory(None, None, shared=True))
    assert "2.0 GB  of 2 at a time" in said[3] and "about 10.0 GB" in said[4]
    apart = cost_estimate.memory_lines(
        NEED._replace(devices=2, together=4), Memory(None, 6 * GB, shared=False)
    )
    assert "on each of 2 devices, of 6.0 GB free: enough" in apart[0] and len(apart) == 4


def test_work_is_listed_from_the_dearest_part():
    parts = {"small": Operations(10**9, 0, 5), "large": Operations(2 * 10**9, 10**9, 0)}
    head, first, second, traffic = cost_estimate.work_lines(parts, 2 * 10**9)
    assert "4 GFLOP per update and seed: matmuls 3, elementwise 1;" in head
    assert first.split() == ["large", "3.000", "GFLOP", "75.0%"] and second.split()[0] == "small"
    assert "2.0 GB" in traffic and traffic.endswith("2 FLOP per byte")


@pytest.mark.parametrize(
    ("name", "preset", "rows", "note"),
    [
        ("cube-double-play-oraclerep-v0", "paper", 1_001_000, "--data.shards 100 downloads"),
        ("cube-double-play-v0", "paper", 200_200, "--data.shards 100 downloads"),
        ("humanoidmaze-giant-navigate-oraclerep-v0", "paper", 1_001_000, "--data.shards 25 downloads"),
        ("cube-single-play-oraclerep-v0", "paper", 1_001_000, "generate_data.py --rows 100M"),
        ("cube-double-play-oraclerep-v0", "paper", 100_100_000, None),
        ("cube-double-play-oraclerep-v0", "laptop", 1_001_000, None),
        ("cube-double-play-singletask-v0", "paper", 1_001_000, None),
    ],
)
def test_fewer_rows_than_the_paper_has_with_goals_are_noted(
    name: str, preset: str, rows: int, note: str | None
):
    spec = SPEC if "singletask" in name else GOAL_SPEC
    said = cost_estimate.data_note(preset, spec, rows, dataset.larger(parse(name)))
    if note is None:
        assert said is None
    else:
        assert said is not None and f"{rows:,}" in said and "100,000,000" in said and note in said
        assert "\n" not in said


def imagining(**changes: Any) -> AbstractAlgorithm:
    """MOPO for the point at sizes of which the products are easily counted by hand."""
    sizes: dict[str, Any] = {"batch": 8, "hidden": (16,), "members": 3, "rollout": 4}
    sizes |= {"rollout_starts": 10, "rollout_every": 5, "rollouts_kept": 6}
    return REGISTRY["mopo"].algorithm(REGISTRY["mopo"].config(**sizes | changes), SPEC, 100)


def test_imagined_replay_is_counted_once_in_its_own_line():
    plan, without = (
        cost_estimate.make_plan(imagining(**change), SPEC, rows=1000, seeds=3)
        for change in ({}, {"rollouts_kept": 1})
    )
    # Two states and an action of 2 numbers each, a reward and a mask, of 4 bytes; and the counts of 6 slots.
    assert plan.replay_bytes == 3 * (6 * 40 * 8 * 4 + 6 * 4)
    assert plan.state_bytes == without.state_bytes
    need = cost_estimate.memory_of(plan, scratch=0)
    assert need.peak == need.data + plan.state_bytes + plan.replay_bytes
    said = cost_estimate.memory_lines(need, Memory(None, None, shared=False), imagining().replay)
    assert said[3].split()[:3] == ["replay", "0", "MB"] and "240 imagined transitions of each seed" in said[3]
    assert len(cost_estimate.memory_lines(NEED, Memory(None, None, shared=False))) == len(said) - 1


def test_rollouts_are_spread_over_the_updates_between_them():
    # A step of 10 rollouts: the policy, reward and termination, each of 16 hidden units, and a model of three
    # for each rollout, 4 to a model.
    policy, outcomes = 2 * 16 + 16 * 2 * 2, 2 * (4 * 16 + 16)
    step = 10 * (policy + outcomes) + 3 * 4 * (4 * 16 + 16 * 4)
    for every in (5, 10):
        parts = cost_estimate.make_plan(imagining(rollout_every=every), SPEC, rows=1000, seeds=1).parts
        assert parts["rollouts"].matmuls == 2 * 4 * step // every
    assert "rollouts" not in cost_estimate.make_plan(imagining(real_fraction=1.0), SPEC, 1000, 1).parts
