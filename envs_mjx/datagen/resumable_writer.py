"""Resumable writer of a dataset: keeps a journal of the episodes on disk, and continues after a kill.

While a dataset is generated, a working folder holds:

    settings.json          the specification; nothing else is ever continued in this folder
    journal.jsonl          a line for each batch of episodes whose rows are on disk
    <file stem>/*.npy      an unfinished file, see `npz_shards.NpzShardWriter`

A finished file appears under its name in one move; then its working files are removed. An episode is a
function of its number, so the time, process and order of its simulation do not matter.
"""

import bisect
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from envs_mjx.datagen.data_policy import StepRecords
from envs_mjx.datagen.dataset_spec import OPTIONAL
from envs_mjx.datagen.npz_shards import (
    TRAIN,
    VAL,
    ArraySpec,
    NpzShardWriter,
    Shard,
    ShardFile,
    file_row_bytes,
)
from envs_mjx.datagen.simulate_episodes import EpisodeJob
from mac.atomic_files import fsync, visible, write_json, writing
from mac.errors import UserError, one_line

SETTINGS, JOURNAL = "settings.json", "journal.jsonl"


class EpisodeRecord(NamedTuple):
    """Journal entry of one episode.

    Attributes:
        split, index, attempt: the episode's identity, see `simulate_episodes.EpisodeJob`.
        kept: whether its rows are on disk; False if it was rejected.
        targets, hits: targets that the expert finished with, and those of them that it reached.
        dropped: contacts that the physics engine dropped because its contact buffer was full.
    """

    split: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    attempt: int
    kept: bool
    targets: int
    hits: int
    dropped: int


class DatasetWriter:
    """Writer of the files of one dataset, finished and unfinished; for one process at a time."""

    def __init__(
        self,
        folder: Path,
        work: Path,
        shards: Sequence[Shard],
        layout: Mapping[str, ArraySpec],
        episode_rows: int,
    ):
        """Creates a writer; nothing is read or written yet.

        Args:
            folder: where finished files go.
            work: the working folder, on the same file system.
            shards: the pairs of files to write, all or some of a dataset's, in order.
            layout: arrays of each file.
            episode_rows: rows of an episode.
        """
        self.folder, self.work, self.shards = folder, work, tuple(shards)
        self.records: dict[tuple[int, int], EpisodeRecord] = {}  # of the episodes that are on disk
        self.thrown: dict[tuple[int, int, int], EpisodeRecord] = {}  # by split, index and attempt
        self._episode_rows = episode_rows
        self._shard_writer = NpzShardWriter(work, layout, episode_rows)
        self._row_bytes = file_row_bytes(layout)
        self._left = [0] * len(self.shards)  # episodes missing in each shard
        self._firsts = [[shard[split].first for shard in self.shards] for split in (TRAIN, VAL)]

    @property
    def rows(self) -> int:
        """Rows of all files of the finished dataset."""
        return sum(part.episodes for shard in self.shards for part in shard) * self._episode_rows

    @property
    def rows_kept(self) -> int:
        """Rows that are on disk."""
        return self.rows - sum(self._left) * self._episode_rows

    def final(self, part: ShardFile) -> Path:
        """Returns the path of a finished file."""
        return self.folder / f"{part.stem}.npz"

    def draft(self, name: str) -> Path:
        """Returns the path at which a file `name` is written; `open` removes a leftover of a killed
        process."""
        return self.work / f"{name}.part"

    def finished(self, shard: Shard) -> bool:
        """Returns whether both files of a shard exist."""
        return all(self.final(part).exists() for part in shard)

    def check_names(self) -> None:
        """Checks that no foreign file is taken for one of this dataset.

        Raises:
            UserError: if a file of such a name exists without a working folder that it could come from.
        """
        if not (self.work / SETTINGS).exists():
            for path in (self.final(part) for shard in self.shards for part in shard):
                if path.exists():
                    raise UserError(
                        f"{path} exists and does not come from this program; move it away, or choose "
                        "another folder"
                    )

    def check_disk_space(self) -> None:
        """Checks the free disk space before hours of simulation, not after.

        Raises:
            UserError: naming the free and the needed space: all unfinished files, and the working files of
                one shard.
        """
        sizes = [sum(part.episodes for part in shard) for shard in self.shards if not self.finished(shard)]
        whole = (sum(sizes) + max(sizes, default=0)) * self._episode_rows * self._row_bytes
        existing = sum(file.stat().st_size for file in visible(self.work, "*/*.npy"))
        free, needed = shutil.disk_usage(self.work).free, 1.02 * max(whole - existing, 0)
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 1e6:,.0f} MB free, the dataset takes another "
                f"{needed / 1e6:,.0f} MB while it is made; free some space or ask for fewer rows"
            )

    def open(self, settings: Mapping[str, Any]) -> None:
        """Starts the dataset, or continues one that an earlier process left unfinished.

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
                self._left[number] = sum(key not in self.records for key in shard.keys)
                continue
            for part in shard:
                self._shard_writer.drop(part)
        self._finish_shards()

    def missing(self) -> Iterator[EpisodeJob]:
        """Yields the episodes that are still to be simulated, shard by shard."""
        again = {(split, index): attempt + 1 for split, index, attempt in sorted(self.thrown)}
        for number, shard in enumerate(self.shards):
            if self._left[number]:
                for key in shard.keys:
                    if key not in self.records:
                        yield EpisodeJob(*key, again.get(key, 0))

    def add(self, rows: StepRecords, records: Sequence[EpisodeRecord]) -> None:
        """Writes the kept episodes to disk, and all of them to the journal. A shard that they complete gets
        its final files.

        Args:
            rows: records of the episodes, axis 0 in the order of `records`.
        Raises:
            UserError: if the disk refuses.
        """
        with writing(self.folder):
            touched = set()
            for i, record in enumerate(records):
                if record.kept:
                    part = self.shards[self._shard(record)][record.split]
                    self._shard_writer.put(part, record.index, StepRecords(*(column[i] for column in rows)))
                    touched.add(part)
            for part in touched:
                self._shard_writer.settle(part)
            with open(self.work / JOURNAL, "ab") as file:
                file.write(json.dumps(records).encode() + b"\n")
                fsync(file)
        for record in records:
            self._remember(record)
            self._left[self._shard(record)] -= record.kept
        self._finish_shards()

    def close(self) -> None:
        """Removes the working folder."""
        shutil.rmtree(self.work, ignore_errors=True)

    def _finish_shards(self) -> None:
        """Assembles the files of every complete shard, validation file first."""
        for number, shard in enumerate(self.shards):
            if self._left[number] == 0 and not self.finished(shard):
                with writing(self.folder):
                    for part in reversed(shard):
                        self._shard_writer.assemble(part, self.final(part))
                for part in shard:
                    self._shard_writer.drop(part)

    def _replay(self) -> None:
        """Reads the journal. A last line that a kill cut short is removed. Entries whose rows no longer
        exist, because someone removed a file, are ignored.
        """
        path = self.work / JOURNAL
        text = path.read_bytes() if path.exists() else b""
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))
        try:
            for line in whole.splitlines():
                for record in json.loads(line):
                    self._remember(EpisodeRecord(*record))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged ({one_line(error)}); delete {self.work}") from error
        for shard in self.shards:
            if not self.finished(shard):
                for part in shard:
                    if not self._shard_writer.holds(part):
                        for key in part.keys:
                            self.records.pop(key, None)

    def _remember(self, record: EpisodeRecord) -> None:
        if record.kept:
            self.records[record.split, record.index] = record
        else:
            self.thrown[record.split, record.index, record.attempt] = record

    def _shard(self, record: EpisodeRecord) -> int:
        """Returns the place among the shards of the one that an episode belongs to."""
        return bisect.bisect_right(self._firsts[record.split], record.index) - 1


def check_settings(path: Path, settings: Mapping[str, Any], remedy: str) -> None:
    """Compares the settings of a dataset with those recorded in a file of its folder.

    Raises:
        UserError: if they differ, or the file cannot be read. `remedy` says how to discard the old data.
    """
    try:
        old = json.loads(path.read_bytes())
        differing = [name for name, value in settings.items() if name not in OPTIONAL and old[name] != value]
        differing += [name for name in OPTIONAL if old.get(name) != settings.get(name)]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); {remedy} to start over") from error
    if differing:
        name = differing[0]
        raise UserError(
            f"{path.parent} holds data with {name}={old.get(name)}, asked is {name}={settings.get(name)}; "
            f"choose another folder, or {remedy} to start over"
        )
