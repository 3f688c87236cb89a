"""A dataset under way: which episodes are on disk, which are missing, and what survives a kill.

While a dataset is made there is a working folder:

    settings.json          what is being made; nothing else is ever continued in this folder
    journal.jsonl          a line for each batch of episodes whose rows are on disk
    <file stem>/*.npy      a file under way, see `npz_shards.Bench`

A finished file appears under its name in one move, after which its working files go. An episode is a
function of its number, so it does not matter when, by which process and in which order it was made.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from envs_mjx.datagen.data_policy import Rows
from envs_mjx.datagen.npz_shards import Bench, Column, Part, Shard, row_bytes
from envs_mjx.datagen.simulate_episodes import Job
from mac.atomic_files import fsync, visible, write_json, writing
from mac.errors import UserError, one_line

SETTINGS, JOURNAL = "settings.json", "journal.jsonl"


class Note(NamedTuple):
    """What the journal says of one episode.

    Attributes:
        split, index, attempt: which one, see `simulate_episodes.Job`.
        kept: whether its rows are on disk; False if it was thrown away.
        targets, hits: targets that the expert was through with, and those of them that it hit.
        dropped: contacts that the physics engine left out.
    """

    split: int
    index: int
    attempt: int
    kept: bool
    targets: int
    hits: int
    dropped: int


class Workshop:
    """The files of one dataset, finished and under way; for one process at a time."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        shards: Sequence[Shard],
        layout: Mapping[str, Column],
        episode_rows: int,
    ):
        """Nothing is read or written yet.

        Args:
            folder: where finished files go.
            work: the working folder, on the same file system.
            layout: arrays of each file.
            episode_rows: rows of an episode.
        """
        self.folder, self.work, self.shards = folder, work, tuple(shards)
        self.notes: dict[tuple[int, int], Note] = {}  # of the episodes that are on disk
        self.thrown: dict[tuple[int, int, int], Note] = {}  # by split, index and attempt
        self._episode_rows = episode_rows
        self._bench = Bench(work, layout, episode_rows)
        self._row_bytes = row_bytes(layout)
        self._left = [0] * len(self.shards)  # episodes missing in each shard

    @property
    def rows(self) -> int:
        """Rows of all files, finished."""
        return sum(part.episodes for shard in self.shards for part in shard) * self._episode_rows

    @property
    def rows_kept(self) -> int:
        """Rows that are on disk."""
        return self.rows - sum(self._left) * self._episode_rows

    def final(self, part: Part) -> Path:
        """Where a file is when it is finished."""
        return self.folder / f"{part.stem}.npz"

    def draft(self, name: str) -> Path:
        """Where a file called `name` is while it is written; a leftover of a kill is removed by `open`."""
        return self.work / f"{name}.part"

    def finished(self, shard: Shard) -> bool:
        """Whether both files of a shard are there."""
        return all(self.final(part).exists() for part in shard)

    def check_names(self) -> None:
        """Makes sure that no file of someone else's passes for one of ours.

        Raises:
            UserError: there is a file of such a name, and no work that it could come from.
        """
        if not (self.work / SETTINGS).exists():
            for path in (self.final(part) for shard in self.shards for part in shard):
                if path.exists():
                    raise UserError(
                        f"{path} exists and does not come from this program; move it away, or choose "
                        "another folder"
                    )

    def check_room(self) -> None:
        """Finds out before hours of simulation, not after, that the disk is too small.

        Raises:
            UserError: naming what is there and what is needed: all unfinished files, and the working
                files of one shard.
        """
        sizes = [sum(part.episodes for part in shard) for shard in self.shards if not self.finished(shard)]
        whole = (sum(sizes) + max(sizes, default=0)) * self._episode_rows * self._row_bytes
        there = sum(file.stat().st_size for file in visible(self.work, "*/*.npy"))
        free, needed = shutil.disk_usage(self.work).free, 1.02 * max(whole - there, 0)
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 1e6:,.0f} MB free, the dataset takes another "
                f"{needed / 1e6:,.0f} MB while it is made; free some space or ask for fewer rows"
            )

    def open(self, settings: Mapping[str, Any]) -> None:
        """Begins the work, or continues what an earlier process left.

        Raises:
            UserError: the working folder belongs to another dataset, or cannot be written.
        """
        with writing(self.folder):
            self.work.mkdir(parents=True, exist_ok=True)
            if (self.work / SETTINGS).exists():
                check_settings(self.work / SETTINGS, settings, f"delete {self.work}")
            else:
                write_json(self.work / SETTINGS, settings, part=self.draft(SETTINGS))
            for stale in visible(self.work, "*.part"):
                stale.unlink()
            self._replay()
        for number, shard in enumerate(self.shards):
            if not self.finished(shard):
                self._left[number] = sum(key not in self.notes for key in shard.keys)
                continue
            for part in shard:
                self._bench.drop(part)
        self._finish_shards()

    def missing(self) -> Iterator[Job]:
        """The episodes that are still to be simulated, shard by shard."""
        again = {(split, index): attempt + 1 for split, index, attempt in sorted(self.thrown)}
        for number, shard in enumerate(self.shards):
            if self._left[number]:
                for key in shard.keys:
                    if key not in self.notes:
                        yield Job(*key, again.get(key, 0))

    def add(self, rows: Rows, notes: Sequence[Note]) -> None:
        """Puts simulated episodes on disk, those that are kept, and notes them in the journal. A shard
        that is complete with them gets its final files.

        Args:
            rows: of the episodes, axis 0 in the order of `notes`.
        Raises:
            UserError: the disk refuses.
        """
        with writing(self.folder):
            touched = set()
            for i, note in enumerate(notes):
                if note.kept:
                    part = self.shards[self._shard(note)][note.split]
                    self._bench.put(part, note.index, Rows(*(column[i] for column in rows)))
                    touched.add(part)
            for part in touched:
                self._bench.settle(part)
            with open(self.work / JOURNAL, "ab") as file:
                file.write(json.dumps(notes).encode() + b"\n")
                fsync(file)
        for note in notes:
            self._remember(note)
            self._left[self._shard(note)] -= note.kept
        self._finish_shards()

    def close(self) -> None:
        """Removes the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _finish_shards(self) -> None:
        """Gives every shard that is complete its files, validation file first."""
        for number, shard in enumerate(self.shards):
            if self._left[number] == 0 and not self.finished(shard):
                with writing(self.folder):
                    for part in reversed(shard):
                        self._bench.assemble(part, self.final(part))
                for part in shard:
                    self._bench.drop(part)

    def _replay(self) -> None:
        """Reads the journal. A last line that a kill cut short is removed; notes about rows that are no
        more, because someone removed a file, are not believed.
        """
        path = self.work / JOURNAL
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        try:
            for line in whole.splitlines():
                for note in json.loads(line):
                    self._remember(Note(*note))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}); delete {self.work}") from error
        for shard in self.shards:
            if not self.finished(shard):
                for part in shard:
                    if not self._bench.holds(part):
                        for key in part.keys:
                            self.notes.pop(key, None)

    def _remember(self, note: Note) -> None:
        if note.kept:
            self.notes[note.split, note.index] = note
        else:
            self.thrown[note.split, note.index, note.attempt] = note

    def _shard(self, note: Note) -> int:
        """Number of the shard that an episode belongs to: all but the last are equally large."""
        return note.index // self.shards[0][note.split].episodes


def check_settings(path: Path, settings: Mapping[str, Any], remedy: str) -> None:
    """Compares what is to be made with what a file says is, or is being, made.

    Raises:
        UserError: they differ, or the file cannot be read; with `remedy` for the case that the old data
            are not wanted.
    """
    try:
        old = json.loads(path.read_bytes())
        differing = [name for name, value in settings.items() if old[name] != value]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {remedy} to start over") from error
    if differing:
        name = differing[0]
        raise UserError(
            f"{path.parent} holds data with {name}={old[name]}, asked is {name}={settings[name]}; choose "
            f"another folder, or {remedy} to start over"
        )
