"""Resumable training of an expert, and its files.

- `expert.json`: task, settings, seed, engine, versions;
- `curve.csv`: learning curve;
- `checkpoints/`: training states, with the replay buffer;
- `policy.eqx`: the policy of the last checkpoint.
"""

import dataclasses
import functools
import hashlib
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from envs_mjx.datagen.dataset_spec import generation_versions
from experiments.benchmarks.harness import write_csv
from experiments.expert_training.online_training import (
    OnlineConfig,
    StepStats,
    Training,
    initial_state,
    rollout_policy,
    run_iterations,
)
from experiments.expert_training.sac import SacConfig
from experiments.expert_training.tasks import GYM, AbstractExpertTask, DirectedPolicy, build_task
from mac.atomic_files import read_json, replace_file, write_json
from mac.errors import UserError
from mac.nn.gaussian_policy import GaussianPolicy
from mac.run.io.checkpoint import CheckpointStore

EXPERT, CURVE, POLICY = "expert.json", "curve.csv", "policy.eqx"
EVALUATION_LANES = 8
_REPORTS = 20
"""Approximate number of lines in the learning curve."""


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Settings of an expert's training, which determine its result.

    Attributes:
        task: a name in `tasks.TASKS`.
    """

    task: str
    seed: int
    engine: str
    online: OnlineConfig
    sac: SacConfig

    @property
    def settings(self) -> dict[str, Any]:
        """Returns the settings as plain JSON data."""
        sac = self.sac._asdict() | {"hidden": list(self.sac.hidden)}
        parts = {"online": self.online._asdict(), "sac": sac}
        return {
            "task": self.task,
            "seed": self.seed,
            "engine": self.engine,
            **parts,
            "versions": generation_versions(),
        }

    def stop_after(self, done: int) -> int:
        """Returns the number of iterations at the next line of the learning curve."""
        stretch = max(self.online.iterations // _REPORTS, 1)
        return min((done // stretch + 1) * stretch, self.online.iterations)


@dataclasses.dataclass(frozen=True)
class ExpertScore:
    """A line of the learning curve.

    Attributes:
        env_steps: control steps, all lanes together.
        updates: updates of the critics.
        seconds: training time so far.
        reward: mean reward of a step since the last line, with exploration noise.
        falls: terminations per 1000 steps since the last line, with exploration noise.
        score: speed along the direction (m/s) or return of a gym walker, without noise.
        score_falls: terminations per 1000 steps, without noise.
        temperature: weight of entropy.
    """

    env_steps: int
    updates: int
    seconds: float
    reward: float
    falls: float
    score: float
    score_falls: float
    temperature: float


def score(task: AbstractExpertTask, policy: GaussianPolicy, seed: int) -> tuple[float, float]:
    """Evaluates the means of a policy; returns its score, and its terminations per 1000 steps.

    The score is the mean speed (m/s) in 300 steps, or a gym walker's mean return of one episode.
    """
    steps = 1000 if task.name in GYM else 300
    transitions = rollout_policy(task, policy, jnp.asarray(seed), EVALUATION_LANES, steps, False)
    reward, mask = np.asarray(transitions.reward), np.asarray(transitions.mask)
    falls = 1000 * float(1 - mask.mean())
    if task.name in GYM:
        alive = np.cumprod(np.concatenate([np.ones_like(mask[:1]), mask[:-1]]), axis=0)
        return float((reward * alive).sum(axis=0).mean()), falls
    ahead = reward if task.name == "ant" else np.asarray(transitions.obs[..., 37])
    return float(ahead.mean() / (task.control_dt if task.name == "ant" else 1.0)), falls


def train_expert(
    config: ExpertConfig,
    folder: Path,
    command: Sequence[str],
    tell: Callable[[ExpertScore | None, int], None],
    stop: Callable[[], bool],
) -> bool:
    """Trains an expert, or continues an earlier training; returns whether it is finished.

    Args:
        folder: folder of the files; must exist.
        command: command line, recorded in the learning curve.
        tell: called with each new line of the learning curve, and the number of iterations done.
        stop: called regularly; if it returns True, the training saves its state and ends.
    Raises:
        UserError: the folder holds another training, or cannot be written.
    """
    check_expert_config(folder, config)
    write_json(folder / EXPERT, config.settings)
    cfg, sac, task = config.online, config.sac, build_task(config.task, config.engine)
    seed = jnp.asarray(config.seed)
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        state, done, points, before = initial_state(cfg, sac, task, seed), 0, [], 0.0
        if store.latest() is not None:
            saved = store.restore(jax.eval_shape(lambda: state), config=config.settings)
            state, done = saved.state, saved.step
            points = [ExpertScore(*line) for line in saved.meta["points"]]
            before = points[-1].seconds if points else 0.0
            tell(None, done)
        clock = time.monotonic()
        while done < cfg.iterations:
            learn = done >= cfg.random
            until = config.stop_after(done) if learn else cfg.random
            state, stats = run_iterations(cfg, sac, task, state, seed, jnp.asarray(done), until - done, learn)
            done = until
            if learn:
                points.append(_point(config, task, state, done, stats, before + time.monotonic() - clock))
                write_csv(folder / CURVE, points, command)
                tell(points[-1], done)
            if stop() or done >= cfg.iterations or len(points) % 5 == 0:
                meta = {"config": config.settings, "points": [dataclasses.astuple(point) for point in points]}
                store.save(done, state, meta)
                replace_file(
                    folder / POLICY, functools.partial(eqx.tree_serialise_leaves, pytree=state.learner.policy)
                )
            if stop():
                break
    return done >= cfg.iterations


def _point(
    config: ExpertConfig,
    task: AbstractExpertTask,
    state: Training,
    done: int,
    stats: StepStats,
    seconds: float,
) -> ExpertScore:
    value, falls = score(task, state.learner.policy, config.seed)
    updates = max(done - config.online.random, 0) * config.online.critic_updates
    return ExpertScore(
        done * config.online.lanes,
        updates,
        round(seconds, 1),
        float(stats.reward),
        1000 * float(stats.falls),
        value,
        falls,
        float(stats.metrics["actor/temperature"]),
    )


def check_expert_config(folder: Path, config: ExpertConfig) -> None:
    """Checks that a folder holds no training, or this one.

    Raises:
        UserError: it holds another training.
    """
    if (folder / EXPERT).exists():
        old = read_json(folder / EXPERT)
        for name, value in config.settings.items():
            if old.get(name) != value:
                raise UserError(
                    f"{folder} holds an expert with {name}={old.get(name)}, expected {name}={value}; choose "
                    "another --out"
                )


def load_policy(folder: Path) -> tuple[str, GaussianPolicy, str]:
    """Loads the policy of a training; returns its task, its networks, and the checksum of its file.

    Raises:
        UserError: `folder` holds no policy, or a damaged one.
    """
    if not (folder / POLICY).exists():
        raise UserError(
            f"{folder}: no trained expert found; train one with python experiments/train_expert.py"
        )
    settings, data = read_json(folder / EXPERT), (folder / POLICY).read_bytes()
    task = build_task(settings["task"])
    shape = eqx.filter_eval_shape(
        GaussianPolicy, [task.obs_dim], settings["sac"]["hidden"], task.action_dim, key=jr.key(0)
    )
    try:
        policy = eqx.tree_deserialise_leaves(io.BytesIO(data), shape)
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{folder / POLICY} is damaged; train the expert again") from error
    return settings["task"], policy, hashlib.sha256(data).hexdigest()


def load_actor(folder: Path, body: str) -> tuple[DirectedPolicy, str]:
    """Loads an expert for mazes, and its checksum.

    Raises:
        UserError: `folder` holds no expert, or one of another body.
    """
    task, policy, checksum = load_policy(folder)
    if task != body:
        raise UserError(f"--expert={folder} was trained for {task}; this dataset needs one for {body}")
    return DirectedPolicy(policy, body), checksum
