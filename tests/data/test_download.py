"""Downloads: whatever a server or a disk does, the final name never holds anything but the whole file."""

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
from mac.data.sources.http_download import Unavailable, download
from tests.helpers.faulty_server import (
    CONTENT,
    FAST,
    HASTY,
    Server,
    closed_port,
    drops,
    get,
    good,
    left,
    npz,
    refused,
    says,
    sends,
    serving,
    stalls,
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


def test_a_file_arrives_whole_and_leaves_no_part(server: Server, path: Path):
    seen: list[tuple[int, int]] = []
    receipt = get(server, path, progress=lambda done, total: seen.append((done, total)))
    assert receipt == (server.url(), len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert seen[0] == (0, len(CONTENT)) and seen[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in path.parent.iterdir()] == ["file.npz"]


def test_dropped_connections_are_resumed_at_their_last_byte(server: Server, path: Path):
    def second(handler: Any) -> None:
        span = f"bytes 90000-{len(CONTENT) - 1}/{len(CONTENT)}"
        handler.head(206, len(CONTENT) - 90_000, ETag='"one"', Content_Range=span)
        handler.send(CONTENT[90_000:100_000])

    server.plan(drops(90_000), second)
    get(server, path)
    assert [asked for _, asked, _ in server.asked] == [None, "bytes=90000-", "bytes=100000-"]
    assert {condition for *_, condition in server.asked[1:]} == {'"one"'}


def test_a_server_that_always_drops_at_the_same_byte_is_given_up(server: Server, path: Path):
    server.plan(*[drops(1000, ETag="")] * 20)
    assert "the connection ended within the file" in refused(server, path)
    assert len(server.asked) == 1 + FAST.tries


def test_a_stalled_connection_is_left_and_resumed(server: Server, path: Path):
    server.plan(stalls(50_000))
    get(server, path, HASTY)
    assert server.asked[1][1] == "bytes=50000-"


def test_a_server_that_only_stalls_is_given_up(server: Server, path: Path):
    server.plan(*[stalls(0)] * 20)
    assert "no byte arrived for too long" in refused(server, path, patience=HASTY)


def test_redirects_are_followed(server: Server, path: Path):
    server.plan(says(302, Location="/elsewhere.npz"))
    get(server, path)
    assert [where for where, *_ in server.asked] == ["/file.npz", "/elsewhere.npz"]


def test_redirects_in_a_circle_are_refused(server: Server, path: Path):
    server.plan(*[says(302, Location="/file.npz")] * 50)
    assert "the redirects never end" in refused(server, path)
    assert len(server.asked) <= FAST.redirects + 1


def test_a_stated_length_beyond_the_content_is_not_believed(server: Server, path: Path):
    """The server ends too soon each time: there is no whole file to be had, and none is made up."""
    server.plan(*[sends(CONTENT, length=len(CONTENT) + 50)] * 20)
    assert "the connection ended within the file" in refused(server, path)


def test_a_length_that_was_stated_too_long_once_does_no_harm(server: Server, path: Path):
    server.plan(sends(CONTENT, length=len(CONTENT) + 50, ETag='"one"'))
    get(server, path)
    assert [asked for _, asked, _ in server.asked] == [None, f"bytes={len(CONTENT)}-", None]


def test_a_stated_length_that_is_too_short_is_found(server: Server, path: Path):
    server.plan(sends(CONTENT, length=len(CONTENT) - 50))
    assert "cut short or damaged" in refused(server, path)
    assert left(path) is None


def test_content_that_ends_too_soon_is_asked_for_again(server: Server, path: Path):
    def unstated(handler: Any) -> None:
        handler.head(200, None)
        handler.send(CONTENT[:100_000])

    server.plan(unstated)
    get(server, path)
    assert len(server.asked) == 2


def test_a_server_that_ignores_ranges_sends_the_whole_file_anew(server: Server, path: Path):
    server.plan(drops(90_000), sends(CONTENT, ETag='"one"'))
    get(server, path)
    assert server.asked[1][1] == "bytes=90000-"


def test_a_part_that_is_the_whole_file_already_is_taken(server: Server, path: Path):
    server.plan(drops(90_000))
    with pytest.raises(KeyboardInterrupt):
        get(server, path, progress=interrupting(90_000))
    path.with_name("file.npz.part").write_bytes(CONTENT)  # killed before it got its name
    get(server, path)
    assert server.asked[-1][1] == f"bytes={len(CONTENT)}-"


def test_a_range_that_cannot_be_satisfied_begins_anew(server: Server, path: Path):
    server.plan(drops(90_000), says(416, Content_Range="bytes */70000"))
    get(server, path)
    assert [asked for _, asked, _ in server.asked] == [None, "bytes=90000-", None]


@pytest.mark.parametrize("span", ["bytes 80000-{end}/{size}", "bytes 90000-{end}/999999", "", "nonsense"])
def test_another_range_than_the_one_asked_for_is_not_appended(server: Server, path: Path, span: str):
    span = span.format(end=len(CONTENT) - 1, size=len(CONTENT))
    wrong = sends(CONTENT[90_000:], status=206, ETag='"one"', Content_Range=span)
    server.plan(drops(90_000), wrong)
    get(server, path)
    assert server.asked[2][1] is None


def test_a_partial_answer_that_was_not_asked_for_is_refused(server: Server, path: Path):
    span = f"bytes 100-{len(CONTENT) - 1}/{len(CONTENT)}"
    server.plan(*[sends(CONTENT[100:], status=206, Content_Range=span)] * 20)
    assert "another part of the file" in refused(server, path)


@pytest.mark.parametrize("status", [404, 403, 410])
def test_a_missing_file_leads_to_the_next_address(server: Server, path: Path, status: int):
    server.plan(says(status))
    receipt = download([server.url("first.npz"), server.url("second.npz")], path, patience=FAST)
    assert receipt.url == server.url("second.npz") and len(server.asked) == 2


def test_a_file_that_no_address_has_is_reported_with_all_of_them(server: Server, path: Path):
    server.plan(says(404), says(403))
    with pytest.raises(Unavailable) as caught:
        download([server.url("a.npz"), server.url("b.npz")], path, patience=FAST)
    assert "a.npz: HTTP 404" in str(caught.value) and "b.npz: HTTP 403" in str(caught.value)
    assert not caught.value.offline


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_busy_server_is_asked_again(server: Server, path: Path, status: int):
    server.plan(says(status), says(status))
    get(server, path)
    assert len(server.asked) == 3


def test_a_file_that_changed_between_attempts_is_not_spliced(server: Server, path: Path):
    old = bytes(reversed(CONTENT))

    def before(handler: Any) -> None:
        handler.head(200, len(CONTENT), ETag='"old"')
        handler.send(CONTENT[:4] + old[4:90_000])

    server.plan(before)
    get(server, path)
    assert server.asked[1][1:] == ("bytes=90000-", '"old"')  # and the server answered with all of the new


def test_a_changed_file_is_never_spliced(server: Server, path: Path):
    def before(handler: Any) -> None:
        handler.head(200, len(CONTENT), ETag='"old"')
        handler.send(CONTENT[:4] + bytes(89_996))

    span = f"bytes 90000-{len(CONTENT) - 1}/{len(CONTENT)}"
    server.plan(before, sends(CONTENT[90_000:], status=206, ETag='"one"', Content_Range=span))
    get(server, path)
    assert server.asked[2][1] is None


def test_a_server_without_versions_is_never_resumed(server: Server, path: Path):
    server.plan(sends(CONTENT[:90_000], length=len(CONTENT)))
    get(server, path)
    assert [asked for _, asked, _ in server.asked] == [None, None]


def test_the_time_of_the_last_change_is_a_version_too(server: Server, path: Path):
    when = "Wed, 21 Oct 2015 07:28:00 GMT"
    server.plan(sends(CONTENT[:90_000], length=len(CONTENT), ETag='W/"weak"', Last_Modified=when))
    get(server, path)
    assert server.asked[1][1:] == ("bytes=90000-", when)


def test_nobody_at_the_address_is_offline(path: Path):
    url = f"http://127.0.0.1:{closed_port()}/file.npz"
    with pytest.raises(Unavailable, match="connection refused") as caught:
        download([url], path, patience=FAST)
    assert caught.value.offline and not path.exists()


def interrupting(after: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    return progress


def test_ctrl_c_leaves_a_part_that_the_next_call_continues(server: Server, path: Path):
    with pytest.raises(KeyboardInterrupt):
        get(server, path, progress=interrupting(100_000))
    kept = left(path)
    assert not path.exists() and kept and CONTENT.startswith(kept) and len(kept) >= 100_000
    get(server, path)
    assert server.asked[1][1] == f"bytes={len(kept)}-"


def test_a_part_of_another_address_is_not_continued(server: Server, path: Path):
    with pytest.raises(KeyboardInterrupt):
        get(server, path, progress=interrupting(100_000))
    download([server.url("mirror.npz")], path, patience=FAST)
    assert server.asked[-1][:2] == ("/mirror.npz", None)


def test_a_good_server_is_asked_once(server: Server, path: Path):
    server.plan(good)
    get(server, path)
    assert len(server.asked) == 1


def test_a_content_in_chunks_arrives_whole(server: Server, path: Path):
    def chunked(handler: Any) -> None:
        handler.head(200, None, Transfer_Encoding="chunked", ETag='"one"')
        for i in range(0, len(CONTENT), 10_000):
            piece = CONTENT[i : i + 10_000]
            handler.send(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        handler.send(b"0\r\n\r\n")

    server.plan(chunked)
    get(server, path)
    assert len(server.asked) == 1


def test_chunks_that_end_too_soon_are_not_the_file(server: Server, path: Path):
    def chunked(handler: Any) -> None:
        handler.head(200, None, Transfer_Encoding="chunked", ETag='"one"')
        handler.send(f"{90_000:x}\r\n".encode() + CONTENT[:90_000] + b"\r\n")

    server.plan(chunked)
    get(server, path)
    assert server.asked[1][1] == "bytes=90000-"


# Downloads that arrive: checksums, formats, compression, and disks that are full.


def test_another_checksum_than_the_known_one_is_an_error(server: Server, path: Path):
    line = refused(server, path, known="0" * 64)
    assert "the file was changed or damaged at its source" in line and left(path) is None
    assert get(server, path, known=hashlib.sha256(CONTENT).hexdigest()).size == len(CONTENT)


def test_a_mirror_is_tried_after_another_checksum(server: Server, path: Path):
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


def test_a_full_disk_is_one_line_and_keeps_what_exists(server: Server, path: Path, monkeypatch: Any):
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
