"""Checks that a downloaded file has the format that its extension claims."""

import zipfile
from pathlib import Path

PAGE = "sends a web page instead of the file"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_BEGINNINGS = {".npz": b"PK\x03\x04", ".hdf5": _HDF5, ".h5": _HDF5}


def looks_like(path: Path, beginning: bytes) -> str | None:
    """Returns the fault in the first bytes of a file that will be named `path`; None if there is none."""
    wanted = _BEGINNINGS.get(path.suffix, b"")
    if beginning.startswith(wanted[: len(beginning)]):
        return None
    page = beginning.lstrip()[:1] == b"<"
    return (
        "sends a web page instead of the file" if page else f"sends something that is no {path.suffix} file"
    )


def complaint(file: Path, path: Path) -> str | None:
    """Returns the fault of the complete `file` that will be named `path`; None if there is none.

    Both formats mark their end, so truncation is found even if the server stated no size.
    """
    with open(file, "rb") as stream:
        beginning = stream.read(8)
    if wrong := looks_like(path, beginning):
        return wrong
    if not beginning:
        return "sends an empty file"
    whole = True
    if path.suffix == ".npz":
        whole = zipfile.is_zipfile(file)
    elif path.suffix in (".hdf5", ".h5"):
        whole = _is_whole_hdf5(file)
    return None if whole else f"sends a {path.suffix} file that is cut short or damaged"


def _is_whole_hdf5(file: Path) -> bool:
    import h5py

    try:
        with h5py.File(file, "r"):
            return True
    except OSError:
        return False
