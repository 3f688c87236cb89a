"""Measures the growth of model error along a trajectory, by chunk length.

    python experiments/model_error.py --env puzzle-3x3 --chunks 1 5 10 25 --out results/
    python experiments/model_error.py --steps 0 --policy runs/A runs/B     # success against error

Figures 2 and 8 of the paper (Park et al. 2025): models of every chunk length train on the same data,
then run open loop along the same held-out trajectories.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
from rich.table import Table

from envs_mjx.data_only import is_data_only
from envs_mjx.registry import make, parse
from experiments.benchmarks.harness import write_csv
from experiments.cli import arguments
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.generate_data import dataset_name
from experiments.launch import dataset
from experiments.launch.settings import DataConfig, read_settings
from experiments.model_error_study.figures import draw_chunks
from experiments.model_error_study.open_loop import (
    Errors,
    check_horizon,
    held_out,
    open_loop_errors,
    over_episodes,
    over_seeds,
)
from experiments.model_error_study.rows import ChunkRow
from experiments.model_error_study.success_by_error import compare_policies
from experiments.model_error_study.successors import compare_successors
from experiments.model_error_study.wall_contacts import compare_walls, maze_of
from mac.ablations.dynamics_only import Dynamics
from mac.config import Config, DynamicsKind
from mac.data.normalize import Normalizer, fit_normalizer
from mac.data.store import Store
from mac.data.window import check_chunk, make_window
from mac.errors import UserError
from mac.formatting import counted
from mac.nn.mlp import MLP
from mac.run.mesh import ALL, SEED, place, seed_keys, seed_mesh
from mac.run.report.progress import Progress, open_progress
from mac.run.report.table import print_tables
from mac.run.segment import init, segment
from mac.run.train import Diverged
from mac.types import EnvSpec

PROGRAM = "python experiments/model_error.py"
SEGMENT = 500  # updates per compiled call


@dataclass(frozen=True)
class DatasetLocation:
    """Settings of the dataset's location."""

    path: Path | None = None
    """an OGBench .npz file, a folder of shards, or convert_data.py's store; None = search"""
    dir: Path = Path("data")
    """folder for converted stores; also searched, as is ~/.ogbench/data"""
    rows: int = 1_001_000
    """training states of the generated dataset to search for"""


@dataclass(frozen=True)
class Args:
    """Trains dynamics models of several chunk lengths, and measures the growth of their errors along held-out
    trajectories; writes a table and a figure."""

    env: str = "puzzle-3x3-play-v0"
    """OGBench dataset name or family, of which a task is ignored; or data-only, with --data.path"""
    chunks: tuple[int, ...] = (1, 5, 10, 25)
    """chunk lengths, actions per prediction"""
    steps: int = 20_000
    """updates of each model; 0 = train none, with --policy"""
    seeds: int = 4
    """models of each chunk length, trained together"""
    seed: int = 0
    """first seed; also the seed of the held-out trajectories"""
    hidden: tuple[int, ...] = (256, 256, 256, 256)
    """width of each hidden layer"""
    batch: int = 256
    """chunks per update"""
    lr: float = 3e-4
    """learning rate of Adam"""
    cooldown: float = 0.0
    """share of the updates, at the end, over which the learning rate decreases linearly to 0; in [0, 1]"""
    horizon: int = 100
    """environment steps that models run open loop; a multiple of every chunk length"""
    trajectories: int = 512
    """held-out trajectories, the same for all models"""
    dynamics: DynamicsKind = "deterministic"
    """what the models predict, as --hp.dynamics; one draw of a model that draws its states is measured"""
    policy: tuple[Path, ...] = ()
    """folders of runs whose success is plotted against their models' errors"""
    successors: int = 0
    """with --policy: compares so many draws of each chunk's end with as many repetitions in the simulator,
    at teleporters and elsewhere; 0 = no"""
    contexts: int = 32
    """chunks at each of these places"""
    walls: bool = False
    """with --policy: compares trajectories that touch a wall of the maze with those that touch none"""
    out: Path = Path("model_error")
    """folder of model_error.csv and .png, of success.csv and .png, of successors.csv and of walls.csv"""
    data: DatasetLocation = field(default_factory=DatasetLocation)

    def __post_init__(self):
        for flag, wanted in (("--walls", self.walls), (f"--successors={self.successors}", self.successors)):
            if wanted and not self.policy:
                raise UserError(f"{flag}: name runs in mazes with --policy")
        if len({folder.resolve() for folder in self.policy}) < len(self.policy):
            raise UserError("--policy: name each run once")
        low = {"seeds": 1, "seed": 0, "batch": 1, "trajectories": 1, "horizon": 1, "contexts": 1}
        low["successors"] = 2 if self.successors else 0
        low["steps"] = 0 if self.policy else 1
        for name, least in low.items():
            if not least <= getattr(self, name) < 2**31:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}, and below 2**31")
        if len(set(self.chunks)) < len(self.chunks):
            raise UserError(f"--chunks={self.chunks}: name each chunk length once")
        for name in ("chunks", "hidden"):
            if min(getattr(self, name), default=0) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: give at least one number, each at least 1")
        if not 0 < self.lr < math.inf:
            raise UserError(f"--lr={self.lr}: must be positive and finite")
        if not 0 <= self.cooldown <= 1:
            raise UserError(f"--cooldown={self.cooldown}: must be in [0, 1]")

    def algorithm(self, env: EnvSpec, chunk: int) -> Dynamics:
        """Returns the algorithm that trains the models of one chunk length."""
        sizes = {"chunk": chunk, "batch": self.batch, "hidden": self.hidden}
        cfg = Config(**sizes, lr=self.lr, cooldown=self.cooldown, dynamics=self.dynamics)
        return Dynamics(cfg, env, self.steps)


def main(argv: Sequence[str]) -> int:
    """Runs the command line; returns the exit status: 0, 1 diverged, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: study(arguments.read_flags(Args, argv, PROGRAM, Args()), argv),
        short_of_memory="take fewer --seeds, --trajectories or a smaller --batch",
        interrupted="results of finished chunk lengths are in --out",
    )


def study(args: Args, argv: Sequence[str]) -> int:
    """Runs the study that the flags describe; returns the exit status."""
    ignore_write_errors()
    command = ["experiments/model_error.py", *argv]
    alone = is_data_only(args.env)
    name = dataset.env_of_data(args.env, args.data.path) if alone else dataset_name(args.env, None)
    for folder in args.policy:  # before hours of training
        env = read_settings(folder).task_id
        if args.walls:
            maze_of(env, folder)
    dataset.check_writable(args.out, "--out")
    arguments.start_jax(args.seeds)
    if args.steps:
        compare_chunks(args, name, command)
    if args.policy:
        compare_policies(args.policy, args.horizon, args.trajectories, args.seed, args.out, command)
    if args.successors:
        compare_successors(args.policy, args.contexts, args.successors, args.seed, args.out, command)
    if args.walls:
        compare_walls(args.policy, args.horizon, args.trajectories, args.seed, args.out, command)
    return 0


# Chunk lengths.


def compare_chunks(args: Args, name: str, command: Sequence[str]) -> None:
    """Trains and measures the models of every chunk length; writes the results after each."""
    spec = make(name, "c").spec
    data = DataConfig(**vars(args.data))
    source = dataset.search(data, parse(name))
    if source is None:
        raise UserError(
            f"--env={args.env}: no dataset found; make one with `python experiments/generate_data.py "
            f"--env {name} --rows 1M`, or name one with --data.path and --data.dir"
        )
    store = dataset.open_store(data, source, spec)
    label, (normalizer, notes) = store.provenance.label, fit_normalizer("minmax", store.statistics)
    for note in notes:
        print(f"note: {note}")
    real = held_out(store, normalizer)
    for chunk in args.chunks:
        check_chunk(str(store.path), store.train[0].length, args.algorithm(spec, chunk).sample)
        check_horizon("--horizon", args.horizon, chunk, store)
    rows: list[ChunkRow] = []
    size = f"{counted(args.steps, 'update')}, width {max(args.hidden)}"
    title = f"dynamics models of {name}: {counted(args.seeds, 'seed')}, {size}"
    total = len(args.chunks) * args.steps
    numbers = range(args.seed, args.seed + args.seeds)
    with open_progress("model error", total, "updates", seeds=numbers) as progress:
        for place, chunk in enumerate(args.chunks):
            algo = args.algorithm(spec, chunk)
            nets, loss = train_models(args, algo, store, normalizer, progress, place * args.steps)
            with progress.phase("measuring"):
                errors = open_loop_errors(nets, real, chunk, args.horizon, args.trajectories, args.seed, algo)
                rows += chunk_rows(args, chunk, loss, errors)
                write_csv(args.out / "model_error.csv", rows, command, data=label)
                draw_chunks(rows, args.out / "model_error.png", title=title, data=label)
    print_tables(error_table(rows, title, label))
    print(f"  {args.out / 'model_error.csv'}\n  {args.out / 'model_error.png'}")


def train_models(
    args: Args, algo: Dynamics, store: Store, normalizer: Normalizer, progress: Progress, done: int
) -> tuple[MLP, float]:
    """Trains one chunk length's models; returns them, leading axis S, and their mean loss at the end."""
    mesh, chunk = seed_mesh(args.seeds), algo.sample.chunk
    keys = place(mesh, seed_keys(args.seed, args.seeds), SEED)
    window = place(mesh, make_window(store, normalizer, algo.sample), ALL)
    state, loss = init(algo, mesh, keys), np.zeros(args.seeds)
    for first in range(0, args.steps, SEGMENT):
        steps = np.arange(first, min(first + SEGMENT, args.steps), dtype=np.int32)
        state, metrics = segment(algo, mesh, window, keys, place(mesh, steps, ALL), state)
        loss = np.asarray(metrics["model/dynamics_loss"]).mean(axis=0)
        if not np.isfinite(loss).all():
            seed = args.seed + int(np.argmin(np.isfinite(loss)))
            raise Diverged(
                f"the model of {chunk} actions, seed {seed}, diverged by update {steps[-1]:,}; lower --lr"
            )
        progress.update(done + first + len(steps), {f"loss, {chunk} actions": loss})
    return jax.device_put(state.nets, jax.local_devices()[0]), float(loss.mean())


def chunk_rows(args: Args, chunk: int, loss: float, errors: Errors) -> list[ChunkRow]:
    """Returns the rows of one chunk length."""
    rows = []
    for i, horizon in enumerate(errors.horizons):
        seeds = over_seeds(errors.model[:, i])
        data = over_episodes(errors.model[:, i], errors.episode)
        row = ChunkRow(
            chunk, horizon, seeds.value, seeds.low, seeds.high, data.low, data.high,
            still=float(errors.still[i].mean()), loss=loss, seeds=args.seeds, updates=args.steps,
            trajectories=args.trajectories, episodes=len(np.unique(errors.episode)),
        )  # fmt: skip
        rows.append(row)
    return rows


def error_table(rows: Sequence[ChunkRow], title: str, data: str) -> Table:
    """Returns a table of errors at the first common horizon and at the last, with the origin of the data."""
    by_chunk: dict[int, dict[int, ChunkRow]] = {}
    for row in rows:
        by_chunk.setdefault(row.chunk, {})[row.horizon] = row
    common = set.intersection(*(set(group) for group in by_chunk.values()))
    ends = sorted({min(common), max(common)})
    caption = "mean squared error of the normalised state, held-out data; 95% intervals over seeds"
    caption += f"\ndata: {data}"
    shown = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    shown.add_column("chunk", justify="right")
    for horizon in ends:
        shown.add_column(f"at {horizon} steps", justify="right")
        shown.add_column("95% interval", justify="right")
    for chunk, group in by_chunk.items():
        cells = (
            (f"{group[h].error:.3g}", f"{group[h].seed_low:.3g} to {group[h].seed_high:.3g}") for h in ends
        )
        shown.add_row(str(chunk), *(cell for pair in cells for cell in pair))
    still = next(iter(by_chunk.values()))
    shown.add_row("constant state", *(cell for h in ends for cell in (f"{still[h].still:.3g}", "")))
    return shown


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
