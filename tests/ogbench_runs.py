"""Recorded runs of the real ogbench environments, to which ours are compared."""

from typing import NamedTuple

import gymnasium
import jax
import mujoco
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle

from envs_mjx.engine import Physics
from envs_mjx.engine_c import CEngine


class Run(NamedTuple):
    """One episode, axis 0 = control steps. `before` is the physics that each action was applied to."""

    before: list[Physics]
    action: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    terminated: np.ndarray
    ctrl: np.ndarray
    qpos: np.ndarray
    touched: np.ndarray
    target: np.ndarray


def official(name: str, **options):
    """The bare environment, without gymnasium's wrappers."""
    return gymnasium.make(name, **options).unwrapped


def play(
    env, engine: CEngine, *, seed: int, steps: int, noise: float | None, options: dict | None = None
) -> Run:
    """Plays `steps` control steps: the scripted expert with `noise`, or random actions if None.

    The environment is not reset when it reports the end of an episode.
    """
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # the expert's own noise
    ob, info = env.reset(seed=seed, options=options)
    info = info | _target_info(env)
    expert = CubePlanOracle(env=env, noise=0.1)
    expert.reset(ob, info)
    rows = []
    for _ in range(steps):
        if noise is None:
            action = rng.uniform(-1, 1, 5)
        else:
            action = np.clip(np.asarray(expert.select_action(ob, info)) + noise * rng.normal(size=5), -1, 1)
            if expert.done:
                expert.reset(ob, info)
        action = action.astype(np.float32)
        before = jax.tree.map(np.asarray, engine.read(env._data))
        ob, reward, terminated, _, info = env.step(action)
        info = info | _target_info(env)
        data = env._data
        rows.append(
            (
                *(before, action, ob, reward, info["success"], terminated),
                *(data.ctrl.copy(), data.qpos.copy(), _touches(env._model, data)),
            )
        )
    columns = list(zip(*rows, strict=True))
    return Run(list(columns[0]), *(np.asarray(c) for c in columns[1:]), target=_targets(env))


def _targets(env) -> np.ndarray:
    return env._data.mocap_pos[np.asarray(env._cube_target_mocap_ids)].copy()


def _target_info(env) -> dict:
    """What the expert asks for, which the task mode does not report: it moves the first unplaced cube."""
    unplaced = [i for i, placed in enumerate(env._compute_successes()) if not placed]
    block = unplaced[0] if unplaced else 0
    return {
        "privileged/target_task": "cube",
        "privileged/target_block": block,
        "privileged/target_block_pos": _targets(env)[block],
        "privileged/target_block_yaw": np.zeros(1),
    }


def _touches(model: mujoco.MjModel, data: mujoco.MjData) -> bool:
    """Whether anything is in contact, except cubes with the floor."""
    names = [sorted(model.geom(int(geom)).name for geom in pair) for pair in data.contact.geom]
    return any(not (a == "floor" and b.startswith("object_")) for a, b in names)
