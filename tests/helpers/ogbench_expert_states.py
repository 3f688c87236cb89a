"""Random situations for the scripted experts, in our form and in that of ogbench's step information."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium
import jax
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
import pytest
from ogbench.manipspace.oracles.markov.button_markov import ButtonMarkovOracle
from ogbench.manipspace.oracles.markov.cube_markov import CubeMarkovOracle
from ogbench.manipspace.oracles.markov.drawer_markov import DrawerMarkovOracle
from ogbench.manipspace.oracles.markov.window_markov import WindowMarkovOracle
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

from envs_mjx.experts.targets import BUTTON, CUBE, DRAWER, WINDOW, Target
from envs_mjx.manipulation.observation import Readings
from envs_mjx.manipulation.scenes import Scene

KIND_NAMES = ("cube", "button", "drawer", "window")
CASES = [
    ("cube-quadruple", CUBE),
    ("scene", CUBE),
    ("scene", BUTTON),
    ("scene", DRAWER),
    ("scene", WINDOW),
    ("puzzle-3x3", BUTTON),
]
"""Families and the kinds of targets in them; puzzles of all sizes have the same expert."""
QUICK_CASES = [("scene", CUBE), ("scene", DRAWER)]
"""Those of the default suite."""

PLAN_ORACLES = (CubePlanOracle, ButtonPlanOracle, DrawerPlanOracle, WindowPlanOracle)
MARKOV_ORACLES = (CubeMarkovOracle, ButtonMarkovOracle, DrawerMarkovOracle, WindowMarkovOracle)


class Tape:
    """Stands in for NumPy's random module and generator: hands out recorded draws in order."""

    def __init__(self, values: list) -> None:
        self.values = iter(values)

    def uniform(self, low: object = 0.0, high: object = 1.0, size: object = None) -> np.ndarray:
        return np.asarray(low) + np.asarray(next(self.values), float) * (np.asarray(high) - np.asarray(low))

    def normal(self, loc: float, scale: float, size: tuple[int, int]) -> np.ndarray:
        return np.asarray(next(self.values), float)[: size[0]]

    def choice(self, items: object, p: np.ndarray | None = None) -> object:
        items = list(range(items)) if isinstance(items, int) else items
        share = np.cumsum(np.full(len(items), 1 / len(items)) if p is None else p)
        return items[int((share <= float(next(self.values)) * share[-1]).sum())]


@contextmanager
def taped(values: list) -> Iterator[None]:
    """NumPy's random module hands out `values`, all of them, while this is entered."""
    tape = Tape(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "uniform", tape.uniform)
        patch.setattr(np.random, "normal", tape.normal)
        yield
    assert next(tape.values, None) is None


@functools.cache
def package_env(family: str) -> gymnasium.Env:
    """The real environment, as its data is collected; shared by tests."""
    env = gymnasium.make(f"{family}-v0", terminate_at_goal=False, mode="data_collection")
    env.reset(seed=0)
    return env


def oracle(oracles: tuple, family: str, kind: int, **options: float):
    """OGBench's expert for one kind of target."""
    closed = {"gripper_always_closed": True} if family.startswith("puzzle") else {}
    return oracles[kind](env=package_env(family), **options, **closed)


def f32(x: object) -> np.ndarray:
    return np.asarray(x, np.float32)


def stack(trees: list):
    """One tree of arrays with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def row(tree: object, i: int):
    """Entry `i` of the leading axis."""
    return jax.tree.map(lambda x: x[i], tree)


def random_readings(scene: Scene, seed: int) -> Readings:
    """Everything anywhere; cubes flat on the table."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform([0.3, -0.3], [0.55, 0.3], (scene.cubes, 2))
    slides = rng.uniform([-0.16, 0.0], [0.0, 0.2])[: scene.slides]
    return Readings(
        effector_pos=f32(rng.uniform([0.25, -0.35, 0.02], [0.6, 0.35, 0.35])),
        effector_yaw=f32(rng.uniform(-np.pi, np.pi)),
        gripper_opening=f32(rng.uniform()),
        gripper_contact=f32(rng.uniform()),
        cube_pos=f32(np.column_stack([xy, np.full(scene.cubes, 0.02)])),
        cube_quat=f32(np.zeros((scene.cubes, 4))),  # the experts go by yaw alone
        cube_yaw=f32(rng.uniform(-np.pi, np.pi, scene.cubes)),
        button_state=rng.random(scene.buttons) < 0.5,
        button_pos=f32(rng.uniform(-0.024, 0.0, scene.buttons)),
        button_vel=f32(np.zeros(scene.buttons)),
        slide_pos=f32(slides),
        slide_vel=f32(np.zeros(scene.slides)),
    )


def random_target(scene: Scene, kind: int, seed: int) -> Target:
    """Draws a target of one kind; drawer and window may have any target position."""
    rng = np.random.default_rng(2000 + seed)
    index, value, yaw = 0, 0.0, 0.0
    if kind == CUBE:
        index, yaw = rng.integers(scene.cubes), rng.uniform(0, 2 * np.pi)
        pos = np.append(rng.uniform([0.3, -0.3], [0.55, 0.3]), 0.02)
    elif kind == BUTTON:
        index, value = rng.integers(scene.buttons), float(rng.integers(2))
        pos = scene.button_top[index]
    else:
        index, value = kind - DRAWER, rng.uniform(*[(-0.16, 0.0), (0.0, 0.2)][kind - DRAWER])
        pos = scene.handle[index] + value * scene.handle_axis[index] + [0.0, 0.0, 1e-4]
        yaw = scene.handle_yaw[index]
    return Target(np.int32(kind), np.int32(index), f32(pos), f32(yaw), f32(value))


def info_of(scene: Scene, readings: Readings, target: Target, time: float = 0.0) -> dict:
    """The same facts as OGBench's step information."""
    read_scene = jax.tree.map(lambda x: np.asarray(x, float), readings)
    info = {
        "time": np.array([time]),
        "proprio/effector_pos": read_scene.effector_pos,
        "proprio/effector_yaw": read_scene.effector_yaw[None],
        "proprio/gripper_opening": read_scene.gripper_opening[None],
        "proprio/gripper_contact": read_scene.gripper_contact[None],
    }
    for i in range(scene.cubes):
        info[f"privileged/block_{i}_pos"] = read_scene.cube_pos[i]
        info[f"privileged/block_{i}_yaw"] = read_scene.cube_yaw[i][None]
    for i in range(scene.buttons):
        info[f"privileged/button_{i}_state"] = int(readings.button_state[i])
    handles = scene.handle + read_scene.slide_pos[:, None] * scene.handle_axis
    for name, pos, yaw in zip(("drawer", "window"), handles, scene.handle_yaw, strict=False):
        info[f"privileged/{name}_handle_pos"] = pos
        info[f"privileged/{name}_handle_yaw"] = yaw[None]
    return info | _target_info(target)


def _target_info(target: Target) -> dict:
    pos, name = np.asarray(target.pos, float), KIND_NAMES[int(target.kind)]
    if name == "cube":
        yaw = (np.asarray(target.yaw, float)[None] + np.pi) % (2 * np.pi) - np.pi  # as of a quaternion
        return {
            "privileged/target_block": int(target.index),
            "privileged/target_block_pos": pos,
            "privileged/target_block_yaw": yaw,
        }
    if name == "button":
        return {
            "privileged/target_button": int(target.index),
            "privileged/target_button_top_pos": pos,
            "privileged/target_button_state": int(target.value),
        }
    return {f"privileged/target_{name}_handle_pos": pos}


def readings_of(scene: Scene, info: dict) -> Readings:
    """Our readings of OGBench's step information."""

    def each(count: int, what: str) -> list[np.ndarray]:
        return [np.ravel(info[f"privileged/{what.format(i)}"]) for i in range(count)]

    slides = [info[f"privileged/{name}_pos"] for name in ("drawer", "window")[: scene.slides]]
    return Readings(
        effector_pos=f32(info["proprio/effector_pos"]),
        effector_yaw=f32(info["proprio/effector_yaw"][0]),
        gripper_opening=f32(info["proprio/gripper_opening"][0]),
        gripper_contact=f32(info["proprio/gripper_contact"][0]),
        cube_pos=f32(each(scene.cubes, "block_{}_pos")).reshape(scene.cubes, 3),
        cube_quat=f32(each(scene.cubes, "block_{}_quat")).reshape(scene.cubes, 4),
        cube_yaw=f32(each(scene.cubes, "block_{}_yaw")).reshape(scene.cubes),
        button_state=np.array(
            [info[f"privileged/button_{i}_state"] == 1 for i in range(scene.buttons)], bool
        ),
        button_pos=f32(each(scene.buttons, "button_{}_pos")).reshape(scene.buttons),
        button_vel=f32(each(scene.buttons, "button_{}_vel")).reshape(scene.buttons),
        slide_pos=f32(slides).reshape(scene.slides),
        slide_vel=f32(np.zeros(scene.slides)),
    )


def target_of(scene: Scene, info: dict, name: str | None = None) -> Target:
    """Our form of the target in OGBench's step information, or of the last one of kind `name`."""
    name = name or info["privileged/target_task"]
    kind, index, yaw, value = KIND_NAMES.index(name), 0, 0.0, 0.0
    if kind == CUBE:
        index, pos = info["privileged/target_block"], info["privileged/target_block_pos"]
        yaw = info["privileged/target_block_yaw"][0]
    elif kind == BUTTON:
        index, pos = info["privileged/target_button"], info["privileged/target_button_top_pos"]
        value = info["privileged/target_button_state"]
    else:
        index, pos = kind - DRAWER, info[f"privileged/target_{name}_handle_pos"]
        yaw, value = scene.handle_yaw[index], info[f"privileged/target_{name}_pos"][0]
    return Target(np.int32(kind), np.int32(index), f32(pos), f32(yaw), f32(value))


def angle_between(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs((a - b + np.pi) % (2 * np.pi) - np.pi)
