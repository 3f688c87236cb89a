"""Check of the datasets on this machine, for `doctor.py`: by file names, without reading arrays."""

from collections.abc import Iterator
from pathlib import Path

from experiments.doctor_checks.findings import OK, WARNING, Finding
from mac.atomic_files import load_json, visible
from mac.data.provenance import generator_record, of_meta, provenance_of
from mac.errors import UserError

SUFFIXES = (".npz", ".hdf5", ".h5")
META = "meta.json"


def check_datasets(data: Path) -> Iterator[Finding]:
    """Reports the folders with datasets: names, size and origin."""
    home, found = Path.home(), False
    for root in (
        data,
        home / ".ogbench" / "data",
        home / ".d4rl" / "datasets",
        home / ".minari" / "datasets",
    ):
        for folder, files in dataset_folders(root):
            found = True
            yield _line(folder, files)
        yield from _parts(root)
    for path in visible(data / "stores", f"*/{META}"):
        found = True
        yield _store(path)
    if not found:
        yield Finding(
            OK, "data", "none yet; run.py generates what it can, or --data.source download fetches it"
        )


def dataset_folders(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields the folders below `root` that hold datasets, with their training files."""
    by_folder: dict[Path, list[Path]] = {}
    for path in sorted(p for suffix in SUFFIXES for p in visible(root, f"**/*{suffix}")):
        if not path.stem.endswith("-val"):
            by_folder.setdefault(path.parent, []).append(path)
    yield from by_folder.items()


def _line(folder: Path, files: list[Path]) -> Finding:
    size = sum(path.stat().st_size for path in visible(folder, "*") if path.suffix in SUFFIXES)
    names = ", ".join(path.stem for path in files[:3]) + (f" and {len(files) - 3} more" if files[3:] else "")
    try:
        labels = dict.fromkeys(provenance_of([file], generator_record(file), 0).label for file in files[:3])
    except UserError as error:
        return Finding(WARNING, "data", f"{folder}: {names}", str(error))
    return Finding(OK, "data", f"{folder}: {names}, {size / 1e6:,.0f} MB; {', '.join(labels)}")


def _store(path: Path) -> Finding:
    remedy = f"delete {path.parent}; it is made again"
    try:
        meta = load_json(path)
        rows = sum(meta["train"].values())
        return Finding(OK, "store", f"{path.parent}: {rows:,} rows as {meta['dtype']}; {of_meta(meta).label}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return Finding(WARNING, "store", f"{path.parent}: damaged ({type(error).__name__})", remedy)


def _parts(root: Path) -> Iterator[Finding]:
    """Reports unfinished downloads."""
    for part in visible(root, "**/*.part"):
        if part.is_file():
            text = f"{part}: an unfinished download, {part.stat().st_size / 1e6:,.0f} MB"
            yield Finding(WARNING, "data", text, "run the same command again to continue it, or delete it")
