"""The smallest algorithm, and runs of it for tests of the training loop.

Run as a program, it trains while the process is killed again and again (see `survive`).
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import jax.random as jr
from jaxtyping import Array, Float, Int, Key

from mac.algorithm import AbstractAlgorithm, TrainState
from mac.run.io.checkpoint import CheckpointStore
from mac.run.io.logger import EVAL, METRICS
from mac.run.io.run_outputs import CHECKPOINTS
from mac.run.report.progress import Progress
from mac.run.rng_streams import Stream, stream
from mac.run.train import RunConfig, TrainJob, TrainResult, train
from mac.types import Batch, EnvSpec, Metrics, SampleSpec
from tests.helpers import toy_env

SEEDS = (3, 4)
RUN = RunConfig(segment=2, eval_every=8, checkpoint_every=4, keep=2)
SPARSE = RunConfig(segment=2, eval_every=24, checkpoint_every=8, keep=2)  # writing one takes half a second
POISON_STEP = {"": -1, "metric": 6, "weight": 7}  # a weight of update 7 shows in no metric before the save
POISON_SEED = 4


class Walk(AbstractAlgorithm):
    """Three numbers that drift at random; `poison` names what turns NaN in update 6 or 7 of seed 4."""

    env: EnvSpec = eqx.field(static=True, default=toy_env.SPEC)
    size: int = eqx.field(static=True, default=3)
    poison: str = eqx.field(static=True, default="")

    @property
    def sample(self) -> SampleSpec:
        return SampleSpec(batch=4, chunk=2)

    def init(self, key: Key[Array, ""]) -> TrainState:
        named = jr.key_data(key) == jr.key_data(stream(jr.key(POISON_SEED), Stream.INIT))
        number = jnp.where(jnp.all(named), POISON_SEED, 0).astype(jnp.int32)
        return TrainState({"place": jr.normal(key, (self.size,)), "number": number}, None, None)

    def update(
        self, state: TrainState, batch: Batch, step: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[TrainState, Metrics]:
        bad = (step == POISON_STEP[self.poison]) & (state.nets["number"] == POISON_SEED)
        nan = jnp.where(bad, jnp.nan, 0.0)
        place = 0.9 * state.nets["place"] + jr.normal(key, (self.size,)) + jnp.mean(batch.obs)
        loss = jnp.mean(jnp.square(place))
        if self.poison == "metric":
            loss = loss + nan
        if self.poison == "weight":
            place = place + nan
        return TrainState(state.nets | {"place": place}, None, None), {"walk/loss": loss}

    def act(
        self, state: TrainState, obs: Float[Array, "E D"], goal: None, key: Key[Array, ""]
    ) -> Float[Array, "E 1 A"]:
        drift = jnp.broadcast_to(jnp.mean(state.nets["place"]), (len(obs), 1, 2))
        return jnp.tanh(drift + jr.normal(key, drift.shape))


class Silent(Progress):
    """A silent progress display, which calls `hook(what, step)` after `delay` in place of showing."""

    def __init__(self, hook: Any = None, delay: float = 0.0):
        super().__init__("walk", 0, "updates", SEEDS, time.monotonic)
        self.hook, self.delay = hook, delay

    def note(self, text: str) -> None:
        self._tell("note")

    def update(self, done: int, metrics: Any = None) -> None:
        super().update(done, metrics)
        time.sleep(self.delay)
        self._tell("update")

    def _changed(self, important: bool = False) -> None:
        if self.doing or important:
            self._tell(self.doing or "success")

    def __exit__(self, *_: object) -> None:
        pass

    def _tell(self, what: str) -> None:
        if self.hook:
            self.hook(what, self.meter.done)


def make_job(steps: int = 12, **changes: Any) -> TrainJob:
    """Seeds 3 and 4: segments of 2, checkpoints at 4, 8, ..., evaluations at 8, ... and the end."""
    job = TrainJob(
        algo=Walk(),
        env=toy_env.PointEnv(),
        window=toy_env.window(),
        normalizer=toy_env.identity(),
        seed=SEEDS[0],
        seeds=len(SEEDS),
        steps=steps,
        episodes=2,
        run=RUN,
        engine="toy",
        config={"hp": {"batch": 4}, "steps": steps},
        may_differ=("steps",),
    )
    return job._replace(**changes)


def run(
    job: TrainJob, folder: Path, *, resume: bool = False, hook: Any = None, delay: float = 0.0
) -> TrainResult:
    """Trains; `hook` and `delay` are those of `Silent`."""
    return train(job, folder, Silent(hook, delay), resume=resume)


def result(folder: Path) -> dict[str, Any]:
    """Returns all results of a run: rows, and step and checksums of the newest checkpoint."""
    with CheckpointStore(folder / CHECKPOINTS) as store:
        header = store._header(None)
    rows = {name: (folder / name).read_bytes() for name in (METRICS, EVAL)}
    return {"step": header["step"], "arrays": header["arrays"], "meta": header["meta"], **rows}


def survive(folder: Path, steps: int, kills: int, seed: int) -> None:
    """Trains in `folder`, killed with SIGKILL at `kills` random moments and resumed each time.

    The processes are forks of this one, made before JAX starts, so that none has to import it anew.
    """
    rng = random.Random(seed)
    targets = [round(steps * (i + rng.uniform(0.2, 0.8)) / (kills + 1)) for i in range(kills)]
    for attempt, target in enumerate([*targets, None]):
        child = os.fork()
        if child == 0:
            run(make_job(steps, run=SPARSE), folder, resume=attempt > 0, delay=0.05)
            os._exit(0)
        if target is not None:
            while reached(folder) < target:
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))  # anywhere within two segments
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status != (0 if target is None else signal.SIGKILL):
            sys.exit(f"attempt {attempt} ended with status {status}")


def reached(folder: Path) -> int:
    """Step of the last metrics row that is complete."""
    try:
        return json.loads((folder / METRICS).read_bytes().rsplit(b"\n", 2)[-2])["step"]
    except (OSError, IndexError):
        return 0


if __name__ == "__main__":
    import orbax.checkpoint  # noqa: F401 - once here rather than in every fork

    survive(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
