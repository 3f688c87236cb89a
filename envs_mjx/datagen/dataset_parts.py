"""Parts of a dataset that several processes make at once, each some of its pairs of files, in one folder.

Part k of N has every N-th pair, beginning with the k-th. The processes do not wait for each other and need no
connection: a part that is done leaves a record in the folder `.<stem>.parts`, and the part that finds all
others done completes the dataset.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from envs_mjx.datagen.npz_shards import Shard
from envs_mjx.datagen.resumable_writer import SETTINGS, check_settings
from mac.atomic_files import misfit, read_json, visible, write_json, writing
from mac.errors import UserError


class DatasetSummary(NamedTuple):
    """Summary of a generated dataset, or of a part of it.

    Attributes:
        train_rows, val_rows: rows of all files.
        targets, hits: targets that the expert finished with, and those of them that it reached; in mazes,
            goals that it reached.
        thrown: episodes that failed the health check and were rejected and redone.
        dropped: contacts that the engine dropped because its contact buffer was full (results are then
            doubtful).
    """

    train_rows: int
    val_rows: int
    targets: int
    hits: int
    thrown: int
    dropped: int


class Part(NamedTuple):
    """One of `count` parts; `number` counts from 0."""

    number: int
    count: int  # pyright: ignore[reportIncompatibleMethodOverride]

    def __str__(self) -> str:
        return f"{self.number + 1}/{self.count}"

    def of(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Returns the pairs of files of this part; none if there are more parts than pairs."""
        return shards[self.number :: self.count]


WHOLE = Part(0, 1)


def read_part(text: str) -> Part:
    """Reads `K/N`, K from 1 to N.

    Raises:
        UserError: it is nothing of that form.
    """
    match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text, re.ASCII)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise UserError(f"--part={text}: write K/N, part K of N, such as 1/4 to 4/4")
    return Part(number - 1, count)


def work_folder(folder: Path, stem: str) -> Path:
    """Returns the folder that holds the unfinished files `<stem>*.npz` of `folder`."""
    return folder / f".{stem}.collect"


def is_unfinished(path: Path) -> bool:
    """True if a file of a dataset, or a folder of its files, is of one whose other files are not made yet."""
    files = visible(path, "*.npz") if path.is_dir() else [path]
    folder = path if path.is_dir() else path.parent
    begun = [hidden.stem[1:] for kind in ("collect", "parts") for hidden in folder.glob(f".*.{kind}")]
    return any(file.name.startswith(stem) for file in files for stem in begun)


class PartRecords:
    """Records of the parts that are done, in a folder of the dataset's own; nothing for a whole dataset.

    Disk errors are `UserError`s.
    """

    def __init__(self, folder: Path, stem: str, part: Part, shards: Sequence[Shard]):
        """Names the records of the files `<stem>*.npz` of `folder`; nothing is read or written yet.

        Args:
            shards: all pairs of files of the dataset.
        """
        self.part, self.shards, self._dataset = part, shards, folder
        self._folder, self._whole = folder / f".{stem}.parts", work_folder(folder, stem)

    def work(self, work: Path) -> Path:
        """Returns the working folder of this part, of the one that a process alone would have."""
        return work if self.part == WHOLE else self._folder / f"{self.part.number + 1}of{self.part.count}"

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Makes sure that all parts are of one dataset, and as many.

        Raises:
            UserError: the folder holds other parts, or a dataset that a process alone has begun.
        """
        if self.part == WHOLE:
            if self._folder.exists():
                raise UserError(
                    f"{self._dataset} holds parts of this dataset: go on with --part, or delete "
                    f"{self._folder}"
                )
            return
        if self._whole.exists():
            raise UserError(
                f"{self._dataset} holds this dataset, begun without --part: go on without it, or delete "
                f"{self._whole}"
            )
        shared = {**settings, "parts": self.part.count}
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / SETTINGS).exists():
                write_json(self._folder / SETTINGS, shared)
        check_settings(self._folder / SETTINGS, shared, f"delete {self._folder}")

    def mine(self) -> DatasetSummary | None:
        """Returns what this part has recorded; None before it was done."""
        return self._read(self.part)

    def finish(self, summary: DatasetSummary) -> None:
        """Records that this part is done."""
        with writing(self._folder):
            write_json(self._path(self.part), summary._asdict())

    def missing(self) -> list[Part]:
        """Returns the parts that are not done, or whose files are not all there."""
        every = (Part(number, self.part.count) for number in range(self.part.count))
        return [part for part in every if part.of(self.shards) and not self._done(part)]

    def total(self) -> DatasetSummary:
        """Adds up what all parts have recorded."""
        every = (self._read(Part(number, self.part.count)) for number in range(self.part.count))
        return DatasetSummary(*map(sum, zip(*(each for each in every if each), strict=True)))

    def close(self, work: Path) -> None:
        """Removes this part's working folder, and the records, unless another part is at work."""
        if self.part == WHOLE:
            return
        shutil.rmtree(work, ignore_errors=True)
        if not any(path.is_dir() for path in visible(self._folder, "*")):
            shutil.rmtree(self._folder, ignore_errors=True)

    def _done(self, part: Part) -> bool:
        files = (self._dataset / f"{each.stem}.npz" for shard in part.of(self.shards) for each in shard)
        return self._read(part) is not None and all(path.exists() for path in files)

    def _path(self, part: Part) -> Path:
        return self._folder / f"{part.number + 1}of{part.count}.json"

    def _read(self, part: Part) -> DatasetSummary | None:
        path = self._path(part)
        if part == WHOLE or not path.exists():
            return None
        found = read_json(path)
        if fault := misfit(found, **dict.fromkeys(DatasetSummary._fields, int)):
            raise UserError(f"{path} is damaged ({fault}); delete it, and make part {part} again")
        return DatasetSummary(*(found[name] for name in DatasetSummary._fields))
