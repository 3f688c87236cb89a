"""Tests engines `mjx` and `warp` under OGBench's play expert: as many targets reached as on `c`.

`pytest -m slow -s` prints how many.
"""

import functools
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jaxtyping import Array, Bool, Int, Key

from envs_mjx import experts
from envs_mjx.engines import warp_setup
from envs_mjx.engines.base import AbstractTabletopEngine
from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.engines.tabletop_mjx.engine import MjxEngine
from envs_mjx.engines.tabletop_warp import WarpEngine
from envs_mjx.manipulation.arm_controller import build_arm
from envs_mjx.manipulation.scene_simulation import Tabletop
from envs_mjx.manipulation.scenes import Scene, build_scene

needs_warp = pytest.mark.skipif(
    not warp_setup.available(), reason="needs warp-lang: pip install -e '.[warp]'"
)
pytestmark = pytest.mark.promotion
EPISODES, STEPS = 10, 120
FAMILIES = ("cube-single", "cube-double", "cube-quadruple", "scene", "puzzle-3x3", "puzzle-4x5")


def reaches(table: Tabletop, key: Key[Array, ""]) -> tuple[Bool[Array, ""], Int[Array, ""]]:
    """Returns whether an expert that follows its first plan reaches its target, and contacts dropped."""
    scene, keys = table.scene, jr.split(key, STEPS + 2)
    world = table.reset_collect(keys[0])
    expert = experts.begin("play", scene, keys[1], table.readings(world))

    def step(carry: tuple) -> tuple:
        t, world, expert, _ = carry
        action, expert, over = experts.act("play", scene, expert, table.readings(world), keys[t + 2])
        return t + 1, table.advance(world, action, jnp.asarray(True)), expert, over

    start = (jnp.asarray(0), world, expert, jnp.asarray(False))
    _, world, expert, _ = jax.lax.while_loop(lambda carry: ~carry[3] & (carry[0] < STEPS), step, start)
    return experts.achieved(scene, expert.target, table.readings(world)), world.physics.dropped


@functools.cache
def rates(kind: Callable[[Scene], AbstractTabletopEngine], family: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns for each episode, the same in every engine, whether the target is reached, and contacts
    dropped."""
    scene = build_scene(family)
    table = Tabletop(kind(scene), scene, build_arm(scene))
    run = eqx.filter_jit(lambda table, keys: jax.vmap(lambda key: reaches(table, key))(keys))
    reached, dropped = run(table, jr.split(jr.key(3), EPISODES))
    return np.asarray(reached), np.asarray(dropped)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [MjxEngine, pytest.param(WarpEngine, marks=needs_warp)])
def test_experts_reach_as_many_targets_as_in_c_but_at_most_one(
    kind: type[MjxEngine | WarpEngine], family: str
):
    here, dropped = rates(kind, family)
    there, _ = rates(CEngine, family)
    print(f"\n{family}: {here.sum()} on {kind.__name__}, {there.sum()} on c; {(here != there).sum()} differ")
    assert there.sum() >= EPISODES / 2
    assert here.sum() >= there.sum() - 1
    assert not dropped.any()
