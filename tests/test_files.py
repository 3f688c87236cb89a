"""Files that are written whole or not at all."""

import os
import re
from pathlib import Path
from typing import IO

import pytest

from mac.errors import UserError
from mac.files import read_json, replace_file, write_json


def half(file: IO[bytes]) -> None:
    file.write(b"half")
    file.flush()
    raise KeyboardInterrupt


@pytest.mark.parametrize("aside", [None, "elsewhere.part"])
def test_a_file_is_replaced_by_all_of_its_new_content_or_not_at_all(aside: str | None, tmp_path: Path):
    path, part = tmp_path / "new folder" / "a", tmp_path / aside if aside else None
    replace_file(path, lambda file: file.write(b"old"), part=part)
    with pytest.raises(KeyboardInterrupt):
        replace_file(path, half, part=part)
    assert path.read_bytes() == b"old"
    replace_file(path, lambda file: file.write(b"new"), part=part)
    assert [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()] == [b"new"]


def test_content_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, part, synced = tmp_path / "a", tmp_path / "a.part", []

    def fsync(descriptor: int) -> None:
        synced.append((part.read_bytes(), path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    replace_file(path, lambda file: file.write(b"new"), part=part)
    assert synced == [(b"new", False)] and path.read_bytes() == b"new"


def test_what_the_disk_refuses_is_one_line_that_names_the_file(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "a.json"
    with pytest.raises(UserError, match=f"^cannot write {re.escape(str(path))}: [^\n]+ another folder$"):
        write_json(path, {})


def test_json_is_read_as_it_was_written_or_refused_by_name(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, None, "é"], "path": Path("b")})
    assert read_json(path) == {"a": [1, None, "é"], "path": "b"}
    for content, message in ((b"{", "is not JSON"), (b"\xff", "is not JSON")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"{path} {message}"):
            read_json(path)
    with pytest.raises(UserError, match="cannot read"):
        read_json(tmp_path / "nothing")
