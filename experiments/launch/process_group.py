"""One run in several processes: what the first decides for all, and what all must have alike.

The first process chooses the folder and holds it; the others follow, and write nothing but their part of the
checkpoints. All are started with the same settings, and see the run's folder.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.launch import saved_run
from experiments.launch.job import Launch, occupied, prepare_launch
from experiments.launch.settings import Settings, is_run
from mac.data.store import Store
from mac.errors import UserError
from mac.run import hosts


@contextlib.contextmanager
def held(launch: Launch, asked: Settings[Any]) -> Iterator[Launch]:
    """Holds the run's folder for all processes while entered; yields the launch with the folder of the first.

    Raises:
        UserError: the folder cannot be held, or another process does not see it.
    """
    if not hosts.is_first():
        said = hosts.from_first(None)
        folder = Path(said["folder"])
        hidden = not folder.is_dir()
        _quiet()
        if hidden:
            raise UserError(
                f"{folder}: not seen from here; all processes write their part of checkpoints there"
            )
        yield prepare_launch(dataclasses.replace(asked, out=folder))._replace(reached=said["reached"])
        return
    with occupied(launch.folder, anew=asked.out is None) as folder:
        if not asked.resume and is_run(folder):
            raise UserError(
                f"{folder}: another process began a run there just now; continue it with --resume, or choose "
                "another --out"
            )
        # From here on nothing of the run is written before all have looked (`check_agreement`).
        hosts.from_first({"folder": str(folder.absolute()), "reached": launch.reached})
        yield launch._replace(folder=folder)


def _quiet() -> None:
    """Sends standard output nowhere: the first process says all that there is to say."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)


def with_data_of_first(launch: Launch) -> Launch:
    """The launch with the first process's decisions on where rows are held: memory may differ by host."""
    data = launch.settings.data
    said = hosts.from_first({"resident": data.resident, "dtype": data.dtype})
    data = dataclasses.replace(data, **said)
    return launch._replace(settings=dataclasses.replace(launch.settings, data=data))


_OWN_PLACES = ("path", "dir", "source", "mirror")
"""Settings of data in which processes may differ, since each may have files of its own."""


def check_agreement(launch: Launch, store: Store) -> None:
    """Checks that all processes were started with the same settings, and found the same data.

    Raises:
        SharedError: naming the first process that has others than process 0, and what differs.
    """
    mine = launch.settings.to_dict() | {"reached": launch.reached, "engine": launch.engine}
    mine["data"] = {name: value for name, value in mine["data"].items() if name not in _OWN_PLACES}
    mine["content"] = saved_run.record_of(store)["content"]
    mine["rows"] = [int(split.length.sum()) for split in store.train]
    mine = json.loads(json.dumps(mine, default=str))
    first, *others = hosts.gather_json(mine)
    for number, its in enumerate(others, start=1):
        for name, here, there in _differences(first, its):
            raise hosts.SharedError(
                f"process {number} has other settings or data than process 0: {name} is {there} there and "
                f"{here} here; start all with the same command and the same data"
            )


def _differences(first: dict[str, Any], other: dict[str, Any], prefix: str = "") -> Iterator[tuple[Any, ...]]:
    """Yields the dotted name and both values of each entry in which two tables differ."""
    for name, here in first.items():
        there = other.get(name)
        if isinstance(here, dict) and isinstance(there, dict):
            yield from _differences(here, there, f"{prefix}{name}.")
        elif here != there:
            yield f"{prefix}{name}", here, there
