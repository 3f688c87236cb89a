"""Our generator of datasets compared with OGBench's own: statistics of the experts, and speed.

    python -m tests.helpers.compare_generators statistics [--episodes 50] [--names NAME ...]
    python -m tests.helpers.compare_generators speed [--names NAME ...]

print tables in CSV. The unit of all statistics is the episode, because events within one
episode are not independent.
"""

import argparse
import contextlib
import csv
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import gymnasium
import numpy as np
import ogbench  # noqa: F401  (registers the environments)
from ogbench.manipspace.oracles.markov import button_markov, cube_markov, drawer_markov, window_markov
from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

from envs_mjx.datagen.data_policy import TabletopDataPolicy
from envs_mjx.datagen.dataset_spec import LANES
from envs_mjx.datagen.simulate_episodes import (
    EPISODE_ROWS,
    SEGMENT_STEPS,
    EpisodeJob,
    SimulationStopped,
    Simulator,
)
from envs_mjx.engines.tabletop_c import CEngine
from envs_mjx.manipulation.scenes import FAMILIES, build_scene
from envs_mjx.registry import make, parse

COMPARED = (
    "cube-single-play-v0",
    "cube-double-play-v0",
    "scene-play-v0",
    "scene-noisy-v0",
    "puzzle-3x3-play-v0",
    "puzzle-4x5-play-v0",
)
_P_STACK = {"single": (0, 0), "double": (0, 0.25), "triple": (0.05, 0.35), "quadruple": (0.1, 0.5)}
_P_STACK |= {"octuple": (0, 0.35)}


class Episodes(NamedTuple):
    """Episodes of one generator, axes episodes and rows."""

    observations: np.ndarray
    actions: np.ndarray
    done: np.ndarray
    hit: np.ndarray


def parts(dataset: str) -> tuple[str, str]:
    """Family and style of a dataset."""
    family = parse(dataset).family
    return family, dataset.removeprefix(f"{family}-").removesuffix("-v0")


def ours(dataset: str, episodes: int, seed: int) -> Episodes:
    """Healthy episodes of ours."""
    family, style = parts(dataset)
    scene = build_scene(family)
    policy = TabletopDataPolicy(style, scene, CEngine(scene), EPISODE_ROWS)
    simulator = Simulator(policy, seed=seed, lanes=LANES["c"])
    todo, waves = [EpisodeJob(0, i) for i in range(episodes)], []
    while todo:
        wave = simulator.run(todo[: simulator.lanes])
        again = [
            j._replace(attempt=j.attempt + 1) for j, ok in zip(wave.jobs, wave.healthy, strict=True) if not ok
        ]
        todo = todo[simulator.lanes :] + again
        keep = wave.healthy
        rows, events = wave.rows, wave.events
        waves.append(
            Episodes(rows.observations[keep], rows.actions[keep], events.done[keep], events.hit[keep])
        )
    return Episodes(*(np.concatenate(x) for x in zip(*waves, strict=True)))


def theirs(dataset: str, episodes: int, seed: int) -> Episodes:
    """Healthy episodes of OGBench's experts in OGBench's environment."""
    family, style = parts(dataset)
    env = gymnasium.make(
        f"{family}-v0", terminate_at_goal=False, mode="data_collection", max_episode_steps=EPISODE_ROWS
    )
    np.random.seed(seed)
    env.reset(seed=seed)
    env.action_space.seed(seed)
    experts, kept = _experts(env, family, style), []
    while len(kept) < episodes:
        episode, healthy = _episode(env, experts, family, style)
        if healthy:
            kept.append(episode)
    env.close()
    return Episodes(*(np.stack(x) for x in zip(*kept, strict=True)))


def _experts(env: gymnasium.Env, family: str, style: str) -> dict:
    """OGBench's expert for each kind of target, with the options its datasets were made with."""
    kinds = ["cube"] if "cube" in family else ["button"] if "puzzle" in family else []
    kinds = kinds or ["cube", "button", "drawer", "window"]
    modules = {
        "play": (cube_plan, button_plan, drawer_plan, window_plan, "PlanOracle"),
        "noisy": (cube_markov, button_markov, drawer_markov, window_markov, "MarkovOracle"),
    }
    *files, suffix = modules[style]
    options = {"noise": 0.1, "noise_smoothing": 0.5} if style == "play" else {"min_norm": 0.4}
    found = {}
    for kind, file in zip(("cube", "button", "drawer", "window"), files, strict=True):
        if kind in kinds:
            extra = {"gripper_always_closed": True} if "puzzle" in family else {}
            extra |= {"max_step": 100} if (kind, style, family) == ("cube", "noisy", "scene") else {}
            found[kind] = getattr(file, kind.capitalize() + suffix)(env=env, **options, **extra)
    return found


def _episode(env: gymnasium.Env, experts: dict, family: str, style: str) -> tuple[Episodes, bool]:
    """One episode, and whether OGBench would keep it."""
    raw = env.unwrapped
    p_random = {"play": 0.0, "noisy": 0.2 if "puzzle" in family else 0.1}[style]
    ob, info = env.reset()
    p_stack = np.random.uniform(*_P_STACK.get(family.removeprefix("cube-"), (0.5, 0.5)))
    spread = np.random.uniform(0, 0.1) * np.array([1, 1, 1, 3, 10]) if style == "noisy" else np.zeros(5)
    expert = experts[info["privileged/target_task"]]
    expert.reset(ob, info)
    rows, cube = [], []
    for _ in range(EPISODE_ROWS):
        if np.random.rand() < p_random:
            action = env.action_space.sample()
        else:
            action = np.asarray(expert.select_action(ob, info)) + np.random.normal(0, spread)
        action = np.clip(action, -1, 1)
        after, _, _, _, info = env.step(action)
        rows.append((ob, action, expert.done, expert.done and bool(info["success"])))
        cube.append(info["prev_qpos"][15:17])
        ob = after
        if expert.done:
            seen, asked = raw.set_new_target(p_stack=p_stack)
            expert = experts[asked["privileged/target_task"]]
            expert.reset(seen, asked)
    y, z = np.asarray(cube).T
    hidden = (y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))
    columns = Episodes(*(np.asarray(x) for x in zip(*rows, strict=True)))
    columns.done[-1] = columns.hit[-1] = False  # ours records no event in the last row
    return columns, family != "scene" or not hidden.any()


def measures(dataset: str, data: Episodes) -> dict[str, np.ndarray]:
    """Numbers of each episode, by name; NaN where an episode has none."""
    env = make(f"{dataset.removesuffix('-v0')}-singletask-task1-v0", "c")
    flat = data.observations.reshape(-1, data.observations.shape[-1]).astype(np.float32)
    labels = [env.relabel(flat, task) for task in range(1, 6)]
    reward, mask = (
        np.stack(x).reshape(5, *data.done.shape).mean(axis=(0, 2)) for x in zip(*labels, strict=True)
    )
    targets = data.done.sum(axis=1).astype(float)
    last = EPISODE_ROWS - 1 - np.argmax(data.done[:, ::-1], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {
            "targets": targets,
            "hit_rate": data.hit.sum(axis=1) / targets,
            "plan_length": (last + 1) / targets,
            "reward": reward,
            "reward_0": 1 - mask,
        }
    saturated = (np.abs(data.actions) >= 1).mean(axis=1)
    return found | {
        f"saturated_{name}": saturated[:, i] for i, name in enumerate(("x", "y", "z", "yaw", "grip"))
    }


class Row(NamedTuple):
    """One statistic of both generators: means over episodes, standard errors, and their distance."""

    dataset: str
    statistic: str
    ours: float
    ours_error: float
    ogbench: float
    ogbench_error: float
    z: float


def compare(dataset: str, episodes: int) -> Iterator[Row]:
    """The statistics of both generators, each from a stream of random numbers of its own."""
    seed = zlib.crc32(dataset.encode()) % 2**16  # else datasets of a family would share their noise
    theirs_by_name = measures(dataset, theirs(dataset, episodes, seed))
    for name, values in measures(dataset, ours(dataset, episodes, seed)).items():
        pair = [x[np.isfinite(x)] for x in (values, theirs_by_name[name])]
        (a, b), (da, db) = (
            [f(x) for x in pair] for f in (np.mean, lambda x: x.std(ddof=1) / np.sqrt(len(x)))
        )
        z = abs(a - b) / max(np.hypot(da, db), 1e-9)
        yield Row(dataset, name, *(round(float(v), 5) for v in (a, da, b, db)), round(float(z), 2))


class Speed(NamedTuple):
    """Control steps per second of processor time, all threads together, of both generators."""

    dataset: str
    ours: float
    ogbench: float
    ratio: float


def speed(dataset: str, rounds: int = 2) -> Speed:
    """Runs the two generators alternately; starting and compiling are not counted."""
    family, style = parts(dataset)
    scene = build_scene(family)
    policy = TabletopDataPolicy(style, scene, CEngine(scene), EPISODE_ROWS)
    simulator = Simulator(policy, seed=0, lanes=LANES["c"])
    env = gymnasium.make(f"{family}-v0", terminate_at_goal=False, mode="data_collection")
    experts = _experts(env.unwrapped, family, style)
    env = env.unwrapped
    rates: list[tuple[float, float]] = []
    for _ in range(rounds):
        begin = time.process_time()
        _episode(env, experts, family, style)
        theirs = EPISODE_ROWS / (time.process_time() - begin)
        rates.append((_rate(simulator), theirs))
    ours, theirs = (float(np.mean(x)) for x in zip(*rates, strict=True))
    return Speed(dataset, round(ours), round(theirs), round(ours / theirs, 2))


def _rate(simulator: Simulator, stretches: int = 2) -> float:
    """Control steps per second of a full wave, after its first stretch."""
    stop, times = threading.Event(), []

    def tick(rows: int) -> None:
        times.append(time.process_time())
        if len(times) > stretches:
            stop.set()

    with contextlib.suppress(SimulationStopped):
        simulator.run([EpisodeJob(0, i) for i in range(simulator.lanes)], tick, stop)
    return stretches * SEGMENT_STEPS * simulator.lanes / (times[-1] - times[0])


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("statistics", "speed"))
    parser.add_argument("--names", nargs="*")
    parser.add_argument("--episodes", type=int, default=50)
    given = parser.parse_args(argv)
    writer = csv.writer(sys.stdout)
    writer.writerow((Row if given.what == "statistics" else Speed)._fields)
    for name in given.names or (
        COMPARED if given.what == "statistics" else [f"{f}-play-v0" for f in FAMILIES]
    ):
        if given.what == "speed":
            writer.writerow(speed(name))
        else:
            writer.writerows(compare(name, given.episodes))
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
