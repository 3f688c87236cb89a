"""The provenance of datasets, in a form that results can carry.

Three kinds are told apart: *generated* by this project (its generators leave a small `.json` beside their
files), *downloaded* by this program (`checksums.json` beside the file) and *local*, files of which only the
place is known. `Provenance.label` is what tables, pictures and rows of results say.
"""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from mac.atomic_files import load_json, locked, read_json, write_json
from mac.data.sources.catalogue import PRIMARY
from mac.errors import UserError
from mac.formatting import counted

LEDGER = "checksums.json"
OURS = "own expert: not comparable with published numbers"
_FOLDERS = {".ogbench": "OGBench", ".d4rl": "D4RL", ".minari": "Minari"}  # other programs' folders


class DownloadRecord(NamedTuple):
    """The record of a downloaded file."""

    sha256: str
    size: int
    url: str
    collection: str
    time: str = ""


class Provenance(NamedTuple):
    """The provenance of a dataset.

    Attributes:
        kind: `generated`, `downloaded`, `local` or `unknown`.
        label: the same in a few words, for tables and pictures.
        facts: what else is known: rows, seed, engine, versions, address, checksums.
    """

    kind: str
    label: str
    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Returns it as JSON data; `provenance_from_dict` is the inverse."""
        return {"kind": self.kind, "label": self.label, **self.facts}


UNKNOWN = Provenance("unknown", "unknown source", {})
"""Of a store that was made before stores knew."""


def provenance_from_dict(values: Any) -> Provenance:
    """Inverse of `Provenance.to_dict`; `UNKNOWN` for anything else."""
    if not isinstance(values, dict) or not {"kind", "label"} <= values.keys():
        return UNKNOWN
    rest = {key: value for key, value in values.items() if key not in ("kind", "label")}
    return Provenance(str(values["kind"]), str(values["label"]), rest)


def of_meta(meta: Mapping[str, Any]) -> Provenance:
    """Returns the provenance that a store's description records."""
    if "source" in meta:
        return provenance_from_dict(meta["source"])
    rows = sum(meta.get("train", {}).values())
    return generated(meta.get("made_by"), rows) or UNKNOWN


def provenance_of(
    files: Sequence[Path], made_by: Any, rows: int, checksums: Mapping[str, str] | None = None
) -> Provenance:
    """Returns the provenance of files that are about to be used.

    Args:
        files: training files, of one folder.
        made_by: content of the `.json` that a generator left beside them; None if there is none.
        rows: training rows.
        checksums: SHA-256 of files by name, as far as they were computed.
    Raises:
        UserError: a file is not what was downloaded.
    """
    if made := generated(made_by, rows):
        return made
    known = download_records(files[0].parent)
    entries = {file.name: known[file.name] for file in files if file.name in known}
    if len(entries) == len(files):
        for name, entry in entries.items():
            if (checksums or {}).get(name, entry.sha256) != entry.sha256:
                changed = files[0].with_name(name)
                raise UserError(f"{changed}: is not what was downloaded; delete it and download it again")
        return _downloaded(entries, rows)
    return _local(files, rows)


def generator_record(file: Path) -> Any:
    """Returns the generator's record of how it made its files; None without one."""
    stems = {file.stem, file.stem.rsplit("-", 1)[0]}
    for path in (file.with_name(stem + ".json") for stem in sorted(stems, key=len, reverse=True)):
        with contextlib.suppress(OSError, ValueError):
            return load_json(path)
    return None


def generated(made_by: Any, rows: int) -> Provenance | None:
    """Returns the provenance of a generated dataset, from its `made_by`; None of other datasets."""
    if not isinstance(made_by, dict) or "mac-jax" not in str(made_by.get("source", "")):
        return None
    details = [f"seed {made_by['seed']}"] if "seed" in made_by else []
    details += [counted(rows, "row")] if rows else []
    details += [f"action noise {made_by['action_noise']:g}"] if "action_noise" in made_by else []
    details += [f"styles {made_by['mix']}"] if "mix" in made_by else []
    ours = [OURS] if made_by.get("expert") == "ours" else []
    label = f"generated ({', '.join(['mac-jax', *ours, *details])})"
    keys = ("dataset", "seed", "engine", "expert", "versions", "action_noise", "mix")
    facts = {key: made_by[key] for key in keys if key in made_by}
    return Provenance("generated", label, {"rows": rows} | facts | {"metadata": dict(made_by)})


def download_records(folder: Path) -> dict[str, DownloadRecord]:
    """Returns the records of the downloads in a folder.

    Raises:
        UserError: the record is damaged.
    """
    path = folder / LEDGER
    if not path.exists():
        return {}
    values = read_json(path)
    try:
        return {name: DownloadRecord(**entry) for name, entry in values.items()}
    except (TypeError, AttributeError) as error:
        raise UserError(f"{path}: holds no record of downloads; restore it or delete it") from error


def record_download(path: Path, entry: DownloadRecord) -> None:
    """Adds a downloaded file to the record of its folder."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    with locked(path.with_name(f".{LEDGER}.lock")):
        known = download_records(path.parent) | {path.name: entry._replace(time=now)}
        write_json(path.with_name(LEDGER), {name: each._asdict() for name, each in sorted(known.items())})


def _downloaded(entries: Mapping[str, DownloadRecord], rows: int) -> Provenance:
    first = next(iter(entries.values()))
    host = urlsplit(first.url).netloc
    mirror = "" if host in PRIMARY.get(first.collection, ()) else f" (mirror {host})"
    large = f" ({len(entries)} files of its large set)" if len(entries) > 1 else ""
    facts = {"url": first.url, "files": {name: entry._asdict() for name, entry in entries.items()}}
    return Provenance("downloaded", first.collection + large + mirror, {"rows": rows} | facts)


def _local(files: Sequence[Path], rows: int) -> Provenance:
    first = files[0].absolute()
    several = f"local files {first.parent.name} ({len(files)})"
    label = f"local file {first.name}" if len(files) == 1 else several
    for folder, collection in _FOLDERS.items():
        if first.is_relative_to(Path.home() / folder):
            label = f"{collection} (file in ~/{folder})"
    return Provenance("local", label, {"rows": rows, "path": str(first)})
