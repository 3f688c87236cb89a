"""Recorded runs of the real ogbench environments, reference of ours."""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import gymnasium
import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
from ogbench.manipspace.oracles.plan.button_plan import ButtonPlanOracle
from ogbench.manipspace.oracles.plan.cube_plan import CubePlanOracle
from ogbench.manipspace.oracles.plan.drawer_plan import DrawerPlanOracle
from ogbench.manipspace.oracles.plan.window_plan import WindowPlanOracle

from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.manipulation.env import ManipState
from envs_mjx.manipulation.observation import Objects
from envs_mjx.manipulation.scene_simulation import SceneState


class Run(NamedTuple):
    """One episode, axis 0 = control steps. `before` is the world that each action was applied to."""

    before: list[SceneState]
    action: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    success: np.ndarray
    terminated: np.ndarray
    ctrl: np.ndarray
    qpos: np.ndarray
    buttons: np.ndarray
    oracle: np.ndarray
    touched: np.ndarray
    target: Objects


@functools.lru_cache(maxsize=2)  # each holds 200 MB
def official(name: str, **options):
    """The bare environment, without gymnasium's wrappers; made once, because that takes seconds."""
    return gymnasium.make(name, **options).unwrapped


def single(family: str, task: int):
    """The single-task environment of a family."""
    env = official(f"{family}-singletask-v0")
    env._reward_task_id = task
    return env


def world_of(env, engine: CEngine) -> SceneState:
    """The scene as ogbench has it now, the physics bit for bit; on the host."""
    return jax.tree.map(np.asarray, SceneState(engine.read(env._data), jnp.asarray(_buttons(env))))


def _buttons(env) -> np.ndarray:
    return np.array(getattr(env, "_cur_button_states", ()), bool)  # a copy: ogbench changes it in place


def target_of(env) -> Objects:
    """Desired states of the task's objects."""
    cubes = env._data.mocap_pos[np.asarray(getattr(env, "_cube_target_mocap_ids", ()), int)].copy()
    buttons = np.array(getattr(env, "_target_button_states", ()), bool)
    slides = [env._target_drawer_pos, env._target_window_pos] if hasattr(env, "_target_drawer_pos") else []
    return Objects(np.float32(cubes), buttons, np.float32(slides))


def state_of(env, run: Run, t: int, goal=None) -> ManipState:
    """Our state of ogbench's run before its action number `t`."""
    return ManipState(
        world=run.before[t],
        obs=jnp.zeros(env.spec.obs_dim),
        goal=goal,
        target=run.target,
        t=jnp.asarray(t),
        key=jax.random.key(0),
    )


def stack(trees):
    """One tree of arrays with a leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def play(
    env, engine: CEngine, *, seed: int, steps: int, noise: float | None, options: dict | None = None
) -> Run:
    """Plays `steps` control steps: the scripted expert with `noise`, or random actions if None.

    The environment is not reset when it reports the end of an episode.
    """
    rng = np.random.default_rng(seed)
    np.random.seed(seed)  # the expert's own noise
    ob, info = env.reset(seed=seed, options=options)
    expert = None if noise is None else _Expert(env, rng)
    rows = []
    for _ in range(steps):
        if expert is None:
            action = rng.uniform(-1, 1, 5)
        else:
            action = np.clip(expert(ob, info) + noise * rng.normal(size=5), -1, 1)
        action = action.astype(np.float32)
        before = world_of(env, engine)
        ob, reward, terminated, _, info = env.step(action)
        data = env._data
        rows.append(
            (
                *(before, action, ob, reward, info["success"], terminated),
                *(data.ctrl.copy(), data.qpos.copy(), _buttons(env)),
                *(env.compute_oracle_observation(), _touches(env._model, data)),
            )
        )
    columns = list(zip(*rows, strict=True))
    return Run(list(columns[0]), *(np.asarray(c) for c in columns[1:]), target=target_of(env))


class _Expert:
    """Plan after plan for one object of the scene after the other.

    Cubes go to their targets; drawer and window to theirs; in puzzles random buttons are pressed. What
    the experts ask for is not in the information of a task-mode environment and is added here.
    """

    def __init__(self, env, rng: np.random.Generator):
        closed = not hasattr(env, "_target_drawer_pos")
        self.env, self.rng, self.plan, self.goals = env, rng, None, self._goals()
        self.experts = {
            "cube": CubePlanOracle(env=env, noise=0.1),
            "button": ButtonPlanOracle(env=env, noise=0.1, gripper_always_closed=closed),
            "drawer": DrawerPlanOracle(env=env, noise=0.1),
            "window": WindowPlanOracle(env=env, noise=0.1),
        }

    def __call__(self, ob, info) -> np.ndarray:
        if self.plan is None or self.plan.done:
            kind, index = next(self.goals)
            self.plan = self.experts[kind]
            self.plan.reset(ob, info | self._target(kind, index))
        return np.asarray(self.plan.select_action(ob, info))

    def _goals(self) -> Iterator[tuple[str, int]]:
        env = self.env
        while True:
            if hasattr(env, "_target_drawer_pos"):
                yield from (("drawer", 0), ("window", 0), ("button", 0), ("cube", 0), ("button", 1))
            elif hasattr(env, "_cube_target_mocap_ids"):
                unplaced = [i for i, placed in enumerate(env._compute_successes()) if not placed]
                yield "cube", unplaced[0] if unplaced else 0
            else:
                yield "button", int(self.rng.integers(env._num_buttons))

    def _target(self, kind: str, index: int) -> dict:
        env, place = self.env, self.env._data.site_xpos
        target = {"privileged/target_task": kind}
        if kind == "cube":
            position = env._data.mocap_pos[env._cube_target_mocap_ids[index]].copy()
            target |= {"privileged/target_block_pos": position, "privileged/target_block_yaw": np.zeros(1)}
        if kind == "button":
            target |= {"privileged/target_button_top_pos": place[env._button_site_ids[index]].copy()}
        if kind == "drawer":
            target |= {"privileged/target_drawer_handle_pos": place[env._drawer_target_site_id].copy()}
        if kind == "window":
            target |= {"privileged/target_window_handle_pos": place[env._window_target_site_id].copy()}
        return target | {f"privileged/target_{'block' if kind == 'cube' else kind}": index}


def _touches(model: mujoco.MjModel, data: mujoco.MjData) -> bool:
    """Returns whether anything is in contact, except cubes with the floor."""
    names = [sorted(model.geom(int(geom)).name for geom in pair) for pair in data.contact.geom]
    return any(not (a == "floor" and b.startswith("object_")) for a, b in names)
