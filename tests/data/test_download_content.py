"""Downloads that arrive: checksums, formats, compression, and disks that are full."""

import contextlib
import errno
import gzip
import hashlib
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mac.data.sources import http_download
from mac.data.sources.http_download import download
from tests.helpers.faulty_server import (
    CONTENT,
    FAST,
    Server,
    get,
    left,
    npz,
    refused,
    sends,
    serving,
)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(CONTENT) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    """Where the file is to be; afterwards it is not there, or whole."""
    path = tmp_path / "file.npz"
    yield path
    assert not path.exists() or path.read_bytes() == CONTENT


def test_another_checksum_than_the_known_one_is_an_error(server: Server, path: Path):
    line = refused(server, path, known="0" * 64)
    assert "the file was changed or damaged there" in line and left(path) is None
    assert get(server, path, known=hashlib.sha256(CONTENT).hexdigest()).size == len(CONTENT)


def test_a_mirror_is_tried_where_the_first_address_has_another_checksum(server: Server, path: Path):
    other = npz()[:-30] + b"\0" * 8 + npz()[-22:]
    server.plan(sends(other))
    known = hashlib.sha256(CONTENT).hexdigest()
    urls = [server.url("first.npz"), server.url("second.npz")]
    assert download(urls, path, known=known, patience=FAST).url == urls[1]


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_a_web_page_is_not_taken_for_the_file(server: Server, path: Path, kind: str):
    page = b"<!DOCTYPE html><html>Sign in to the network</html>"
    server.plan(*[sends(page, Content_Type=kind)] * 20)
    assert "a web page instead of the file" in refused(server, path)
    assert len(server.asked) == 1


def test_another_format_is_refused_at_its_first_bytes(server: Server, path: Path):
    server.plan(sends(b"\x89HDF\r\n\x1a\n" + bytes(1000)))
    assert "no .npz file" in refused(server, path)


def test_a_full_disk_is_found_before_anything_is_written(server: Server, path: Path, monkeypatch: Any):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6, 1000))
    line = refused(server, path)
    assert "MB are free" in line and "--data.dir" in line and left(path) == b""


def test_a_disk_that_fills_up_is_one_line_and_keeps_what_is_there(
    server: Server, path: Path, monkeypatch: Any
):
    real_open = http_download._Address._open

    def failing(self: Any, here: int) -> Any:
        return opened(real_open(self, here))

    class Disk:
        def __init__(self, file: Any):
            self.file, self.count = file, 0

        def write(self, block: bytes) -> None:
            self.count += 1
            if self.count > 1:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.file.write(block)

    @contextlib.contextmanager
    def opened(inner: Any) -> Iterator[Any]:
        with inner as file:
            yield Disk(file)

    monkeypatch.setattr(http_download._Address, "_open", failing)
    assert "No space left on device" in refused(server, path)
    kept = len(left(path) or b"")
    monkeypatch.undo()
    get(server, path)
    assert kept > 0 and server.asked[-1][1] == f"bytes={kept}-"


def test_a_content_that_is_packed_unasked_is_unpacked(server: Server, path: Path):
    server.plan(sends(gzip.compress(CONTENT), Content_Encoding="gzip", ETag='"one"'))
    get(server, path)
    assert path.read_bytes() == CONTENT


def test_a_packed_content_is_not_resumed(server: Server, path: Path):
    packed = gzip.compress(CONTENT)
    server.plan(sends(packed[:90_000], length=len(packed), Content_Encoding="gzip", ETag='"one"'))
    get(server, path)
    assert [asked for _, asked, _ in server.asked] == [None, None]
