"""The host's loop around the compiled functions: segments, evaluations, rows, checkpoints."""

import time
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.errors import UserError
from mac.run import segment as loop
from mac.run.checkpoint import CheckpointStore
from mac.run.evaluate import evaluate
from mac.run.interrupt import Interrupt
from mac.run.logger import RunLog
from mac.run.progress import Progress
from mac.types import Episodes, Window

EVAL_STREAM = 1 << 31  # folded into a seed's key for evaluations; training folds in steps below this


@dataclass(frozen=True)
class RunConfig:
    """How the loop runs; nothing here changes what is learned."""

    segment: int = 1000
    """updates per compiled call; metrics are averaged over it, and Ctrl-C is obeyed after it"""
    eval_every: int = 100_000
    """updates between evaluations; there is always one at the end"""
    checkpoint_every: int = 50_000
    """updates between checkpoints; there is always one at the end"""
    keep: int = 2
    """newest checkpoints that are kept"""

    def __post_init__(self):
        for name in ("segment", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(f"--run.{name.replace('_', '-')}={getattr(self, name)}: must be at least 1")


class Job(NamedTuple):
    """All that a training run needs; made by the command line or by hand.

    Attributes:
        config: what a checkpoint must agree with to be resumed, as plain data.
        may_differ: keys of `config` that may change at a resume.
        episodes: per task and seed in each evaluation.
    """

    algo: AbstractAlgorithm
    env: Any
    window: Window
    normalizer: Normalizer
    seed: int
    seeds: int
    steps: int
    episodes: int
    run: RunConfig
    engine: str
    config: dict[str, Any]
    may_differ: tuple[str, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """The seeds' numbers."""
        return list(range(self.seed, self.seed + self.seeds))


@dataclass
class Outcome:
    """What a call of `train` did: the step it reached, whether a signal stopped it, seconds by phase."""

    step: int = 0
    interrupted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class Diverged(UserError):
    """A loss or a weight is not finite any more."""


def train(job: Job, folder: Path, progress: Progress, *, resume: bool) -> Outcome:
    """Trains to `job.steps` updates, or until a signal asks to stop; leaves rows and checkpoints.

    A checkpoint holds the state, the number of updates done and how far each log file reached, so
    a resumed run writes the rows after it anew and ends with the same bits as one that never stopped.

    Raises:
        Diverged: naming the first update, seed and metric that was not finite; checkpoints written
            before it stay.
        UserError: the folder cannot be written, or its checkpoint belongs to another configuration.
    """
    with CheckpointStore(folder / "checkpoints", job.run.keep) as store, Interrupt() as interrupt:
        return _Loop(job, folder, progress, store, interrupt).go(resume)


class _Loop:
    """One call of `train`."""

    def __init__(self, job: Job, folder: Path, progress: Progress, store: CheckpointStore, interrupt: Interrupt):
        self.job, self.folder, self.progress, self.store, self.interrupt = job, folder, progress, store, interrupt
        self.outcome = Outcome()
        self.evaluated = 0  # step of the last evaluation
        self.pending: tuple[int, dict[str, Any]] | None = None  # metrics not yet logged: step and [K, S] arrays
        self.mesh = loop.seed_mesh(job.seeds)
        self.length = gcd(job.steps, job.run.segment, *self._marks())
        keys = loop.seed_keys(job.seed, job.seeds)
        self.eval_keys = jax.vmap(lambda k: jr.fold_in(k, EVAL_STREAM))(keys)
        self.keys = loop.place(self.mesh, keys, loop.SEED)
        self.window = loop.place(self.mesh, job.window, loop.ALL)

    def _marks(self) -> list[int]:
        """Intervals that a segment must divide: those that the run is long enough to reach."""
        return [n for n in (self.job.run.eval_every, self.job.run.checkpoint_every) if n < self.job.steps]

    def go(self, resume: bool) -> Outcome:
        state, positions = self._start(resume)
        with RunLog(self.folder, positions) as self.log:
            run_segment = self._compile(state)
            while True:
                step = self.outcome.step
                if self._due(step, self.job.run.eval_every) and self.evaluated != step and not self.interrupt.asked:
                    self._evaluate(state)
                stop = step >= self.job.steps or self.interrupt.asked
                if stop or self._due(step, self.job.run.checkpoint_every):
                    self._save(state)
                if stop:
                    self.store.wait()
                    self.outcome.interrupted = self.interrupt.signal
                    return self.outcome
                steps = loop.place(self.mesh, np.arange(step, step + self.length, dtype=np.int32), loop.ALL)
                state, metrics = run_segment(self.window, self.keys, steps, state)
                # The segment before this one is logged while this one runs.
                self._flush()
                self.outcome.step += self.length
                self.pending = (self.outcome.step, metrics)

    def _start(self, resume: bool) -> tuple[TrainState, dict[str, int] | None]:
        """The state to begin with, and how much of each log file it covers (None for a new run)."""
        fresh = loop.init(self.job.algo, self.mesh, self.keys)
        if not resume:
            return fresh, None
        if self.store.latest() is None:
            return fresh, {}
        found = self.store.restore(fresh, config=self.job.config, may_differ=self.job.may_differ)
        self.outcome.step, self.evaluated = found.step, found.meta["evaluated"]
        self.progress.note(f"resumed from the checkpoint of update {found.step:,}")
        self.progress.update(found.step)
        return loop.place(self.mesh, found.state, loop.SEED), found.meta["log"]

    def _compile(self, state: TrainState) -> Any:
        """The segment, compiled for this run; None where no update is left to do."""
        if self.outcome.step >= self.job.steps:
            return None
        began = time.perf_counter()
        with self.progress.phase("compiling"):
            steps = loop.place(self.mesh, np.zeros(self.length, np.int32), loop.ALL)
            compiled = loop.segment.lower(
                self.job.algo, self.mesh, self.window, self.keys, steps, state
            ).compile()
        self._spent("compile", began)
        return compiled

    def _due(self, step: int, every: int) -> bool:
        return step == self.job.steps or (step > 0 and step % every == 0)

    def _flush(self) -> None:
        """Checks and logs the metrics of the segment before the current one."""
        if self.pending is None:
            return
        (step, metrics), self.pending = self.pending, None
        began = time.perf_counter()
        values = {name: np.asarray(value) for name, value in metrics.items()}
        self._spent("train", began)
        self._check_finite(step - self.length, values)
        means = {name: value.mean(axis=0) for name, value in values.items()}
        self.log.metrics(step, self.job.numbers, means)
        self.progress.update(step, means)

    def _check_finite(self, first: int, values: dict[str, np.ndarray]) -> None:
        bad = [
            (int(k), int(s), name)
            for name, value in values.items()
            for k, s in np.argwhere(~np.isfinite(value))[:1]
        ]
        if bad:
            k, s, name = min(bad)
            value = values[name][k, s]
            raise self._diverged(f"{name} is {value} at update {first + k}, seed {self.job.seed + s}")

    def _diverged(self, what: str) -> Diverged:
        self.store.wait()
        last = self.store.latest()
        kept = "no checkpoint was written before" if last is None else f"the checkpoint of update {last:,} stays"
        return Diverged(f"training stopped: {what}; {kept}; try a smaller --hp.lr, or look at the data")

    def _evaluate(self, state: TrainState) -> None:
        self._flush()
        job, step, began = self.job, self.outcome.step, time.perf_counter()
        with self.progress.phase("evaluating"):
            state = jax.device_put(state, jax.local_devices()[0])
            keys = jax.vmap(lambda k: jr.fold_in(k, step))(self.eval_keys)
            result = evaluate(job.algo, job.env, job.episodes, job.normalizer, state, keys)
            result = Episodes(*(np.asarray(x) for x in (result.success, result.episode_return, result.length)))
        self._spent("evaluate", began)
        self.evaluated = step
        self.log.evals(step, job.numbers, job.env.spec.tasks, result, job.engine)
        self.progress.success(step, result.success.mean(axis=(1, 2)))

    def _save(self, state: TrainState) -> None:
        self._flush()
        finite = np.asarray(_finite(state))
        if not finite.all():
            seed = self.job.seed + int(np.argmin(finite))
            raise self._diverged(f"a weight is not finite after update {self.outcome.step:,}, seed {seed}")
        meta = {"config": self.job.config, "evaluated": self.evaluated, "log": self.log.sync()}
        self.store.save(self.outcome.step, state, meta)

    def _spent(self, phase: str, began: float) -> None:
        self.outcome.seconds[phase] = self.outcome.seconds.get(phase, 0.0) + time.perf_counter() - began


@eqx.filter_jit
def _finite(state: TrainState) -> jax.Array:
    """Whether all of each seed's numbers are finite, [S]."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x), axis=range(1, x.ndim)) for x in leaves]), axis=0)
