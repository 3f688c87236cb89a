"""Trains an offline RL algorithm on all seeds at once: `python experiments/run.py --seeds 4`."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from baselines import REGISTRY
from envs_mjx.collect import collect
from envs_mjx.registry import make, parse, resolve_engine
from experiments import dataset, plan
from experiments.settings import Settings
from experiments.settings import parse as parse_settings
from mac.data.normalize import fit_minmax
from mac.data.store import Store
from mac.data.window import make_window
from mac.errors import UserError
from mac.run.logger import EVAL, METRICS, read_rows
from mac.run.meter import duration
from mac.run.plot import plot_learning_curve
from mac.run.progress import open_progress
from mac.run.record import cores, cpu_model, record_launch
from mac.run.stats import learning_curve
from mac.run.table import results_table
from mac.run.train import Job, Outcome, train

MAY_DIFFER = ("steps", "preset", "run.segment", "run.eval_every", "run.checkpoint_every", "run.keep")
MAY_DIFFER += ("eval.episodes", "eval.engine", "data.path", "data.dir")
PICTURE = "learning_curve.png"


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status."""
    try:
        settings, reason = parse_settings(argv)
        return run(settings, reason)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        return 130


def run(settings: Settings[Any], reason: str) -> int:
    """Does what the settings say; returns the exit status."""
    entry = REGISTRY[settings.algo]
    engine = resolve_engine(settings.eval.engine)
    env = make(settings.env, engine)
    algo = entry.algorithm(settings.hp, env.spec, settings.steps)
    source, found = dataset.locate(settings.data, settings.env)
    folder = settings.out or default_folder(settings)
    sizes = plan.make_plan(algo, env.spec, settings.data.rows, settings.seeds)
    announce(settings, reason, engine, source, found, folder, sizes, env.spec)
    if settings.dry_run:
        for line in plan.describe(sizes, algo, env.spec, settings.data.rows, settings.seeds):
            print(line)
        return 0
    if (folder / "config.json").exists() and not settings.resume:
        raise UserError(f"{folder} holds a run already; add --resume to continue it, or choose another --out")
    dataset.check_writable(folder, "--out")
    if not found:
        dataset.check_writable(settings.data.dir, "--data.dir")
        generate(settings, source)
    store = dataset.open_store(settings.data, source, env.spec)
    for note in store.notes:
        print(f"note: {note}")
    job = make_job(settings, algo, env, engine, store)
    record_launch(folder, settings.plain())
    with open_progress(f"{settings.algo} on {settings.env}", job.steps, "updates", seeds=job.numbers) as progress:
        outcome = train(job, folder, progress, resume=settings.resume)
    return finish(settings, folder, outcome)


def default_folder(settings: Settings[Any]) -> Path:
    """A new folder under runs/, named after what runs in it and when it started."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{settings.algo}_{settings.env}_{settings.preset}_{stamp}"


def announce(
    settings: Settings[Any],
    reason: str,
    engine: str,
    source: Path,
    found: bool,
    folder: Path,
    sizes: plan.Plan,
    spec: Any,
) -> None:
    """Says in a few lines what will happen."""
    first, last = settings.seed, settings.seed + settings.seeds - 1
    device = jax.devices()[0]
    where = f"{cpu_model()}, {cores()} cores" if device.platform == "cpu" else device.device_kind
    evaluations = -(-settings.steps // settings.run.eval_every)
    episodes = settings.seeds * settings.eval.episodes * len(spec.tasks)
    parts = {
        "data": 0.0 if found else plan.seconds_to_collect(round(1.1 * settings.data.rows)),
        "training": plan.seconds_to_train(sizes, settings.steps * settings.seeds),
        "evaluation": plan.seconds_to_evaluate(evaluations, episodes, spec),
    }
    made = "found" if found else f"will be generated: {settings.data.rows:,} rows by OGBench's scripted expert"
    print(f"algorithm    {REGISTRY[settings.algo].title}")
    print(f"environment  {settings.env}, evaluated on engine {engine}")
    print(f"preset       {settings.preset} ({reason})")
    print(f"device       {where}")
    print(f"seeds        {settings.seeds} ({first} to {last}), {settings.steps:,} updates each")
    print(f"data         {source} ({made})")
    print(f"results      {folder}")
    print(f"time         {plan.describe_time(parts)}")


def generate(settings: Settings[Any], path: Path) -> None:
    """Makes the dataset; nothing is left if it is interrupted."""
    name = parse(settings.env).dataset
    with open_progress(f"generating {name}", settings.data.rows, "rows") as progress:
        made = collect(name, settings.data.rows, path, seed=settings.data.seed, progress=progress.count)
    print(f"expert hit   {made.hits} of {made.targets} targets; wrote {path}")


def make_job(settings: Settings[Any], algo: Any, env: Any, engine: str, store: Store) -> Job:
    """Loads the data onto the device and gathers what training needs."""
    normalizer = fit_minmax(store.statistics_obs)
    task = parse(settings.env).task
    window = make_window(store, normalizer, algo.sample.chunk, lambda obs: env.relabel(obs, task))
    return Job(
        algo=algo,
        env=env,
        window=window,
        normalizer=normalizer,
        seed=settings.seed,
        seeds=settings.seeds,
        steps=settings.steps,
        episodes=settings.eval.episodes,
        run=settings.run,
        engine=engine,
        config=settings.plain(),
        # A learning rate that cools down is a function of the run's length.
        may_differ=MAY_DIFFER[settings.hp.cooldown > 0 :],
    )


def finish(settings: Settings[Any], folder: Path, outcome: Outcome) -> int:
    """Prints the table and the paths, and draws the picture; returns the exit status."""
    console = Console()
    if outcome.interrupted:
        print(f"stopped at update {outcome.step:,}; a checkpoint is written. Continue with:")
        print(f"  python experiments/run.py --out {folder} --resume")
        return 128 + outcome.interrupted
    rows = list(read_rows(folder / EVAL))
    title = f"{settings.algo} on {settings.env}"
    console.print(results_table(learning_curve(rows), title=title))
    plot_learning_curve(rows, folder / PICTURE, title=title)
    spent = ", ".join(f"{name} {duration(seconds)}" for name, seconds in outcome.seconds.items())
    print(f"finished at update {outcome.step:,}" + (f" ({spent})" if spent else ": nothing was left to do"))
    for name in (PICTURE, EVAL, METRICS, "config.json", "checkpoints"):
        print(f"  {folder / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
