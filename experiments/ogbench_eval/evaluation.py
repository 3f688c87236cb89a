"""Evaluation in the real `ogbench` environments, on all cores; this process selects actions in batches."""

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
import numpy as np
from jaxtyping import Array, Key

from experiments.launch.saved_run import SavedRun
from experiments.ogbench_eval.worker import Start, StepResult
from mac.algorithm import AbstractAlgorithm
from mac.cgroup_limits import cores
from mac.errors import UserError, one_line
from mac.run.evaluate import UNSTABLE, episode_keys, no_past, predict_returns, select_actions
from mac.run.report.realized_return import realised_return, step_reward
from mac.types import Episodes, Past

WORKER = Path(__file__).with_name("worker.py")
NEEDED = ("ogbench", "gymnasium", "dm_control")
PER_CORE = 4  # default number of environments per process: each takes a second or two to compile

decide = eqx.filter_jit(select_actions)
expect = eqx.filter_jit(predict_returns)


class EnvPool:
    """Pool of `count` real environments, distributed over one process per core; a context manager.

    Raises:
        UserError: a package is missing, or a process fails.
    """

    def __init__(self, name: str, count: int, *, film: bool = False):
        """Starts the processes; `film` requests the scene after each step."""
        missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"engine ogbench needs the package {', '.join(missing)}; pip install 'ogbench>=1.2,<1.3'"
            )
        self._share = min(cores(), count)
        sizes = [len(range(i, count, self._share)) for i in range(self._share)]
        self._workers = [_Worker(name, size, film) for size in sizes]

    def execute(self, commands: Sequence[tuple[int, Start | np.ndarray]]) -> list[StepResult]:
        """Executes commands, (number of an environment, command) each, in parallel; returns their results."""
        shares: list[list[tuple[int, Any]]] = [[] for _ in self._workers]
        for slot, command in commands:
            shares[slot % self._share].append((slot // self._share, command))
        busy = [i for i, share in enumerate(shares) if share]
        for i in busy:
            self._workers[i].send(shares[i])
        replies = {i: iter(self._workers[i].receive()) for i in busy}
        return [next(replies[slot % self._share]) for slot, _ in commands]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process and its two pipes."""

    def __init__(self, name: str, count: int, film: bool):
        # -P: modules in the script's folder must not shadow packages of the same names.
        command = [sys.executable, "-P", str(WORKER), name, str(count), "film" if film else ""]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, commands: list[tuple[int, Any]]) -> None:
        assert self._process.stdin
        try:
            pickle.dump(commands, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended(error) from error

    def receive(self) -> list[StepResult]:
        assert self._process.stdout
        try:
            reply = pickle.load(self._process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            raise self._ended(error) from error
        if isinstance(reply, str):
            raise UserError(f"engine ogbench failed: {one_line(RuntimeError(reply))}")
        return reply

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ended(self, error: Exception) -> UserError:
        return UserError(f"a process of engine ogbench has died ({one_line(error)}); try a smaller --batch")


class PastSteps:
    """The last steps of the episodes in a table of real environments, as acting with a history sees them."""

    def __init__(self, algo: AbstractAlgorithm, shape: tuple[int, ...]):
        begun = no_past(algo, shape)
        self.steps: dict[str, np.ndarray] = {}
        if begun:
            self.steps = {name: np.array(x) for name, x in vars(begun).items()}

    def forget(self, at: tuple[int, ...]) -> None:
        """Begins an episode in the environment `at`."""
        if self.steps:
            self.steps["valid"][at] = False

    def add(self, at: tuple[int, ...], before: np.ndarray, actions: np.ndarray, played: StepResult) -> None:
        """Adds the steps that were taken with `actions` from the state `before`."""
        if not self.steps or played.states is None:
            return
        new = {
            "obs": np.concatenate([before[None], played.states[:-1]]),
            "actions": np.clip(actions[: played.steps], -1, 1),
            "rewards": np.asarray(played.rewards, np.float32),
            "valid": np.ones(played.steps, bool),
        }
        for name, steps in self.steps.items():
            steps[at] = np.concatenate([steps[at], new[name]])[-len(steps[at]) :]

    def now(self) -> Past | None:
        """Returns the steps of all environments."""
        return Past(**{name: jnp.asarray(x) for name, x in self.steps.items()}) if self.steps else None


def start_seed(key: Key[Array, ""]) -> int:
    """Returns the seed of a real environment's episode, from the key that would start ours."""
    return int(jr.bits(key, dtype=jnp.uint32))


def play_official(
    run: SavedRun,
    name: str,
    tasks: tuple[int, ...],
    episodes: int,
    keys: Key[Array, " S"],
    *,
    batch: int = 0,
    report: Callable[[int], None] = lambda ended: None,
) -> Episodes:
    """Evaluates in the real environment called `name`, as `mac.run.evaluate.evaluate` does in ours.

    `ogbench` draws the start states, from seeds that follow from the episodes' keys. The policies' noise is
    the same as on every other engine. An environment whose episode has ended starts the next episode of the
    same policy at the next decision.

    Args:
        batch: largest number of environments, at least one per seed; 0 takes a few per core.
        report: called with the number of finished episodes.
    Raises:
        UserError: `ogbench` is missing or fails.
    """
    seeds, count = len(run.numbers), len(tasks) * episodes
    width = min(max((batch or PER_CORE * cores()) // seeds, 1), count)
    task, episode = np.repeat(tasks, episodes), np.tile(np.arange(episodes), len(tasks))
    with EnvPool(name, seeds * width) as pool:
        running = _RunningEpisodes(
            run, pool, (seeds, width), task, *episode_keys(keys, jnp.asarray(task), jnp.asarray(episode))
        )
        while running.start():
            running.move()
            report(running.ended)
    dropped = np.zeros_like(running.length)  # MuJoCo C has room for every contact
    results = {"success": running.success, "episode_return": running.total, "length": running.length}
    results |= {"dropped": dropped, "unstable": running.unstable, "bad_action": running.bad_action}
    results |= running.returns()
    table = seeds, len(tasks), episodes
    return Episodes(**{name: jnp.asarray(value.reshape(table)) for name, value in results.items()})


class _RunningEpisodes:
    """Running episodes. Axes: seeds and their environments, or seeds and their episodes.

    Attributes:
        playing: number of the episode in each environment; -1 is none.
        success, total, length: results by episode.
        discounted, last: arguments of `realised_return` by episode.
        predicted: return that the algorithm predicts at the start of each episode.
        unstable, bad_action: causes of an episode's end, as in `Episodes`.
    """

    def __init__(
        self,
        run: SavedRun,
        pool: EnvPool,
        shape: tuple[int, int],
        task: np.ndarray,
        k_reset: Key[Array, "S E"],
        k_act: Key[Array, "S E"],
    ):
        self.run, self.pool, self.task, self.k_reset, self.k_act = run, pool, task, k_reset, k_act
        self.playing = np.full(shape, -1)
        self.obs = np.zeros((*shape, run.algo.env.obs_dim), np.float32)
        width = run.algo.env.goal_dim
        self.goal = None if width is None else np.zeros((*shape, width), np.float32)
        self.decision = np.zeros(shape, np.int32)
        self.past = PastSteps(run.algo, shape)
        self.waiting = [iter(range(len(task))) for _ in range(shape[0])]
        self.success = np.zeros(k_reset.shape, bool)
        self.total, self.length = np.zeros(k_reset.shape, np.float32), np.zeros(k_reset.shape, np.int32)
        self.discounted, self.last = np.zeros_like(self.total), np.zeros_like(self.total)
        self.predicted = np.zeros_like(self.total)
        self.unstable, self.bad_action = np.zeros_like(self.success), np.zeros_like(self.success)

    @property
    def ended(self) -> int:
        """Number of finished episodes."""
        return int(np.count_nonzero(self.length) - np.count_nonzero(self.playing >= 0))

    def start(self) -> bool:
        """Starts the next episodes where one has ended; returns False when none is left."""
        starts = []
        for s, w in np.argwhere(self.playing < 0).tolist():
            if (i := next(self.waiting[s], None)) is not None:
                self.playing[s, w], self.decision[s, w] = i, 0
                self.past.forget((s, w))
                starts.append(((s, w), Start(start_seed(self.k_reset[s, i]), int(self.task[i]))))
        for at, played in self._execute(starts):
            self.obs[at] = played.obs
            if self.goal is not None:
                self.goal[at] = played.goal
        if starts and self.run.algo.step_discount is not None:
            expected = np.asarray(expect(*self._policy_inputs()))
            for at, _ in starts:
                self.predicted[at[0], self.playing[at]] = expected[at]
        return bool(np.any(self.playing >= 0))

    def _policy_inputs(self) -> tuple[Any, ...]:
        """Returns the common arguments of `select_actions` and `predict_returns`."""
        rows = np.arange(len(self.playing))[:, None]
        noise = self.k_act[rows, np.maximum(self.playing, 0)]
        goal = None if self.goal is None else jnp.asarray(self.goal)
        return self.run.policies, jnp.asarray(self.obs), goal, noise

    def move(self) -> None:
        """Executes one chunk in each environment with a running episode."""
        decision = jnp.asarray(self.decision)
        actions = np.asarray(decide(*self._policy_inputs(), decision=decision, past=self.past.now()))
        self.decision += 1
        for s, w in np.argwhere((self.playing >= 0) & ~np.isfinite(actions).all(axis=(2, 3))).tolist():
            self.bad_action[s, self.playing[s, w]], self.playing[s, w] = True, -1
        places = [(s, w) for s, w in np.argwhere(self.playing >= 0).tolist()]
        for at, played in self._execute([(at, actions[at]) for at in places]):
            episode = at[0], self.playing[at]
            rewards = np.asarray(played.rewards, np.float32)
            sound = np.cumprod(np.abs(rewards) <= UNSTABLE).astype(bool)
            self._add(episode, rewards[sound])
            if not sound.all() or not np.all(np.abs(played.obs) <= UNSTABLE):
                self.unstable[episode], self.playing[at] = True, -1
                continue
            self.past.add(at, self.obs[at], actions[at], played)
            self.obs[at] = played.obs
            if played.done:
                self.success[episode], self.playing[at] = played.success, -1

    def _add(self, episode: tuple[int, int], rewards: np.ndarray) -> None:
        """Adds the rewards of an episode's new steps."""
        if not len(rewards):
            return
        paid = np.asarray(step_reward(self.run.algo.env, jnp.asarray(rewards)))
        time = self.length[episode] + np.arange(len(rewards))
        self.discounted[episode] += np.sum((self.run.algo.step_discount or 0.0) ** time * paid)
        self.total[episode] += rewards.sum()
        self.length[episode] += len(rewards)
        self.last[episode] = paid[-1]

    def returns(self) -> dict[str, np.ndarray]:
        """Returns predicted and realised return by episode, if the algorithm predicts returns."""
        discount = self.run.algo.step_discount
        if discount is None:
            return {}
        facts = map(jnp.asarray, (self.discounted, self.last, self.success, self.length))
        realised = np.asarray(realised_return(*facts, discount=discount))
        return {"predicted": self.predicted, "realised": realised}

    def _execute(
        self, commands: list[tuple[tuple[int, int], Any]]
    ) -> list[tuple[tuple[int, int], StepResult]]:
        """Calls `EnvPool.execute` by seed and column."""
        width = self.playing.shape[1]
        done = self.pool.execute([(s * width + w, command) for (s, w), command in commands])
        return [(at, played) for (at, _), played in zip(commands, done, strict=True)]
