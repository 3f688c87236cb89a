"""Evaluates a saved run again, on any engine: `python experiments/evaluate.py RUN --engine ogbench`."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import tyro

from baselines.random_policy import UniformPolicy
from envs_mjx.action_noise import check_sigma, with_action_noise
from envs_mjx.registry import TaskId, make
from experiments.cli.arguments import read_flags, start_jax
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.launch.saved_run import (
    EVALUATIONS,
    RANDOM,
    SavedRun,
    by_environment,
    data_label,
    evaluation_engine,
    evaluation_noise,
    open_run,
    require_environment,
    with_acting_hparams,
)
from experiments.launch.settings import read_settings
from experiments.ogbench_eval.evaluation import play_official
from mac.errors import UserError
from mac.formatting import counted
from mac.run.evaluate import evaluate, evaluation_keys
from mac.run.io.eval_rows import Evaluation, eval_rows, warnings_of
from mac.run.io.logger import EVAL, append_row, check_appendable, read_rows
from mac.run.io.run_metadata import run_provenance
from mac.run.report.progress import open_progress
from mac.run.report.score import measure_of
from mac.run.report.stats import check_rows, learning_curve
from mac.run.report.table import print_tables, results_table
from mac.run.report.timing import duration
from mac.types import Episodes

PROGRAM = "python experiments/evaluate.py"
Engine = Literal["auto", "c", "mjx", "warp", "ogbench"]


@dataclass(frozen=True)
class Args:
    """Evaluates the policies of a run again: on a physics engine, or in the real ogbench environment."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of the run; a line is added to its evaluations.jsonl and nothing else changes"""
    out: Path | None = None
    """file of rows that the line is added to instead, where the run's folder may only be read"""
    engine: Engine = "auto"
    """physics: `c`, `mjx` or `warp` as in training (auto = the best one here), or the original `ogbench`"""
    episodes: int | None = None
    """episodes per task and seed; None = as many as in the run's own evaluations"""
    tasks: tuple[int, ...] = ()
    """tasks to play, 1 to 5; none = those of the run's environment"""
    step: int | None = None
    """update whose checkpoint is evaluated; None = the newest"""
    batch: int = 0
    """most environments simulated at a time; 0 = all (of ogbench's: a few per core)"""
    hp: tuple[str, ...] = ()
    """acts with other hyperparameters than in training, NAME=VALUE each: `candidates_test=1` shows the cloned
    behaviour without best-of-N selection"""
    policy: Literal["trained", "random"] = "trained"
    """`random` plays uniform random actions in the same episodes instead: what any policy must beat"""
    noise: float | None = None
    """standard deviation of noise on every executed action; None = that of the run's own evaluations"""
    seed: int = 0
    """which episodes are played: 0 = those of the run's own evaluation after that update, else others"""

    def __post_init__(self):
        low = {"episodes": 1, "step": 0, "batch": 0, "seed": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and not least <= value < 2**31:
                raise UserError(f"--{name}={value}: must be at least {least}, and below 2**31")
        if self.noise is not None:
            check_sigma("--noise", self.noise)
        if self.policy == RANDOM and self.hp:
            raise UserError("--hp says how the trained policies act; leave it out with --policy random")


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: evaluate_again(read_flags(Args, argv, PROGRAM)),
        short_of_memory="simulate fewer environments at a time with --batch",
        interrupted="the run is as it was",
    )


def evaluate_again(ask: Args) -> int:
    """Does what the flags say; returns the exit status."""
    ignore_write_errors()
    settings = with_acting_hparams(read_settings(ask.run), ask.hp)
    out, label = ask.out or ask.run / EVALUATIONS, data_label(ask.run)
    require_environment(settings.task_id)
    games = by_environment(settings.task_id, ask.tasks, "--tasks")
    start_jax(1)
    engine = evaluation_engine(settings.task_id, ask.engine)
    noise = evaluation_noise(settings, ask.noise, engine)
    run = open_run(ask.run, ask.step, settings)
    check_appendable(out, "--out")
    if ask.policy == RANDOM:
        run = at_random(run)
    episodes = ask.episodes or settings.eval.episodes
    tasks = [task for _, each in games for task in each]
    learnt = "" if ask.policy == RANDOM else f" after {run.step:,} updates"
    print(f"policies     {title(run)}: {counted(len(run.numbers), 'seed')}{learnt}, from {ask.run}")
    print(
        f"environment  engine {engine}, {'tasks' if len(tasks) > 1 else 'task'} {', '.join(map(str, tasks))}"
        + (f", noise {noise:g} on executed actions" if noise else "")
    )
    print(
        f"episodes     {episodes} per task and seed, {episodes * len(tasks) * len(run.numbers):,} in all",
        flush=True,
    )
    began, facts = time.perf_counter(), run_provenance()
    step = 0 if ask.policy == RANDOM else run.step  # random actions have learnt nothing
    rows: list[dict[str, Any]] = []
    for env, each in games:
        result = play_episodes(run, env, each, engine, episodes, ask, noise)
        spec = run.algo.env
        rows += eval_rows(Evaluation(step, each, result, engine, label, spec), run.numbers)
    seconds = time.perf_counter() - began
    print_results(run, rows, engine, seconds)
    asked = {"engine": engine, "env": settings.env, "tasks": tasks, "step": run.step, "episodes": episodes}
    asked |= {"noise": noise} if noise else {}
    asked |= {"policy": ask.policy, "seed": ask.seed, "hp": ask.hp, "batch": ask.batch}
    append_row(out, asked | {"seconds": round(seconds, 2)} | facts | {"rows": rows})
    print(f"  {out}")
    return 0


def at_random(run: SavedRun) -> SavedRun:
    """The run with uniform random actions in place of its policies."""
    algo = UniformPolicy(run.algo.env)
    return run._replace(algo=algo, state=algo.init(jax.random.key(0)))


def title(run: SavedRun) -> str:
    """Title of the evaluated policies."""
    return f"random actions on {run.settings.env}" if isinstance(run.algo, UniformPolicy) else run.title


def play_episodes(
    run: SavedRun,
    task_id: TaskId,
    tasks: tuple[int, ...],
    engine: str,
    episodes: int,
    ask: Args,
    noise: float,
) -> Episodes:
    """Evaluates the run's policies in an environment; `noise` disturbs their actions."""
    keys = evaluation_keys(jnp.asarray(run.numbers), run.step, ask.seed)
    if engine == "ogbench":
        name, total = task_id.name, len(run.numbers) * len(tasks) * episodes
        with open_progress(f"ogbench {name}", total, "episodes") as progress:
            return play_official(run, name, tasks, episodes, keys, batch=ask.batch, report=progress.update)
    env = with_action_noise(make(task_id, engine), noise)
    result = evaluate(run.policies, env, episodes, keys, batch=ask.batch, tasks=tasks)
    return jax.device_get(result)


def in_training(run: SavedRun, tasks: set[int]) -> list[dict[str, Any]]:
    """Returns training's own rows of this checkpoint and tasks; none, with a note, if they are damaged."""
    path = run.folder / EVAL
    if not path.exists():
        return []
    try:
        rows = list(read_rows(path))
        check_rows(rows, str(path), measure_of(run.algo.env))
    except UserError as error:
        print(f"note         no comparison with the evaluation in training: {error}")
        return []
    same = (row for row in rows if row["step"] == run.step and row["task"] in tasks)
    return list({(row["seed"], row["task"]): row for row in same}.values())


def print_results(run: SavedRun, rows: list[dict[str, Any]], engine: str, seconds: float) -> None:
    """Prints the table, and what the run's own evaluation of that checkpoint said."""
    for warning in warnings_of(rows, "--engine"):
        print(warning)
    print_tables(results_table(learning_curve(rows), title=f"{title(run)}, engine {engine}"))
    measure = measure_of(run.algo.env)
    before = in_training(run, {row["task"] for row in rows})
    if before:
        mean = sum(row[measure.name] for row in before) / len(before)
        how = sorted({f"engine {row.get('engine')}, {row['episodes']} per task and seed" for row in before})
        print(f"in training  {mean:{measure.form}} after {run.step:,} updates ({'; '.join(how)})")
    print(f"finished     in {duration(seconds)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
