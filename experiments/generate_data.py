"""Makes a dataset of any size with OGBench's scripted experts, or with one of `experiments/train_expert.py`.

    python experiments/generate_data.py --env puzzle-4x5 --rows 1M
    python experiments/generate_data.py --env pointmaze-medium --style stitch --rows 200k
    python experiments/generate_data.py --env antmaze-medium --expert experts/ant --rows 1M

Run the same command again after an interruption, and it continues.
"""

import contextlib
import difflib
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

from envs_mjx.action_noise import check_sigma
from envs_mjx.datagen.dataset_parts import WHOLE, Part, PartRecords, read_part
from envs_mjx.datagen.dataset_spec import LANES, DatasetSpec, episode_rows, family_and_style
from envs_mjx.datagen.generate import DatasetSummary, generate, held_folder, metadata_path, work_folder
from envs_mjx.datagen.npz_shards import Shard, make_shards
from envs_mjx.datagen.simulate_episodes import EPISODE_ROWS
from envs_mjx.datagen.style_mix import read_mix
from envs_mjx.experts import STYLES
from envs_mjx.experts.maze_experts import DirectionActor
from envs_mjx.locomotion.walkers import MAZES
from envs_mjx.manipulation.scenes import FAMILIES as SCENES
from envs_mjx.registry import maze_styles, names, parse, resolve_engine
from experiments.cli import arguments
from experiments.cli.arguments import read_count
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.expert_training.trainer import load_actor
from experiments.launch import dataset
from mac.cgroup_limits import cores
from mac.errors import UserError
from mac.formatting import counted, plural
from mac.run.hosts import place_from_environment
from mac.run.io.folder_lock import lock_folder
from mac.run.report.progress import open_progress

PROGRAM = "python experiments/generate_data.py"
DATA = Path("data")
FAMILIES = (*SCENES, *MAZES)
REQUIRED = tyro.MISSING


@dataclass(frozen=True)
class Args:
    """Makes a dataset of any size with OGBench's scripted experts, or a trained one for ants and humanoids.

    Run the same command again after an interruption, and it continues.
    """

    env: Annotated[str, tyro.conf.arg(metavar="ENV", help=f"environment: {', '.join(FAMILIES)}")] = REQUIRED
    rows: Annotated[str, tyro.conf.arg(metavar="ROWS")] = REQUIRED
    """training rows; 1M is 1000 episodes of 1000 transitions, 200_200 is 200 episodes (1001 rows each)"""
    style: Literal["play", "noisy", "navigate", "stitch", "explore"] | None = None
    """`play` follows plans, `noisy` reacts, with noise; in mazes `navigate` goes from goal to goal,
    `stitch` to one near goal, `explore` anywhere; None = that of --env, else play or navigate"""
    expert: Path | None = None
    """folder that experiments/train_expert.py made, for ants and humanoids"""
    mix: str | None = None
    """shares of episodes by style, such as play=0.5,noisy=0.3,random=0.2; `random` is uniform random actions;
    the files keep the name of --env and --style"""
    noise: float = 0.0
    """standard deviation of noise on every executed action; the recorded actions are the intended ones"""
    seed: int = 0
    """same seed, same data"""
    out: Path | None = None
    """folder of the files; None = data/generated-..., where run.py looks"""
    shard_rows: Annotated[str, tyro.conf.arg(metavar="ROWS")] = "1M"
    """training rows in each pair of files"""
    engine: Literal["auto", "c", "mjx", "warp"] = "auto"
    """physics; auto = c, unless on an accelerator"""
    threads: int | None = None
    """host threads of engine c; None = every core; no matter for the data"""
    lanes: int | None = None
    """episodes simulated together; None = 64 on c, else 1024; changes the data"""
    part: str | None = None
    """K/N: this process makes part K of N, some of the pairs of files, while others make the rest in the same
    --out; N is at most their number; None = as variables of torchrun or of a step of SLURM say, else all"""

    def __post_init__(self):
        for name in ("threads", "lanes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name}={value}: must be at least 1")
        check_sigma("--noise", self.noise)


class Command(NamedTuple):
    """A command line, checked."""

    request: DatasetSpec
    out: Path
    threads: int | None
    actor: DirectionActor | None
    part: Part = WHOLE

    @property
    def episode_rows(self) -> int:
        """Rows of an episode."""
        return episode_rows(self.request.dataset)

    @property
    def shards(self) -> Sequence[Shard]:
        """All pairs of files of the dataset."""
        return make_shards(self.request.dataset, self.request.episodes, self.request.per_shard)

    @property
    def held(self) -> Path:
        """Folder that this process must have for itself."""
        return held_folder(self.out, self.request.dataset, self.part)


def episodes_of(text: str, flag: str, rows: int = EPISODE_ROWS) -> int:
    """Episodes that a number of rows means, rounded up; `rows` is that of each episode.

    A plain number counts rows of the file. With a unit it counts as the names of OGBench's datasets do,
    transitions: of episodes of 1001 rows, 1M is 1000, or 1,001,000 rows.

    Raises:
        UserError: for anything else than a positive number such as 200_200, 100k, 1.5M, 1B or 1e6.
    """
    wanted, has_unit = parse_rows(text, flag)
    return -(-wanted // (rows - 1 if has_unit else rows))


def parse_rows(text: str, flag: str) -> tuple[int, bool]:
    """A number of rows such as 200_200, 100k, 1.5M or 1B, and whether it has a unit.

    Raises:
        UserError: for anything else than a positive whole number.
    """
    try:
        rows, has_unit = read_count(text)
    except ValueError as error:
        raise UserError(f"{flag}={text}: {error}") from error
    if rows < 1:
        raise UserError(f"{flag}={text}: must be a whole number of at least 1")
    return rows, has_unit


def dataset_name(env: str, style: str | None) -> str:
    """The dataset that `--env` and `--style` name.

    Raises:
        UserError: there is no such environment, or the two contradict each other.
    """
    if env in FAMILIES:
        styles = maze_styles(env) if env in MAZES else STYLES
        if style not in (None, *styles):
            raise UserError(f"--style={style}: datasets of {env} are {' or '.join(styles)}")
        return f"{env}-{style or styles[0]}-v0"
    if env not in names() or parse(env).family not in FAMILIES:
        close = difflib.get_close_matches(env, FAMILIES, n=2, cutoff=0.4) or list(FAMILIES)
        raise UserError(f"--env={env}: no such environment; choose {' or '.join(close)}")
    parsed = parse(env)
    name, family = parsed.dataset, parsed.family
    if style and name != f"{family}-{style}-v0":
        raise UserError(f"--style={style} contradicts --env={env}; write --env {family}")
    return name


def read_command(argv: Sequence[str]) -> Command:
    """Reads the command line and starts JAX.

    Raises:
        UserError: in one line, for whatever is wrong with it.
        SystemExit: after printing the help.
    """
    ask: Args = arguments.read_flags(Args, argv, PROGRAM)
    name = dataset_name(ask.env, ask.style)
    rows = episode_rows(name)
    episodes = episodes_of(ask.rows, "--rows", rows)
    per_shard = episodes_of(ask.shard_rows, "--shard-rows", rows)
    arguments.start_jax(1)
    engine = resolve_engine(ask.engine)
    lanes = ask.lanes or LANES[engine]
    if ask.mix is not None:
        read_mix(ask.mix, name)
    request = DatasetSpec(
        name, episodes, per_shard, ask.seed, engine, lanes, action_noise=ask.noise, mix=ask.mix or ""
    )
    actor = None
    if ask.expert is not None:
        actor, checksum = load_actor(ask.expert, name.partition("maze")[0])
        request = request._replace(expert_checksum=checksum)
    family_and_style(request)
    out = ask.out or default_dataset_folder(request)
    return Command(request, out, ask.threads, actor, part_of_process(ask.part))


def part_of_process(asked: str | None) -> Part:
    """Returns the part that is asked for, or that the environment's variables give; else everything.

    Raises:
        UserError: for text that names no part, and for variables that contradict each other.
    """
    if asked is not None:
        return read_part(asked)
    place = place_from_environment(os.environ)
    return WHOLE if place is None else Part(place.number, place.count)


def default_dataset_folder(request: DatasetSpec) -> Path:
    """Returns the default folder of a dataset: where `run.py` looks, for a single pair of files."""
    folder = DATA / f"generated-{request.episodes * episode_rows(request.dataset)}-seed{request.seed}"
    folder = folder if request.engine == "c" else folder.with_name(f"{folder.name}-{request.engine}")
    if request.action_noise:
        folder = folder.with_name(f"{folder.name}-noise{request.action_noise:g}")
    if request.mix:
        folder = folder.with_name(f"{folder.name}-{request.mix.replace('=', '').replace(',', '-')}")
    return folder if request.episodes <= request.per_shard else folder / request.dataset


def announce_dataset(command: Command) -> None:
    """Says in a few lines what will be made."""
    request, out = command.request, command.out
    shards = command.shards
    val = sum(shard.val.episodes for shard in shards)
    threads = command.threads or cores()
    print(f"dataset      {request.dataset}, seed {request.seed}")
    if request.action_noise:
        print(f"noise        {request.action_noise:g} on executed actions; the recorded ones have none")
    if request.mix:
        print(f"styles       {request.mix}, as shares of episodes")
    print(
        f"episodes     {request.episodes:,} for training, {val:,} for validation, "
        f"{command.episode_rows} rows each"
    )
    print(
        f"files        {out / shards[0].train.stem}.npz"
        + (f" and {len(shards) - 1} more" if shards[1:] else "")
    )
    print(f"engine       {request.engine}" + (f" on {threads} threads" if request.engine == "c" else ""))
    if command.part != WHOLE:
        mine = len(command.part.of(shards))
        print(f"part         {command.part}: {mine} of the {counted(len(shards), 'pair')} of files")
    if (command.held if command.part != WHOLE else work_folder(out, request.dataset)).exists():
        print("continuing   what was begun here earlier")
    sys.stdout.flush()


def report_dataset(command: Command, made: DatasetSummary) -> None:
    """Says what was made."""
    if made.targets > made.hits or parse(command.request.dataset).family in SCENES:
        print(f"expert hit   {made.hits:,} of {made.targets:,} targets")
    else:
        print(f"expert was   at {made.hits:,} goals")
    if made.thrown:
        print(f"redone       {counted(made.thrown, 'episode')} that failed the health check")
    if made.dropped:
        print(f"warning: the engine left out {made.dropped:,} contacts; compare with --engine c")
    described = metadata_path(command.out, command.request.dataset)
    part = f"part {command.part}, " if not described.exists() else ""
    print(f"wrote        {part}{made.train_rows:,} + {made.val_rows:,} rows to {command.out}")
    if part:
        missing = PartRecords(command.out, command.request.dataset, command.part, command.shards).missing()
        print(f"waits for    {plural('part', len(missing))} {', '.join(map(str, missing))} of the dataset")
    else:
        print(f"  {described} says how they were made")


def run(command: Command) -> int:
    """Makes the dataset, or what is missing of it; returns the exit status."""
    ignore_write_errors()
    announce_dataset(command)
    request, out = command.request, command.out
    if not command.part.of(command.shards):
        print("nothing to do: there are fewer pairs of files than parts")
        return 0
    total = request.episodes * command.episode_rows
    with occupied(command), open_progress(f"collecting {request.dataset}", total, "rows") as progress:
        made = generate(
            request, out, threads=command.threads, progress=progress.count, actor=command.actor,
            part=command.part,
        )  # fmt: skip
    report_dataset(command, made)
    return 0


@contextlib.contextmanager
def occupied(command: Command) -> Iterator[None]:
    """Holds the folder of the dataset, or of a part, for this process; leaves no empty folder of a part."""
    dataset.check_writable(command.held, "--out")
    try:
        with lock_folder(command.held):
            yield
    finally:
        if command.part != WHOLE:
            with contextlib.suppress(OSError):
                command.held.rmdir()
                command.held.parent.rmdir()


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(read_command(argv)),
        short_of_memory="take fewer --lanes, or --engine c",
        interrupted=f"finished episodes are kept; continue with\n  {PROGRAM} {shlex.join(argv)}",
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
