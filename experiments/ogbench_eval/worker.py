"""Plays in the real `ogbench` and `gymnasium` environments, in a process of its own: the only module that
imports them.

Started by `experiments.ogbench_eval.play` as a script. Requests and replies are pickles on standard input and
output: a list of (slot, order) and a list of `Played`. An order is `Start` or an array of actions.
"""

import os
import pickle
import re
import signal
import sys
import warnings
from typing import Any, NamedTuple

import numpy as np

GYM = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah"}
"""gymnasium's names of the walkers that D4RL's and Minari's datasets are of: version 4 and version 5."""


class Start(NamedTuple):
    """Begin an episode of `task` whose randomness `seed` decides."""

    seed: int
    task: int


class Snapshot(NamedTuple):
    """A scene as it is drawn: joint positions, button states, and where the task wants things."""

    qpos: np.ndarray
    buttons: np.ndarray
    target: tuple[np.ndarray, np.ndarray, np.ndarray]


class Played(NamedTuple):
    """Result of one order.

    Attributes:
        obs: the last observation.
        rewards: of each of the steps taken.
        success, done: as after the last step; False after a start.
        film: the scene after each step (or the start), if asked for.
        goal: after a start, the goal's representation in the environment's units; else None.
    """

    obs: np.ndarray
    rewards: list[float]
    success: bool
    done: bool
    film: list[Snapshot]
    goal: np.ndarray | None = None

    @property
    def reward(self) -> float:
        """Sum over the steps taken."""
        return sum(self.rewards)

    @property
    def steps(self) -> int:
        """Number of steps taken."""
        return len(self.rewards)


class SharedArrays:
    """`count` environments called `name`, as the package makes them, its time limit included."""

    def __init__(self, name: str, count: int, film: bool = False):
        self.film = film
        self.envs: list[Any] = [_make(name) for _ in range(count)]

    def obey(self, slot: int, order: Start | np.ndarray) -> Played:
        """Starts an episode, or executes actions until they are used up or the episode ends."""
        env = self.envs[slot]
        if isinstance(order, Start):
            obs, info = env.reset(seed=order.seed, options={"task_id": order.task})
            goal = np.asarray(info["goal"], np.float32) if "goal" in info else None
            return Played(np.asarray(obs, np.float32), [], False, False, self._look(env), goal)
        rewards, done, info, film = [], False, {}, []
        obs = np.empty(0)
        for action in order:
            obs, reward, terminated, truncated, info = env.step(np.asarray(action, np.float32))
            rewards.append(float(reward))
            done = bool(terminated or truncated)
            film += self._look(env)
            if done:
                break
        return Played(np.asarray(obs, np.float32), rewards, bool(info.get("success", False)), done, film)

    def _look(self, env: Any) -> list[Snapshot]:
        if not self.film:
            return []
        bare = env.unwrapped
        mocap = getattr(bare, "_cube_target_mocap_ids", [])
        slides = [getattr(bare, f"_target_{name}_pos", None) for name in ("drawer", "window")]
        target = (
            bare._data.mocap_pos[np.asarray(mocap, int)].copy(),
            np.asarray(getattr(bare, "_target_button_states", ()), bool),
            np.asarray([x for x in slides if x is not None], float),
        )
        buttons = np.asarray(getattr(bare, "_cur_button_states", ()), bool)
        return [Snapshot(bare._data.qpos.copy(), buttons, target)]


def _make(name: str) -> Any:
    body = re.split("[-/]", name.removeprefix("mujoco/"))[0]
    if body in GYM:
        import gymnasium

        return gymnasium.make(
            f"{GYM[body]}-v{5 if name.startswith('mujoco/') else 4}", disable_env_checker=True
        )
    import ogbench

    return ogbench.make_env_and_datasets(name, env_only=True, disable_env_checker=True)


def main(name: str, count: str, film: str) -> None:
    """Serves until standard input ends; what anybody prints goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the program that started this one decides
    warnings.simplefilter("ignore")
    replies, requests = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    slots: SharedArrays | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            slots = slots or SharedArrays(name, int(count), film == "film")
            reply: Any = [slots.obey(slot, order) for slot, order in request]
        except Exception as error:  # whatever it is, the one who asked must hear of it
            reply = f"{type(error).__name__}: {error}"
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    # The classes above are pickled by the name under which the other side knows them.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from experiments.ogbench_eval import worker

    worker.main(*sys.argv[1:])
