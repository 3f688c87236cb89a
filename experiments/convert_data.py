"""Turns a dataset into the flat store that training reads, once: `python experiments/convert_data.py DIR`.

    python experiments/convert_data.py ~/.ogbench/data/puzzle-4x5-play-100m-v0 --dtype uint16
    python experiments/convert_data.py STORE --check

Run the same command again after an interruption, and it goes on with the files that are missing.
"""

import difflib
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from envs_mjx.registry import make, names, parse
from experiments.cli.arguments import read_flags
from experiments.cli.exit_status import exit_status
from experiments.cli.standard_streams import ignore_write_errors
from experiments.launch import dataset
from experiments.launch.settings import DataConfig
from mac.atomic_files import visible, writing
from mac.data.convert import Sources, convert, upgrade
from mac.data.provenance import of_meta
from mac.data.shards import shard_files
from mac.data.store import Store, is_store, read_meta
from mac.errors import UserError
from mac.formatting import counted

PROGRAM = "python experiments/convert_data.py"
WORST = 3  # columns of largest error that are shown


@dataclass(frozen=True)
class Args:
    """Turns OGBench's files into the flat store that training reads; run.py then finds it by itself."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """a folder of OGBench shards, or one .npz or .hdf5 file; its validation file goes along"""
    env: str | None = None
    """environment whose widths the files must have; None = as the files' name says"""
    dtype: Literal["float32", "uint16"] = "uint16"
    """uint16 takes half the space; its error is reported, in units of each column's spread"""
    out: Path | None = None
    """folder of the store; None = data/stores/..., where run.py looks for a converted --data.path"""
    check: bool = False
    """read all rows of the store and compare them with its checksums; DIR may be a store then"""

    def __post_init__(self):
        if self.env is not None:
            parse(self.env)


def main(argv: Sequence[str]) -> int:
    """The command line; returns the exit status: 0, 2 bad input, 128 + a signal's number."""
    return exit_status(
        lambda: run(read_flags(Args, argv, PROGRAM)),
        short_of_memory="split the file into shards, as OGBench's large datasets are",
        interrupted=f"finished files are kept; continue with\n  {PROGRAM} {shlex.join(argv)}",
    )


def run(ask: Args) -> int:
    """Makes the store, or what is missing of it; returns the exit status."""
    ignore_write_errors()
    if is_store(ask.source):
        return convert_folder(ask)
    files = shard_files(ask.source)
    env = dataset.env_of_data(ask.env, ask.source) if ask.env else guess_env(ask.source, files[0])
    rows = dataset.count_rows(ask.source) or 0
    print(f"source       {ask.source}: {counted(len(files), 'file')}, {counted(rows, 'training row')}")
    print(f"environment  {env}")
    spec, data = make(env, "c").spec, DataConfig()
    with writing(dataset.stores(data)):
        dataset.stores(data).mkdir(parents=True, exist_ok=True)
    found = Sources.of(ask.source, spec, dataset.file_checksums(data))
    out = ask.out or dataset.store_folder(data, ask.source, found, ask.dtype)
    print(f"store        {out}, as {ask.dtype}", flush=True)
    before = read_meta(out)
    passes = " (each row twice)" if ask.dtype == "uint16" else ""
    with dataset.shown(f"preparing {ask.source.name}{passes}") as progress:
        store = convert(found, out, spec, ask.dtype, progress)
    if before is not None and store.meta is not None and before.get("content") != store.meta["content"]:
        print(f"note: {out}: held {of_meta(before).label} as {before['dtype']}, and was replaced")
    report_store(store)
    return check(store) if ask.check else 0


def convert_folder(ask: Args) -> int:
    """Checks a store, or completes one of an earlier version; returns the exit status."""
    if upgrade(ask.source):
        print(f"store        {ask.source}: its rows have checksums now")
        return 0
    if not ask.check:
        raise UserError(
            f"{ask.source} is a store already; name the .npz file or folder that it is made from, or --check"
        )
    return check(Store.open(ask.source))


def check(store: Store) -> int:
    """Compares all rows with their checksums."""
    store.check()
    print(f"checked      {store.path}: {store.rows:,} training rows are as they were written")
    return 0


def guess_env(source: Path, first: Path) -> str:
    """The environment that a file or its folder is named after.

    Raises:
        UserError: neither is.
    """
    known = sorted({parse(name).dataset for name in names()}, key=len, reverse=True)
    for text in (first.stem, source.resolve().name):
        for name in known:
            if text.startswith(name.removesuffix("-v0")):
                return name
    close = difflib.get_close_matches(first.stem, known, n=2, cutoff=0.4) or known[-2:]
    raise UserError(
        f"{first}: cannot tell the environment from its name; give --env, such as {' or '.join(close)}"
    )


def report_store(store: Store) -> None:
    """Says what the store holds and what its codes lose."""
    meta = read_meta(store.path) or {}
    for note in store.notes:
        print(f"note: {note}")
    size = sum(file.stat().st_size for file in visible(store.path, "**/*.npy"))
    print(f"rows         {store.rows:,} in {counted(store.episodes, 'episode')}, {size / 1e9:,.2f} GB")
    for name, quality in meta["quality"].items():
        print(f"{name:<12} {describe_loss(quality)}")
    print(f"  {store.path / 'meta.json'} says what each column holds")
    print(f"train on it with run.py --data.path {shlex.quote(str(store.path))}; the .npz files may go")


def describe_loss(quality: dict[str, Any]) -> str:
    """A line on the errors of some columns: the worst of them, in units of their spread."""
    low, high = quality["low"], quality["high"]
    constant = sum(a == b for a, b in zip(low, high, strict=True))
    text = f"{counted(len(low), 'column')}, {constant} of them constant"
    errors = quality.get("largest_error_in_std")
    if errors is None:
        return f"{text}; stored exactly"
    worst = sorted(range(len(errors)), key=errors.__getitem__, reverse=True)[:WORST]
    exact = sum(error == 0 for error in errors)
    listed = ", ".join(
        f"column {i} {errors[i]:.1e} of its std and {quality['largest_error_in_range'][i]:.1e} of its range"
        for i in worst
    )
    typical = max(quality["typical_error_in_std"])
    return f"{text}, {exact} exact; largest error: {listed}; typical error at most {typical:.1e} of the std"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
