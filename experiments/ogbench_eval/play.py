"""Evaluation in the real `ogbench` environments, on all cores; the policies act here, in batches."""

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
from experiments.ogbench_eval.worker import Played, Start
from mac.errors import UserError, one_line
from mac.machine import cores
from mac.run.evaluate import UNSTABLE, episode_keys, predict_returns, select_actions
from mac.run.report.episode_returns import realised_return, step_reward
from mac.types import Episodes

WORKER = Path(__file__).with_name("worker.py")
NEEDED = ("ogbench", "gymnasium", "dm_control")
PER_CORE = 4  # environments per process, unless told otherwise: each takes a second or two to compile

decide = eqx.filter_jit(select_actions)
expect = eqx.filter_jit(predict_returns)


class EnvPool:
    """`count` real environments, shared out to one process per core; a context manager.

    Raises:
        UserError: a package is missing, or a process fails; in one line.
    """

    def __init__(self, name: str, count: int, *, film: bool = False):
        """Starts the processes; `film` asks for the scene after each step."""
        missing = [package for package in NEEDED if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(
                f"engine ogbench needs the package {', '.join(missing)}; pip install 'ogbench>=1.2,<1.3'"
            )
        self._share = min(cores(), count)
        sizes = [len(range(i, count, self._share)) for i in range(self._share)]
        self._workers = [_Worker(name, size, film) for size in sizes]

    def obey(self, orders: Sequence[tuple[int, Start | np.ndarray]]) -> list[Played]:
        """What came of each order: an environment's number, and what it is to do. All work at once."""
        shares: list[list[tuple[int, Any]]] = [[] for _ in self._workers]
        for slot, order in orders:
            shares[slot % self._share].append((slot // self._share, order))
        busy = [i for i, share in enumerate(shares) if share]
        for i in busy:
            self._workers[i].send(shares[i])
        replies = {i: iter(self._workers[i].receive()) for i in busy}
        return [next(replies[slot % self._share]) for slot, _ in orders]

    def __enter__(self) -> "EnvPool":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, name: str, count: int, film: bool):
        # -P: the folder of the script must not stand in for packages of the same names.
        command = [sys.executable, "-P", str(WORKER), name, str(count), "film" if film else ""]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def send(self, orders: list[tuple[int, Any]]) -> None:
        assert self._process.stdin
        try:
            pickle.dump(orders, self._process.stdin)
            self._process.stdin.flush()
        except OSError as error:
            raise self._ended(error) from error

    def receive(self) -> list[Played]:
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
        return UserError(f"a process of engine ogbench has ended ({one_line(error)}); try a smaller --batch")


def start_seed(key: Key[Array, ""]) -> int:
    """The seed of a real environment's episode, from the key that would start ours."""
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
    """As `mac.run.evaluate.evaluate`, in the real environment called `name`.

    Start states are drawn by `ogbench`, from seeds that the episodes' keys give; the policies' noise is
    that of every other engine. An environment whose episode has ended takes up the next one of the
    same policy at the next decision.

    Args:
        batch: most environments, of which each seed has at least one; 0 takes a few per core.
        report: called with the number of episodes that have ended.
    Raises:
        UserError: `ogbench` is missing or fails.
    """
    seeds, count = len(run.numbers), len(tasks) * episodes
    width = min(max((batch or PER_CORE * cores()) // seeds, 1), count)
    task, episode = np.repeat(tasks, episodes), np.tile(np.arange(episodes), len(tasks))
    with EnvPool(name, seeds * width) as fleet:
        match = _Match(
            run, fleet, (seeds, width), task, *episode_keys(keys, jnp.asarray(task), jnp.asarray(episode))
        )
        while match.start():
            match.move()
            report(match.ended)
    dropped = np.zeros_like(match.length)  # MuJoCo C has room for every contact
    results = {"success": match.success, "episode_return": match.total, "length": match.length}
    results |= {"dropped": dropped, "unstable": match.unstable, "bad_action": match.bad_action}
    results |= match.returns()
    table = seeds, len(tasks), episodes
    return Episodes(**{name: jnp.asarray(value.reshape(table)) for name, value in results.items()})


class _Match:
    """Episodes under way. Axes: seeds and their environments, or seeds and their episodes.

    Attributes:
        playing: number of the episode in each environment; -1 is none.
        success, total, length: results by episode, and what `realised_return` asks for.
        predicted: what the algorithm expected at the start of each episode.
        unstable, bad_action: what ended an episode, as `Episodes` says.
    """

    def __init__(
        self,
        run: SavedRun,
        fleet: EnvPool,
        shape: tuple[int, int],
        task: np.ndarray,
        k_reset: Key[Array, "S E"],
        k_act: Key[Array, "S E"],
    ):
        self.run, self.fleet, self.task, self.k_reset, self.k_act = run, fleet, task, k_reset, k_act
        self.playing = np.full(shape, -1)
        self.obs = np.zeros((*shape, run.algo.env.obs_dim), np.float32)
        width = run.algo.env.goal_dim
        self.goal = None if width is None else np.zeros((*shape, width), np.float32)
        self.decision = np.zeros(shape, np.int32)
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
        """Begins the next episodes where one has ended; False when none is left."""
        starts = []
        for s, w in np.argwhere(self.playing < 0).tolist():
            if (i := next(self.waiting[s], None)) is not None:
                self.playing[s, w], self.decision[s, w] = i, 0
                starts.append(((s, w), Start(start_seed(self.k_reset[s, i]), int(self.task[i]))))
        for at, played in self._obey(starts):
            self.obs[at] = played.obs
            if self.goal is not None:
                self.goal[at] = played.goal
        if starts and self.run.algo.step_discount is not None:
            expected = np.asarray(expect(*self._situation()))
            for at, _ in starts:
                self.predicted[at[0], self.playing[at]] = expected[at]
        return bool(np.any(self.playing >= 0))

    def _situation(self) -> tuple[Any, ...]:
        """What `select_actions` and `predict_returns` ask for in common."""
        rows = np.arange(len(self.playing))[:, None]
        noise = self.k_act[rows, np.maximum(self.playing, 0)]
        goal = None if self.goal is None else jnp.asarray(self.goal)
        return self.run.policies, jnp.asarray(self.obs), goal, noise

    def move(self) -> None:
        """Executes one chunk in each environment that plays."""
        actions = np.asarray(decide(*self._situation(), decision=jnp.asarray(self.decision)))
        self.decision += 1
        for s, w in np.argwhere((self.playing >= 0) & ~np.isfinite(actions).all(axis=(2, 3))).tolist():
            self.bad_action[s, self.playing[s, w]], self.playing[s, w] = True, -1
        places = [(s, w) for s, w in np.argwhere(self.playing >= 0).tolist()]
        for at, played in self._obey([(at, actions[at]) for at in places]):
            episode = at[0], self.playing[at]
            rewards = np.asarray(played.rewards, np.float32)
            sound = np.cumprod(np.abs(rewards) <= UNSTABLE).astype(bool)
            self._add(episode, rewards[sound])
            if not sound.all() or not np.all(np.abs(played.obs) <= UNSTABLE):
                self.unstable[episode], self.playing[at] = True, -1
                continue
            self.obs[at] = played.obs
            if played.done:
                self.success[episode], self.playing[at] = played.success, -1

    def _add(self, episode: tuple[int, int], rewards: np.ndarray) -> None:
        """Enters the rewards of the steps that an episode has taken."""
        if not len(rewards):
            return
        paid = np.asarray(step_reward(self.run.algo.env, jnp.asarray(rewards)))
        time = self.length[episode] + np.arange(len(rewards))
        self.discounted[episode] += np.sum((self.run.algo.step_discount or 0.0) ** time * paid)
        self.total[episode] += rewards.sum()
        self.length[episode] += len(rewards)
        self.last[episode] = paid[-1]

    def returns(self) -> dict[str, np.ndarray]:
        """Expected and realised return by episode, if the algorithm expects any."""
        discount = self.run.algo.step_discount
        if discount is None:
            return {}
        facts = map(jnp.asarray, (self.discounted, self.last, self.success, self.length))
        realised = np.asarray(realised_return(*facts, discount=discount))
        return {"predicted": self.predicted, "realised": realised}

    def _obey(self, orders: list[tuple[tuple[int, int], Any]]) -> list[tuple[tuple[int, int], Played]]:
        """`EnvPool.obey` by seed and column."""
        width = self.playing.shape[1]
        done = self.fleet.obey([(s * width + w, order) for (s, w), order in orders])
        return [(at, played) for (at, _), played in zip(orders, done, strict=True)]
