"""Tests of mazes and gym walkers on engine `c` compared with free runs of the real ogbench and gymnasium."""

import pytest

from envs_mjx.locomotion.walkers import MAZES
from tests.helpers.real_walkers import Worst, compare

SOME = {
    "pointmaze-teleport-navigate-oraclerep-v0": 60,
    "antmaze-medium-navigate-singletask-v0": 60,
    "humanoidmaze-medium-stitch-v0": 40,
    "hopper-medium-v2": 60,
    "mujoco/walker2d/medium-v0": 40,
    "halfcheetah-medium-v2": 40,
}
ALL = (
    *(f"{family}-navigate-{mode}-v0" for family in MAZES for mode in ("oraclerep", "singletask-task2")),
    *(f"{body}-medium-v2" for body in ("hopper", "walker2d", "halfcheetah")),
    *(f"mujoco/{body}/medium-v0" for body in ("hopper", "walker2d", "halfcheetah")),
)


def check(worst: Worst) -> None:
    """Asserts that nothing differs except float32 rounding of positions of up to 60 m."""
    assert worst.flags == 0
    assert worst.obs < 1e-5 and worst.reward < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_steps_equal_the_real_environments(name: str):
    """Compares observation, reward, success and end of each step, from a shared start, under random
    actions."""
    worst = compare(name, seeds=2, steps=SOME[name])
    check(worst)
    assert worst.teleports or "teleport" not in name
    assert worst.endings or "medium-v" not in name or "cheetah" in name


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_200_steps_of_three_seeds_equal_the_real_environments(name: str):
    worst = compare(name)
    check(worst)
    assert worst.successes or "maze" not in name
