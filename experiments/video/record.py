"""Recorder of one episode of each policy of a run, for films."""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from envs_mjx.action_noise import undisturbed, with_action_noise
from envs_mjx.base import AbstractEnv, EnvState
from envs_mjx.manipulation.env import ManipEnv
from envs_mjx.manipulation.observation import SUCCESS_RADIUS, Objects
from envs_mjx.manipulation.scenes import CONTROL_DT, Scene
from experiments.launch.saved_run import SavedRun
from experiments.ogbench_eval.evaluation import EnvPool, PastSteps, decide, start_seed
from experiments.ogbench_eval.worker import Start, StepResult
from mac.run.evaluate import episode_keys, evaluation_keys, no_past, planned_states, remember
from mac.types import Past

Look = Callable[[Any], tuple[Any, ...]]
foresee = eqx.filter_jit(planned_states)


class EpisodeRecording(NamedTuple):
    """Recorded episodes on the host. Axis T: the start, then each control step; ended episodes are frozen.

    Attributes:
        qpos: [T, S, nq], as in `Scene.model`; buttons: [T, S, buttons].
        t: [T, S] control steps taken; success, done: [T, S] values after the last of them.
        target: desired state of each object, axis S first.
    """

    qpos: np.ndarray
    buttons: np.ndarray
    t: np.ndarray
    success: np.ndarray
    done: np.ndarray
    target: Objects


def reached(scene: Scene, qpos: np.ndarray, buttons: np.ndarray, target: Objects) -> np.ndarray:
    """Returns the sub-goals reached in one scene: cubes, then buttons, then drawer and window."""
    cubes = qpos[scene.cube_qpos[:, None] + np.arange(3)]
    near = np.linalg.norm(cubes - target.cubes, axis=-1) <= SUCCESS_RADIUS
    shut = np.abs(qpos[scene.slide_qpos] - target.slides) <= SUCCESS_RADIUS
    return np.concatenate([near, buttons == target.buttons, shut])


def status(film: EpisodeRecording, k: int, s: int) -> str:
    """Returns the status of seed `s` at frame `k`."""
    return "success" if film.success[k, s] else "failed" if film.done[k, s] else "running"


def caption(scene: Scene, film: EpisodeRecording, k: int, s: int) -> str:
    """Returns time, sub-goals and status of seed `s` at frame `k`, as text."""
    held = reached(scene, film.qpos[k, s], film.buttons[k, s], Objects(*(x[s] for x in film.target)))
    goals = "" if held.size == 1 else f"   {held.sum()}/{held.size} goals"
    status_text = status(film, k, s)
    return f"{film.t[k, s] * CONTROL_DT:5.2f} s{goals}" + (
        "" if status_text == "running" else f"   {status_text}"
    )


def film_ours(run: SavedRun, env: ManipEnv, task: int, draw: int, noise: float = 0.0) -> EpisodeRecording:
    """Records the first episode of `task` in evaluation number `draw` (`evaluation_keys`), of each seed.

    Args:
        noise: standard deviation of that on executed actions, which also decides where episodes start.
    """
    parts, state, _ = play_ours(run, env, task, draw, noise, _look)
    return EpisodeRecording(*parts, Objects(*(np.asarray(x) for x in state.target)))  # pyright: ignore[reportCallIssue]


def play_ours(
    run: SavedRun, env: AbstractEnv, task: int, draw: int, noise: float, look: Look
) -> tuple[list[np.ndarray], Any, np.ndarray | None]:
    """Plays that episode.

    Args:
        noise: standard deviation of that on executed actions.
        look: function of a batch of the environment's own states, whose results are recorded; the last one is
            `done`.
    Returns:
        Its results for the start and after each control step, arrays [T, S, ...], the last states, and the
        states of the plan that is followed at each of these times, [T, S, H, D]; None without plans.
    """
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, draw)
    k_reset, k_act = episode_keys(keys, jnp.asarray([task]), jnp.asarray([0]))
    env = with_action_noise(env, noise)
    state = _reset(env, k_reset[:, 0], jnp.asarray(task))
    shots, decision = [jax.tree.map(lambda x: x[None], look(undisturbed(state)))], 0
    past = no_past(run.algo, k_act.shape)
    goal, plans = None if state.goal is None else state.goal[:, None], list[np.ndarray]()
    while not np.all(shots[-1][-1][-1]):
        decisions = jnp.full(k_act.shape, decision)
        asked = (run.policies, state.obs[:, None], goal, k_act, decisions, past)
        actions, plan = decide(*asked), foresee(*asked)
        if plan is not None:
            plans += [np.asarray(plan[:, 0])] * actions.shape[2]
        state, past, seen = _move(env, look, state, past, actions[:, 0])
        shots.append(jax.device_get(seen))
        decision += 1
    parts = [np.concatenate([np.asarray(part) for part in shot]) for shot in zip(*shots, strict=True)]
    last = int(np.argmax(np.all(parts[-1], axis=1)))  # a chunk may continue after the end
    followed = np.stack([*plans, plans[-1]])[: last + 1] if plans else None
    return [part[: last + 1] for part in parts], undisturbed(state), followed


@eqx.filter_jit
def _reset(env: AbstractEnv, keys: Any, task: Any) -> EnvState:
    return jax.vmap(env.reset, in_axes=(0, None))(keys, task)


@eqx.filter_jit
def _move(
    env: AbstractEnv, look: Look, state: EnvState, past: Past | None, actions: Any
) -> tuple[EnvState, Past | None, tuple[Any, ...]]:
    """Executes actions[S, n, A]; returns also the results of `look` after each of the n steps."""

    def step(carry: tuple[EnvState, Past | None], action: Any) -> tuple[Any, tuple[Any, ...]]:
        state, past = carry
        new = jax.vmap(env.step)(state, action)
        if past is not None:
            past = remember(past, state.obs[:, None], jnp.clip(action, -1, 1)[:, None], new.reward[:, None])
        return (new, past), look(undisturbed(new))

    (state, past), seen = jax.lax.scan(step, (state, past), jnp.moveaxis(actions, 1, 0))
    return state, past, seen


def _look(state: Any) -> tuple[Any, ...]:
    return state.physics.qpos, state.buttons, state.t, state.success, state.done


def record_in_ogbench(run: SavedRun, name: str, task: int, draw: int) -> EpisodeRecording:
    """Records the same episodes as `film_ours` in the real environment `name`."""
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, draw)
    k_reset, k_act = episode_keys(keys, jnp.asarray([task]), jnp.asarray([0]))
    seeds = len(run.numbers)
    reels: list[list[StepResult]] = []
    with EnvPool(name, seeds, film=True) as pool:
        played = pool.execute([(s, Start(start_seed(k_reset[s, 0]), task)) for s in range(seeds)])
        goals = [p.goal for p in played if p.goal is not None and run.algo.env.goal_dim]
        goal = jnp.asarray(np.stack(goals)[:, None]) if goals else None
        reels, past = [[p] for p in played], PastSteps(run.algo, k_act.shape)
        while active := [s for s in range(seeds) if not reels[s][-1].done]:
            obs = jnp.asarray(np.stack([reel[-1].obs for reel in reels])[:, None])
            decisions = jnp.full(k_act.shape, max(len(reel) for reel in reels) - 1)
            actions = np.asarray(decide(run.policies, obs, goal, k_act, decisions, past.now()))
            for s, new in zip(active, pool.execute([(s, actions[s, 0]) for s in active]), strict=True):
                past.add((s, 0), reels[s][-1].obs, actions[s, 0], new)
                reels[s].append(new)
    shots = [[shot for played in reel for shot in played.film] for reel in reels]
    length = np.asarray([len(shown) for shown in shots])
    step = np.minimum(np.arange(length.max())[:, None], length - 1)  # [T, S]; ended scenes are frozen

    def gather(field: str) -> np.ndarray:
        return np.stack([[getattr(shots[s][i], field) for s, i in enumerate(row)] for row in step.tolist()])

    done = step == length - 1
    success = done & np.asarray([reel[-1].success for reel in reels])
    target = Objects(*(np.stack([shown[0].target[i] for shown in shots]) for i in range(3)))
    return EpisodeRecording(gather("qpos"), gather("buttons"), step, success, done, target)
