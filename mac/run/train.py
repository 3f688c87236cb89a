"""The host's loop around the compiled functions: segments, evaluations, rows, checkpoints."""

import contextlib
import time
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.data.normalize import Normalizer
from mac.data.window_feed import Source, open_feed
from mac.errors import UserError
from mac.nn.frozen import Kernels, Numerics, Precision
from mac.run import hosts, segment
from mac.run.evaluate import Policies, evaluate, evaluate_on_all, evaluation_keys
from mac.run.io.eval_rows import Evaluation, bad_actions, warnings_of
from mac.run.io.run_outputs import Outputs, Variant
from mac.run.io.signals import Interrupt
from mac.run.mesh import ALL, SEED, fetch, place, run_mesh, seed_keys
from mac.run.report.progress import Progress
from mac.run.report.score import measure_of, values
from mac.run.seed_diagnostics import diagnose, overestimation
from mac.types import Env, Episodes, Window


@dataclass(frozen=True)
class RunConfig:
    """Settings of the loop. None of them changes the method; `precision` changes how numbers are rounded."""

    segment: int = 1000
    """updates per compiled call, less if it does not divide the two intervals below; metrics are averaged
    over it, and Ctrl-C is obeyed after it"""
    eval_every: int = 100_000
    """updates between evaluations; there is always one at the end"""
    checkpoint_every: int = 50_000
    """updates between checkpoints; there is always one at the end"""
    keep: int = 2
    """newest checkpoints that are kept"""
    precision: Precision = "auto"
    """of matmuls: `float32` in full; `tf32` with 10 mantissa bits; `bf16` with 7 in networks without gradient
    (imagination, flow teacher, target networks) and tf32 elsewhere; auto = tf32 on GPUs, float32 on a CPU,
    which emulates both in networks without gradient and computes the others in float32"""
    kernels: Kernels = "auto"
    """of MLPs without gradient: `plain` is layer by layer, `fused` one GPU kernel per network (slow on a CPU,
    which interprets it); auto = plain"""
    batch_devices: int = 0
    """devices that share the batch of each seed, each with a part of it; 0 = as many accelerators as the
    seeds leave idle; on CPUs 1 unless processes are more than seeds"""

    def __post_init__(self):
        for name, choices in (("precision", Precision), ("kernels", Kernels)):
            if getattr(self, name) not in typing.get_args(choices):
                known = ", ".join(typing.get_args(choices))
                raise UserError(f"--run.{name}={getattr(self, name)}: must be one of {known}")
        least = {"segment": 1, "eval_every": 1, "checkpoint_every": 1, "keep": 1, "batch_devices": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                flag = f"--run.{name.replace('_', '-')}={getattr(self, name)}"
                raise UserError(f"{flag}: must be at least {low}")
        if self.batch_devices > 1 and self.kernels == "fused":
            raise UserError("--run.batch-devices: fused kernels cannot be split; take --run.kernels plain")

    @property
    def numerics(self) -> Numerics:
        """Arithmetic of the networks."""
        return Numerics(self.precision, self.kernels)

    def applied_to(self, algo: AbstractAlgorithm) -> AbstractAlgorithm:
        """The algorithm with the arithmetic that is asked for here; its own where nothing is.

        Raises:
            UserError: the algorithm cannot be given any.
        """
        return algo if self.numerics == Numerics() else algo.with_numerics(self.numerics)


class TrainJob(NamedTuple):
    """All that a training run needs; made by the command line or by hand.

    Attributes:
        window: data that stay on the devices, or a plan of windows that take turns.
        config: what a checkpoint must agree with to be resumed, as plain data.
        may_differ: keys of `config` that may change at a resume.
        defaults: values that keys absent from an older checkpoint's `config` stand for, nested as it is.
        episodes: per task and seed in each evaluation.
        batch: most environments that an evaluation simulates at a time; 0 is all of them.
        held_out: data that is not trained on, for diagnoses; None: they look at `window`.
        data: where the data come from, in a few words, for the rows of `eval.jsonl`.
        kept: facts that every checkpoint holds in addition to the state, as JSON data.
        sweep: configurations that are trained at once, each for all seeds, in folders of their own; none if
            there is only the one that `algo` and `config` describe.
    """

    algo: AbstractAlgorithm
    env: Env[Any]
    window: Source
    normalizer: Normalizer
    seed: int
    seeds: int
    steps: int
    episodes: int
    run: RunConfig
    engine: str
    config: dict[str, Any]
    may_differ: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = MappingProxyType({})
    batch: int = 0
    held_out: Window | None = None
    data: str = ""
    kept: Mapping[str, Any] = MappingProxyType({})
    sweep: tuple[Variant, ...] = ()

    @property
    def numbers(self) -> list[int]:
        """The seeds' numbers."""
        return list(range(self.seed, self.seed + self.seeds))

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The configurations, at least one."""
        return self.sweep or (Variant("", {}, self.config),)

    @property
    def lanes(self) -> list[str]:
        """Returns the names of all that is trained at once: each seed of each configuration."""
        names = [f"{each.name}, " if each.name else "" for each in self.variants]
        return [f"{name}seed {seed}" for name in names for seed in self.numbers]

    @property
    def swept(self) -> dict[str, np.ndarray]:
        """Hyperparameters in which lanes differ: all seeds of the first variant, of the second, ..."""
        values = {name: [each.values[name] for each in self.variants] for name in self.variants[0].values}
        return {name: np.repeat(np.asarray(each, np.float32), self.seeds) for name, each in values.items()}


@dataclass
class TrainResult:
    """Result of `train`: the step it reached, whether a signal stopped it, seconds by phase."""

    step: int = 0
    interrupted: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def status(self) -> int:
        """Exit status of a program that ends with this: 0, or 128 + the signal's number."""
        return 128 + self.interrupted if self.interrupted else 0


class Diverged(UserError):
    """A loss or a weight is not finite any more."""


def train(job: TrainJob, folder: Path, progress: Progress, *, resume: bool) -> TrainResult:
    """Trains to `job.steps` updates, or until a signal asks to stop; leaves rows and checkpoints.

    A checkpoint holds the state, the number of updates done and how far each log file reached, so
    a resumed run writes the rows after it anew and ends with the same bits as one that never stopped.
    Where an evaluation is due too, the checkpoint is written before it, and learns of it afterwards: an
    evaluation that fails loses no updates.

    Raises:
        Diverged: naming the first update, seed and metric that was not finite, or the evaluation in which
            a policy's actions were not; checkpoints written before it stay.
        UserError: the folder cannot be written, or its checkpoint belongs to another configuration.
    """
    with (
        Outputs(folder, job.variants, job.numbers, job.run.keep, job.kept) as outputs,
        Interrupt() as interrupt,
    ):
        run = _Loop(job, progress, outputs, interrupt)
        with contextlib.closing(run.feed):
            return run.go(resume)


class _Loop:
    """One call of `train`."""

    def __init__(self, job: TrainJob, progress: Progress, outputs: Outputs, stop: Interrupt):
        self.job, self.progress, self.outputs, self.interrupt = job, progress, outputs, stop
        self.algo = job.run.applied_to(job.algo)
        self.numbers = job.numbers * len(job.variants)  # of the lanes' seeds
        self.outcome = TrainResult()
        self.evaluated = 0  # step of the last evaluation
        self.saved: tuple[int, int] | None = None  # of the newest checkpoint: its step, and `evaluated`
        self.pending: tuple[int, dict[str, Any]] | None = None  # not yet logged: first update, [K, S] arrays
        share = 1 if job.run.kernels == "fused" else job.run.batch_devices
        self.mesh = run_mesh(len(self.numbers), self.algo.sample.batch, share)
        self.agreed = 0  # number of a signal that some process was sent, when all last asked
        self.feed = open_feed(job.window, lambda tree: place(self.mesh, tree, ALL), job.steps)
        # A segment ends wherever something is due; marks that the run does not reach do not count.
        due = (job.run.eval_every, job.run.checkpoint_every, self.feed.updates or job.steps)
        marks = [n for n in due if n < job.steps]
        self.length = gcd(job.run.segment, *marks)
        self.programs: dict[int, Any] = {}
        keys = jnp.tile(seed_keys(job.seed, job.seeds), len(job.variants))
        self.keys = place(self.mesh, keys, SEED)
        self.swept = place(self.mesh, job.swept, SEED)
        self.held_out = None if job.held_out is None else place(self.mesh, job.held_out, ALL)

    @property
    def signal(self) -> int:
        """Number of the signal that asks to stop, 0 if there is none; the same in all processes."""
        return self.interrupt.signal if hosts.count() == 1 else self.agreed

    def _share_signals(self) -> None:
        """Lets every process know of the signals that any of them was sent."""
        if hosts.count() > 1:
            self.agreed = max(hosts.gather_json(self.interrupt.signal))

    def go(self, resume: bool) -> TrainResult:
        self._tell_of_idle_devices()
        state = self._start(resume)
        while True:
            step = self.outcome.step
            self._share_signals()
            self._save_if_due(state)  # before the evaluation: one that fails loses no updates
            if self._due(self.job.run.eval_every) and self.evaluated != step and not self.signal:
                self._evaluate(state)
                self._share_signals()
            stop = step >= self.job.steps or bool(self.signal)
            self._save_if_due(state)  # the checkpoint learns of the evaluation
            if stop:
                with self._timed("checkpoint"):
                    self.outputs.wait()
                self._print_notes()
                # A signal received when all was done has nothing to stop.
                done = step >= self.job.steps and self.evaluated == step
                self.outcome.interrupted = 0 if done else self.signal
                self.outcome.seconds |= self.feed.seconds
                return self.outcome
            state = self._segment(state)

    def _tell_of_idle_devices(self) -> None:
        used, there = self.mesh.size, jax.device_count()
        if used < there:
            self.progress.note(
                f"note: {there - used} of {there} devices stay idle: {used} divide {len(self.numbers)} seeds "
                f"and batches of {self.algo.sample.batch} (--run.batch-devices)"
            )

    def _start(self, resume: bool) -> TrainState:
        """The state to begin with."""
        fresh = segment.init(self.algo, self.mesh, self.keys, self.swept)
        if not resume or hosts.from_first(self.outputs.latest()) is None:
            if resume:
                self.progress.note("the run left no checkpoint, so it begins again")
            self.outputs.begin(again=resume)
            return segment.prepare(self.algo, self.mesh, self.feed.at(0), fresh)
        found = self.outputs.restore(fresh, self.job.may_differ, self.job.defaults)
        self.outcome.step, self.evaluated = found.step, found.meta["evaluated"]
        self.saved = found.step, self.evaluated
        self.progress.note(f"resumed from the checkpoint of update {found.step:,}")
        self.progress.update(found.step)
        return place(self.mesh, found.state, SEED)

    def _due(self, every: int) -> bool:
        step = self.outcome.step
        return step == self.job.steps or (step > 0 and step % every == 0)

    def _segment(self, state: TrainState) -> TrainState:
        """Updates up to the next mark; logs those of the segment before while these run."""
        step, window = self.outcome.step, self.feed.at(self.outcome.step)
        # The last segment may be shorter, and so may the first after a run that was extended.
        count = min(self.length - step % self.length, self.job.steps - step)
        steps = place(self.mesh, np.arange(step, step + count, dtype=np.int32), ALL)
        if count not in self.programs:
            with self._timed("compile"), self.progress.phase("compiling"):
                self.programs[count] = segment.segment.lower(
                    self.algo, self.mesh, window, self.keys, steps, state
                ).compile()
            self._share_signals()
            if self.signal:
                return state
        with self._timed("train"):
            state, metrics = self.programs[count](window, self.keys, steps, state)
        self._flush()
        self.outcome.step += count
        self.pending = (step, metrics)
        return state

    def _flush(self) -> None:
        """Checks and logs the metrics of the segment before the current one."""
        if self.pending is None:
            return
        (first, metrics), self.pending = self.pending, None
        with self._timed("train"):
            values = {name: np.asarray(value) for name, value in fetch(metrics).items()}
        self._check_finite(first, values)
        means = {name: value.mean(axis=0) for name, value in values.items()}
        step = first + len(next(iter(values.values())))
        self.outputs.metrics(step, means)
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
            raise self._diverged(f"{name} is {value} at update {first + k}, {self.job.lanes[s]}")

    def _diverged(self, what: str) -> Diverged:
        self.outputs.wait()
        last = self.outputs.latest()
        kept = "there is no checkpoint before" if last is None else f"the checkpoint of update {last:,} stays"
        return Diverged(f"training stopped: {what}; {kept}; try a smaller --hp.lr, or look at the data")

    def _evaluate(self, state: TrainState) -> None:
        self._flush()
        job, step, state = self.job, self.outcome.step, state.without_memory()
        keys = evaluation_keys(jnp.asarray(self.numbers), step)
        with self._timed("evaluate"), self.progress.phase("evaluating"):
            found = self._diagnose(state, keys)
            if not job.env.spec.tasks:  # data without an environment
                if found:
                    self.outputs.metrics(step, found)
                self.evaluated = step
                return
            result = self._play(state.for_acting(), keys)
        if fault := bad_actions(job.env.spec.tasks, result):
            lane, what = fault
            raise self._diverged(f"after update {step:,} the policy of {job.lanes[lane]} {what}")
        if found := found | overestimation(result):
            self.outputs.metrics(step, found)
        spec = job.env.spec
        rows = self.outputs.evals(Evaluation(step, spec.tasks, result, job.engine, job.data, spec))
        self.evaluated = step
        for warning in warnings_of(rows, "--eval.engine"):
            self.progress.note(warning)
        scores = values(spec, result)
        tasks = dict(zip(spec.tasks, scores.mean(axis=(0, 2)), strict=True))
        self.progress.success(step, scores.mean(axis=(1, 2)), tasks, measure_of(spec))

    def _play(self, state: TrainState, keys: jax.Array) -> Episodes:
        """Evaluates all policies, on the first device of each process."""
        job, here = self.job, jax.local_devices()[0]

        def play(lanes: slice, columns: tuple[int, int] | None) -> Episodes:
            mine = jax.tree.map(lambda x: x[lanes], state) if columns else state
            policies = Policies(self.algo, job.normalizer, jax.device_put(mine, here))
            found = evaluate(policies, job.env, job.episodes, keys[lanes], batch=job.batch, columns=columns)
            return jax.device_get(found)

        if hosts.count() == 1:
            return play(slice(None), None)
        state = fetch(state)
        return evaluate_on_all(play, len(keys), len(job.env.spec.tasks), job.episodes)

    def _diagnose(self, state: TrainState, keys: jax.Array) -> dict[str, Any]:
        """The algorithm's own metrics of each seed, from data that it is not trained on if there is any."""
        # The window of the last update, so that a resumed run sees the same.
        window = self.feed.at(max(self.outcome.step - 1, 0)) if self.held_out is None else self.held_out
        keys = place(self.mesh, keys, SEED)
        return fetch(diagnose(self.algo, self.mesh, window, keys, state))

    def _save_if_due(self, state: TrainState) -> None:
        """Begins to write a checkpoint, or tells the one of this update of the evaluation since."""
        step = self.outcome.step
        due = step >= self.job.steps or bool(self.signal) or self._due(self.job.run.checkpoint_every)
        if due and self.saved != (step, self.evaluated):
            self._save(state)
            self.saved = step, self.evaluated

    def _print_notes(self) -> None:
        for note in self.outputs.notes():
            self.progress.note(note)

    def _save(self, state: TrainState) -> None:
        self._flush()
        finite = fetch(_finite(state.without_memory()))
        if not finite.all():
            lane = self.job.lanes[int(np.argmin(finite))]
            raise self._diverged(f"a weight is not finite after update {self.outcome.step:,}, {lane}")
        with self._timed("checkpoint"):
            self.outputs.save(self.outcome.step, state, self.evaluated)
        self._print_notes()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.outcome.seconds
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began


@eqx.filter_jit
def _finite(state: TrainState) -> jax.Array:
    """Returns whether all of each seed's numbers are finite, [S]."""
    leaves = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x), axis=range(1, x.ndim)) for x in leaves]), axis=0)
