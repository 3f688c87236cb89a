"""A training of an expert as files: what it is, how far it has got, how it went, and the policy.

- `expert.json`: task, settings, seed, engine, versions;
- `curve.csv`: how well it did as it learnt;
- `checkpoints/`: to go on from, with the replay buffer;
- `policy.eqx`: the policy, as of the last checkpoint.
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

from envs_mjx.datagen.dataset_spec import versions
from experiments.benchmarks.harness import write_csv
from experiments.experts.online_training import OnlineConfig, StepStats, Training, begin, play, run
from experiments.experts.sac import SacConfig
from experiments.experts.tasks import GYM, AbstractExpertTask, DirectedPolicy, build_errand
from mac.atomic_files import read_json, replace_file, write_json
from mac.errors import UserError
from mac.nn.gaussian_policy import GaussianPolicy
from mac.run.io.checkpoint import CheckpointStore

EXPERT, CURVE, POLICY = "expert.json", "curve.csv", "policy.eqx"
EVALUATION_LANES = 8
_REPORTS = 20
"""Lines of the curve, about."""


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """Settings of an expert's training: everything that the result depends on.

    Attributes:
        task: a name in `tasks.ERRANDS`.
    """

    task: str
    seed: int
    engine: str
    online: OnlineConfig
    sac: SacConfig

    @property
    def settings(self) -> dict[str, Any]:
        """As JSON gives it back."""
        sac = self.sac._asdict() | {"hidden": list(self.sac.hidden)}
        parts = {"online": self.online._asdict(), "sac": sac}
        return {"task": self.task, "seed": self.seed, "engine": self.engine, **parts, "versions": versions()}

    def stop_after(self, done: int) -> int:
        """Iterations done when the curve gets its next line."""
        stretch = max(self.online.iterations // _REPORTS, 1)
        return min((done // stretch + 1) * stretch, self.online.iterations)


@dataclasses.dataclass(frozen=True)
class ExpertScore:
    """A line of the curve.

    Attributes:
        env_steps: control steps, all lanes together.
        updates: updates of the critics.
        seconds: spent training so far.
        reward: mean reward of a step since the last line, with the noise of exploration.
        falls: per 1000 steps, likewise.
        score: of the policy's means: speed along the direction (m/s), or a gym walker's return.
        score_falls: falls per 1000 steps of the policy's means.
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


def score(errand: AbstractExpertTask, policy: GaussianPolicy, seed: int) -> tuple[float, float]:
    """How well the means of a policy do, and falls per 1000 steps: mean speed (m/s) in 300 steps, or of a
    gym walker the mean return of one episode."""
    steps = 1000 if errand.name in GYM else 300
    seen = play(errand, policy, jnp.asarray(seed), EVALUATION_LANES, steps, False)
    reward, mask = np.asarray(seen.reward), np.asarray(seen.mask)
    falls = 1000 * float(1 - mask.mean())
    if errand.name in GYM:
        alive = np.cumprod(np.concatenate([np.ones_like(mask[:1]), mask[:-1]]), axis=0)
        return float((reward * alive).sum(axis=0).mean()), falls
    ahead = reward if errand.name == "ant" else np.asarray(seen.obs[..., 37])
    return float(ahead.mean() / (errand.control_dt if errand.name == "ant" else 1.0)), falls


def train(
    plan: ExpertConfig,
    folder: Path,
    command: Sequence[str],
    tell: Callable[[ExpertScore | None, int], None],
    stop: Callable[[], bool],
) -> bool:
    """Trains what `plan` says, or goes on where an earlier process was; True if it is finished.

    Args:
        folder: of the files; must exist.
        command: what the curve says that it was made by.
        tell: called with each new line of the curve, and the iterations done.
        stop: asked now and then; the training then saves itself and ends.
    Raises:
        UserError: the folder holds another training, or cannot be written.
    """
    check_plan(folder, plan)
    write_json(folder / EXPERT, plan.settings)
    cfg, sac, errand = plan.online, plan.sac, build_errand(plan.task, plan.engine)
    seed = jnp.asarray(plan.seed)
    with CheckpointStore(folder / "checkpoints", keep=1) as store:
        state, done, points, before = begin(cfg, sac, errand, seed), 0, [], 0.0
        if store.latest() is not None:
            saved = store.restore(jax.eval_shape(lambda: state), config=plan.settings)
            state, done = saved.state, saved.step
            points = [ExpertScore(*line) for line in saved.meta["points"]]
            before = points[-1].seconds if points else 0.0
            tell(None, done)
        clock = time.monotonic()
        while done < cfg.iterations:
            learn = done >= cfg.random
            until = plan.stop_after(done) if learn else cfg.random
            state, signs = run(cfg, sac, errand, state, seed, jnp.asarray(done), until - done, learn)
            done = until
            if learn:
                points.append(_point(plan, errand, state, done, signs, before + time.monotonic() - clock))
                write_csv(folder / CURVE, points, command)
                tell(points[-1], done)
            if stop() or done >= cfg.iterations or len(points) % 5 == 0:
                meta = {"config": plan.settings, "points": [dataclasses.astuple(point) for point in points]}
                store.save(done, state, meta)
                replace_file(
                    folder / POLICY, functools.partial(eqx.tree_serialise_leaves, pytree=state.learner.policy)
                )
            if stop():
                break
    return done >= cfg.iterations


def _point(
    plan: ExpertConfig,
    errand: AbstractExpertTask,
    state: Training,
    done: int,
    signs: StepStats,
    seconds: float,
) -> ExpertScore:
    well, falls = score(errand, state.learner.policy, plan.seed)
    learnt = max(done - plan.online.random, 0) * plan.online.critic_updates
    return ExpertScore(
        done * plan.online.lanes,
        learnt,
        round(seconds, 1),
        float(signs.reward),
        1000 * float(signs.falls),
        well,
        falls,
        float(signs.metrics["actor/temperature"]),
    )


def check_plan(folder: Path, plan: ExpertConfig) -> None:
    """Makes sure that a folder is empty, or holds this very training.

    Raises:
        UserError: it holds another.
    """
    if (folder / EXPERT).exists():
        old = read_json(folder / EXPERT)
        for name, value in plan.settings.items():
            if old.get(name) != value:
                raise UserError(
                    f"{folder} holds an expert with {name}={old.get(name)}, asked is {name}={value}; choose "
                    "another --out"
                )


def load_policy(folder: Path) -> tuple[str, GaussianPolicy, str]:
    """The policy of a finished training: its task, its networks, and the checksum of its file.

    Raises:
        UserError: there is none in `folder`, or it is damaged.
    """
    if not (folder / POLICY).exists():
        raise UserError(
            f"{folder}: no trained expert here; train one with python experiments/train_expert.py"
        )
    settings, data = read_json(folder / EXPERT), (folder / POLICY).read_bytes()
    errand = build_errand(settings["task"])
    shape = eqx.filter_eval_shape(
        GaussianPolicy, [errand.obs_dim], settings["sac"]["hidden"], errand.action_dim, key=jr.key(0)
    )
    try:
        policy = eqx.tree_deserialise_leaves(io.BytesIO(data), shape)
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(f"{folder / POLICY} is damaged; train the expert again") from error
    return settings["task"], policy, hashlib.sha256(data).hexdigest()


def load_actor(folder: Path, body: str) -> tuple[DirectedPolicy, str]:
    """An expert for mazes, and its checksum.

    Raises:
        UserError: there is none in `folder`, or it walks in another body.
    """
    task, policy, checksum = load_policy(folder)
    if task != body:
        raise UserError(f"--expert={folder} was trained for {task}; this dataset needs one for {body}")
    return DirectedPolicy(policy, body), checksum
