"""Worker process with real `ogbench` and `gymnasium` environments; the only module that imports them.

`ogbench_eval/evaluation.py` starts it as a script. Requests and replies are pickles on standard input and
output: a list of (slot, command) and a list of `StepResult`. A command is `Start` or an array of actions.
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
"""gymnasium's names of the walkers in D4RL's and Minari's datasets (version 4 and version 5)."""


class Start(NamedTuple):
    """Command that starts an episode of `task` with the random seed `seed`."""

    seed: int
    task: int


class Snapshot(NamedTuple):
    """Drawable state of a scene: joint positions, button states, and desired object states."""

    qpos: np.ndarray
    buttons: np.ndarray
    target: tuple[np.ndarray, np.ndarray, np.ndarray]


class StepResult(NamedTuple):
    """Result of one command.

    Attributes:
        obs: last observation.
        rewards: reward of each step taken.
        success, done: values after the last step; False after a start.
        film: scene after each step (or the start), if requested.
        goal: goal representation after a start, in the environment's units; else None.
        states: observation after each step taken, [steps, D]; None after a start.
    """

    obs: np.ndarray
    rewards: list[float]
    success: bool
    done: bool
    film: list[Snapshot]
    goal: np.ndarray | None = None
    states: np.ndarray | None = None

    @property
    def reward(self) -> float:
        """Returns the sum of rewards."""
        return sum(self.rewards)

    @property
    def steps(self) -> int:
        """Returns the number of steps taken."""
        return len(self.rewards)


class WorkerEnvs:
    """Environments of one worker: `count` of the package's environment `name`, with its time limit."""

    def __init__(self, name: str, count: int, film: bool = False):
        self.film = film
        self.envs: list[Any] = [_make(name) for _ in range(count)]

    def execute(self, slot: int, command: Start | np.ndarray) -> StepResult:
        """Starts an episode, or executes actions until they are used up or the episode ends."""
        env = self.envs[slot]
        if isinstance(command, Start):
            obs, info = env.reset(seed=command.seed, options={"task_id": command.task})
            goal = np.asarray(info["goal"], np.float32) if "goal" in info else None
            return StepResult(np.asarray(obs, np.float32), [], False, False, self._look(env), goal)
        rewards, states, done, info, film = [], [], False, {}, []
        for action in command:
            obs, reward, terminated, truncated, info = env.step(np.asarray(action, np.float32))
            rewards.append(float(reward))
            states.append(np.asarray(obs, np.float32))
            done = bool(terminated or truncated)
            film += self._look(env)
            if done:
                break
        success = bool(info.get("success", False))
        return StepResult(states[-1], rewards, success, done, film, states=np.stack(states))

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
    """Serves requests until standard input ends; all printed text goes to standard error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles interrupts
    warnings.simplefilter("ignore")
    replies, requests = os.fdopen(os.dup(1), "wb"), sys.stdin.buffer
    os.dup2(2, 1)
    slots: WorkerEnvs | None = None
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        try:
            slots = slots or WorkerEnvs(name, int(count), film == "film")
            reply: Any = [slots.execute(slot, command) for slot, command in request]
        except Exception as error:  # the parent process reports any error
            reply = f"{type(error).__name__}: {error}"
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    # The parent process unpickles the classes above by their module's full name.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    from experiments.ogbench_eval import worker

    worker.main(*sys.argv[1:])
