"""Makes a dataset of any size with OGBench's scripted experts.

    python experiments/collect.py --env puzzle-4x5 --rows 1M

Run the same command again after an interruption, and it continues.
"""

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import jax

from envs_mjx.collect import Collected, generate, metadata_path, work_folder
from envs_mjx.engine_c import available_cores
from envs_mjx.episodes import EPISODE_ROWS
from envs_mjx.experts import STYLES
from envs_mjx.registry import names, parse, resolve_engine
from envs_mjx.request import LANES, Request, family_and_style
from envs_mjx.scenes import FAMILIES
from envs_mjx.shards import make_shards
from experiments import arguments, dataset
from mac.errors import UserError, one_line
from mac.run.claim import claim
from mac.run.interrupt import Terminated, sigterm_raises
from mac.run.progress import open_progress

PROGRAM = "python experiments/collect.py"
DATA = Path("data")
_UNITS = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9}


class Command(NamedTuple):
    """A command line, checked."""

    request: Request
    out: Path
    threads: int | None


def episodes_of(text: str, flag: str) -> int:
    """Episodes that a number of rows means, rounded up.

    A plain number counts rows of the file, 1001 per episode. With a unit it counts as the names of
    OGBench's datasets do, transitions: 1M is 1000 episodes of 1000, or 1,001,000 rows.

    Raises:
        UserError: for anything else than a positive number such as 200_200, 100k, 1.5M or 1B.
    """
    match = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?)([kmbg]?)", text.strip().lower(), re.ASCII)
    if match is None:
        raise UserError(f"{flag}={text}: not a number of rows; write it as 1M, 100k or 200_200")
    number, unit = match[1].replace("_", "").replace(",", ""), match[2]
    rows = float(number) * _UNITS.get(unit, 1)
    if rows < 1 or rows != int(rows):
        raise UserError(f"{flag}={text}: must be a whole number of at least 1")
    return -(-int(rows) // (EPISODE_ROWS - 1 if unit else EPISODE_ROWS))


def dataset_name(env: str, style: str | None) -> str:
    """The dataset that `--env` and `--style` name.

    Raises:
        UserError: there is no such environment, or the two contradict each other.
    """
    if env in FAMILIES:
        return f"{env}-{style or STYLES[0]}-v0"
    if env not in names():
        close = difflib.get_close_matches(env, FAMILIES, n=2, cutoff=0.4) or list(FAMILIES)
        raise UserError(f"--env={env}: no such environment; choose {' or '.join(close)}")
    name, family = parse(env).dataset, parse(env).family
    if style and name != f"{family}-{style}-v0":
        raise UserError(f"--style={style} contradicts --env={env}; write --env {family}")
    return name


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would print over several lines."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    add, whole = parser.add_argument, {"type": int, "metavar": "N"}
    add("--env", required=True, metavar="ENV", help=f"environment: {', '.join(FAMILIES)}")
    add("--rows", required=True, help="training rows; 1M is 1000 episodes, 200_200 is 200 (1001 rows each)")
    add("--style", choices=STYLES, help="play: follows plans (default); noisy: reacts, with noise")
    add("--seed", default=0, help="same seed, same data", **whole)
    add("--out", type=Path, help="folder of the files; default: data/generated-..., where run.py looks")
    add("--shard-rows", default="1M", help="training rows in each pair of files (default 1M)")
    add(
        "--engine",
        choices=("auto", *LANES),
        default="auto",
        help="physics; auto: c, unless on an accelerator",
    )
    add("--threads", help="host threads of engine c (default: every core); no matter for the data", **whole)
    add("--lanes", help="episodes simulated together (default 64 on c, else 1024); changes the data", **whole)
    return parser


def read_command(argv: Sequence[str]) -> Command:
    """Reads the command line and starts JAX.

    Raises:
        UserError: in one line, for whatever is wrong with it.
        SystemExit: after printing the help.
    """
    given = _parser().parse_args(list(argv))
    episodes, per_shard = episodes_of(given.rows, "--rows"), episodes_of(given.shard_rows, "--shard-rows")
    name = dataset_name(given.env, given.style)
    for flag in ("threads", "lanes"):
        if getattr(given, flag) is not None and getattr(given, flag) < 1:
            raise UserError(f"--{flag}={getattr(given, flag)}: must be at least 1")
    arguments.start_jax(1, for_help=False)
    engine = resolve_engine(given.engine)
    request = Request(name, episodes, per_shard, given.seed, engine, given.lanes or LANES[engine])
    family_and_style(request)
    return Command(request, given.out or default_folder(request), given.threads)


def default_folder(request: Request) -> Path:
    """Where a dataset goes if nobody says: single pairs of files where `run.py` looks for them."""
    folder = DATA / f"generated-{request.episodes * EPISODE_ROWS}-seed{request.seed}"
    folder = folder if request.engine == "c" else folder.with_name(f"{folder.name}-{request.engine}")
    return folder if request.episodes <= request.per_shard else folder / request.dataset


def announce(command: Command) -> None:
    """Says in a few lines what will be made."""
    request, out = command.request, command.out
    shards = make_shards(request.dataset, request.episodes, request.per_shard)
    val = sum(shard.val.episodes for shard in shards)
    cores = command.threads or available_cores()
    print(f"dataset      {request.dataset}, seed {request.seed}")
    print(f"episodes     {request.episodes:,} for training, {val:,} for validation, {EPISODE_ROWS} rows each")
    print(
        f"files        {out / shards[0].train.stem}.npz"
        + (f" and {len(shards) - 1} more" if shards[1:] else "")
    )
    print(f"engine       {request.engine}" + (f" on {cores} threads" if request.engine == "c" else ""))
    if work_folder(out, request.dataset).exists():
        print("continuing   what was begun here earlier")
    sys.stdout.flush()


def report(command: Command, made: Collected) -> None:
    """Says what was made."""
    print(f"expert hit   {made.hits:,} of {made.targets:,} targets")
    if made.thrown:
        print(f"redone       {made.thrown:,} episodes that failed the health check")
    if made.dropped:
        print(f"warning: the engine left out {made.dropped:,} contacts; compare with --engine c")
    print(f"wrote        {made.train_rows:,} + {made.val_rows:,} rows to {command.out}")
    print(f"  {metadata_path(command.out, command.request.dataset)} says how they were made")


def run(command: Command) -> None:
    """Makes the dataset, or what is missing of it."""
    announce(command)
    request, out = command.request, command.out
    dataset.check_writable(out, "--out")
    total = request.episodes * EPISODE_ROWS
    with claim(out), open_progress(f"collecting {request.dataset}", total, "rows") as progress:
        made = generate(request, out, threads=command.threads, progress=progress.count)
    report(command, made)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    try:
        with sigterm_raises():
            run(read_command(argv))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        print(f"error: out of memory ({one_line(error)}); take fewer --lanes, or --engine c", file=sys.stderr)
        return 2
    except KeyboardInterrupt as signal:
        print("stopped; the episodes that were finished are kept. Continue with:", file=sys.stderr)
        print(f"  {PROGRAM} {shlex.join(argv)}", file=sys.stderr)
        return 143 if isinstance(signal, Terminated) else 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
