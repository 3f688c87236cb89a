"""One episode of each of a run's policies, recorded step by step to be drawn."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.observation import SUCCESS_RADIUS, Objects
from envs_mjx.manipulation.scenes import CONTROL_DT, Scene
from experiments.launch.saved_run import SavedRun
from experiments.ogbench_eval.play import EnvPool, decide, start_seed
from experiments.ogbench_eval.worker import Played, Start
from mac.run.evaluate import episode_keys, evaluation_keys

Look = Callable[[Any], tuple[Any, ...]]


class Film(NamedTuple):
    """What happened, on the host. Axis T: the start, then each control step; a scene that has ended stands.

    Attributes:
        qpos: [T, S, nq], as in `Scene.model`; buttons: [T, S, buttons].
        t: [T, S] control steps taken; success, done: [T, S] as after the last of them.
        target: where the task wants each object, axis S first.
    """

    qpos: np.ndarray
    buttons: np.ndarray
    t: np.ndarray
    success: np.ndarray
    done: np.ndarray
    target: Objects


def reached(scene: Scene, qpos: np.ndarray, buttons: np.ndarray, target: Objects) -> np.ndarray:
    """Which sub-goals of one scene hold: cubes, then buttons, then drawer and window."""
    cubes = qpos[scene.cube_qpos[:, None] + np.arange(3)]
    near = np.linalg.norm(cubes - target.cubes, axis=-1) <= SUCCESS_RADIUS
    shut = np.abs(qpos[scene.slide_qpos] - target.slides) <= SUCCESS_RADIUS
    return np.concatenate([near, buttons == target.buttons, shut])


def verdict(film: Film, k: int, s: int) -> str:
    """How seed `s` stands at frame `k`."""
    return "success" if film.success[k, s] else "failed" if film.done[k, s] else "running"


def caption(scene: Scene, film: Film, k: int, s: int) -> str:
    """Time, sub-goals and outcome of seed `s` at frame `k`."""
    held = reached(scene, film.qpos[k, s], film.buttons[k, s], Objects(*(x[s] for x in film.target)))
    goals = "" if held.size == 1 else f"   {held.sum()}/{held.size} goals"
    said = verdict(film, k, s)
    return f"{film.t[k, s] * CONTROL_DT:5.2f} s{goals}" + ("" if said == "running" else f"   {said}")


def film_ours(run: SavedRun, env: ManipEnv, task: int, draw: int) -> Film:
    """The first episode of `task` of the evaluation that `draw` names (`evaluation_keys`), of each seed."""
    parts, state = play_ours(run, env, task, draw, _look)
    return Film(*parts, Objects(*(np.asarray(x) for x in state.target)))  # pyright: ignore[reportCallIssue]


def play_ours(
    run: SavedRun, env: AbstractEnv, task: int, draw: int, look: Look
) -> tuple[list[np.ndarray], Any]:
    """Plays that episode.

    Args:
        look: what is to be kept of a batch of states; the last entry is `done`.
    Returns:
        That of the start and after each control step, arrays [T, S, ...], and the last states.
    """
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, draw)
    k_reset, k_act = episode_keys(keys, jnp.asarray([task]), jnp.asarray([0]))
    state = _reset(env, k_reset[:, 0], jnp.asarray(task))
    shots, decision = [jax.tree.map(lambda x: x[None], look(state))], 0
    goal = None if state.goal is None else state.goal[:, None]
    while not np.all(shots[-1][-1][-1]):
        asked = jnp.full(k_act.shape, decision)
        actions = decide(run.policies, state.obs[:, None], goal, k_act, asked)
        state, seen = _move(env, look, state, actions[:, 0])
        shots.append(jax.device_get(seen))
        decision += 1
    parts = [np.concatenate([np.asarray(part) for part in shot]) for shot in zip(*shots, strict=True)]
    last = int(np.argmax(np.all(parts[-1], axis=1)))  # a chunk may go on after the end
    return [part[: last + 1] for part in parts], state


@eqx.filter_jit
def _reset(env: AbstractEnv, keys: Any, task: Any) -> EnvState:
    return jax.vmap(env.reset, in_axes=(0, None))(keys, task)


@eqx.filter_jit
def _move(env: AbstractEnv, look: Look, state: EnvState, actions: Any) -> tuple[EnvState, tuple[Any, ...]]:
    """Executes actions[S, n, A]; what is seen after each of the n steps."""

    def step(state: EnvState, action: Any) -> tuple[EnvState, tuple[Any, ...]]:
        state = jax.vmap(env.step)(state, action)
        return state, look(state)

    return jax.lax.scan(step, state, jnp.moveaxis(actions, 1, 0))


def _look(state: Any) -> tuple[Any, ...]:
    return state.physics.qpos, state.buttons, state.t, state.success, state.done


def film_official(run: SavedRun, name: str, task: int, draw: int) -> Film:
    """As `film_ours`, in the real environment `name`."""
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, draw)
    k_reset, k_act = episode_keys(keys, jnp.asarray([task]), jnp.asarray([0]))
    seeds = len(run.numbers)
    reels: list[list[Played]] = []
    with EnvPool(name, seeds, film=True) as fleet:
        played = fleet.obey([(s, Start(start_seed(k_reset[s, 0]), task)) for s in range(seeds)])
        goals = [p.goal for p in played if p.goal is not None and run.algo.env.goal_dim]
        goal = jnp.asarray(np.stack(goals)[:, None]) if goals else None
        reels = [[p] for p in played]
        while active := [s for s in range(seeds) if not reels[s][-1].done]:
            obs = jnp.asarray(np.stack([reel[-1].obs for reel in reels])[:, None])
            asked = jnp.full(k_act.shape, max(len(reel) for reel in reels) - 1)
            actions = np.asarray(decide(run.policies, obs, goal, k_act, asked))
            for s, new in zip(active, fleet.obey([(s, actions[s, 0]) for s in active]), strict=True):
                reels[s].append(new)
    shots = [[shot for played in reel for shot in played.film] for reel in reels]
    length = np.asarray([len(each) for each in shots])
    step = np.minimum(np.arange(length.max())[:, None], length - 1)  # [T, S]; an ended scene stands

    def gather(field: str) -> np.ndarray:
        return np.stack([[getattr(shots[s][i], field) for s, i in enumerate(row)] for row in step.tolist()])

    done = step == length - 1
    success = done & np.asarray([reel[-1].success for reel in reels])
    target = Objects(*(np.stack([each[0].target[i] for each in shots]) for i in range(3)))
    return Film(gather("qpos"), gather("buttons"), step, success, done, target)
