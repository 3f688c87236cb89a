"""Resumable download of one file, complete or not at all.

Bytes are written to `NAME.part`. The file is renamed to `NAME` once its size, format and known checksum are
verified. `NAME.part.json` records the address and version of the part (ETag, or time of the last change). A
later attempt requests the rest of that version, so a file never mixes two versions.

Errors of the network or the server are retried with exponential backoff, as long as bytes keep arriving.
Permanent errors (no such file, a web page instead of data) lead to the next address.

`requests` does the HTTP; the rest has no library that covers it. pooch does not resume a partial download,
huggingface_hub resumes only from its own hub, and urllib3's `Retry` does not continue an interrupted body.
"""

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import requests
import urllib3

from mac.atomic_files import fsync, load_json, write_json, writing
from mac.data.checksums import sha256
from mac.data.sources.file_checks import PAGE, complaint, looks_like
from mac.data.sources.http_response import blocks, is_page, reason_of, stated_length, stated_range, version
from mac.errors import UserError, one_line

_RETRYABLE_STATUS = (408, 425, 429, 500, 502, 503, 504)
_RETRYABLE = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)

Progress = Callable[[int, int], Any]
"""Callback with bytes received and bytes in all (as many as received, if the server does not say)."""


class RetryPolicy(NamedTuple):
    """Retry policy.

    Attributes:
        tries: consecutive attempts without a new byte, after which the next address is tried.
        pause: seconds before the second attempt, doubled before each further one, `longest` at most.
        stall: seconds without a byte after which a connection is closed.
        redirects: largest number of redirects of one request.
    """

    tries: int = 5
    pause: float = 1.0
    longest: float = 60.0
    stall: float = 30.0
    redirects: int = 10


class DownloadResult(NamedTuple):
    """The downloaded file and its address."""

    url: str
    size: int
    sha256: str


class Unavailable(UserError):
    """No address provides the file; `offline` if no server was reached."""

    def __init__(self, message: str, offline: bool):
        super().__init__(message)
        self.offline = offline


class _RetryableError(Exception):
    """Error that another attempt may not meet."""


class _AddressFailed(Exception):
    """Permanent error of one address."""


class _WrongChecksum(UserError):
    """The file is complete, but its checksum is not the known one."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    known: str | None = None,
    progress: Progress | None = None,
    patience: RetryPolicy | None = None,
) -> DownloadResult:
    """Downloads one file to `path`, continuing an earlier attempt where that is safe.

    Only one process may work on a file at a time; the caller holds a lock (`sources.download`).

    Args:
        urls: addresses of the same file, in the order of attempts.
        known: SHA-256 of the file, if known.
    Raises:
        Unavailable: no address provides the file; one line with the error of each.
        UserError: the file has another checksum, or the disk refuses.
    """
    errors: list[str] = []
    changed: _WrongChecksum | None = None
    reached = False
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        attempt = _Address(
            url, path, known, progress or (lambda done, total: None), patience or RetryPolicy()
        )
        try:
            return attempt.run()
        except _AddressFailed as error:
            errors.append(f"{url}: {error}")
        except _WrongChecksum as error:
            changed = error
        reached = reached or attempt.reached
    if changed is not None:
        raise changed
    raise Unavailable("; ".join(errors), offline=not reached)


class _Address:
    """Attempts at one address; `reached` once a server has answered."""

    def __init__(self, url: str, path: Path, known: str | None, progress: Progress, patience: RetryPolicy):
        self.url, self.path, self.known, self.progress, self.patience = url, path, known, progress, patience
        self.part, self.note = (path.with_name(path.name + end) for end in (".part", ".part.json"))
        self.reached = False
        self.session = requests.Session()
        self.session.max_redirects = patience.redirects
        self.session.headers.update({"Accept-Encoding": "identity", "User-Agent": "mac-jax"})

    def run(self) -> DownloadResult:
        most, idle = self._size(), 0
        while True:
            try:
                with self.session:
                    self._attempt()
                return self._finish()
            except requests.TooManyRedirects:
                raise _AddressFailed("the redirects never end") from None
            except (*_RETRYABLE, _RetryableError) as error:
                reason = str(error) if isinstance(error, _RetryableError) else reason_of(error)
            except requests.RequestException as error:
                raise _AddressFailed(one_line(error)) from None
            now = self._size()
            idle, most = (0, now) if now > most else (idle + 1, most)
            # A missing network gets fewer attempts than a server that answers.
            if idle >= (self.patience.tries if self.reached else min(self.patience.tries, 2)):
                raise _AddressFailed(reason)
            time.sleep(min(self.patience.pause * 2**idle, self.patience.longest))

    def _attempt(self) -> None:
        """Makes one request; returns when the part is complete according to the server."""
        start, recorded = self._size(), _read(self.note)
        resume = start > 0 and recorded.get("url") == self.url and bool(recorded.get("version"))
        headers = {"Range": f"bytes={start}-", "If-Range": recorded["version"]} if resume else {}
        timeout = (min(self.patience.stall, 10.0), self.patience.stall)
        with self.session.get(self.url, headers=headers, stream=True, timeout=timeout) as response:
            self.reached = True
            if response.status_code == 416 and resume:
                if recorded.get("size") == start and stated_range(response)[1] in (None, start):
                    return
                self._forget()
                raise _RetryableError("the server and this machine disagree on the file's size")
            if response.status_code not in (200, 206):
                kind = _RetryableError if response.status_code in _RETRYABLE_STATUS else _AddressFailed
                raise kind(f"HTTP {response.status_code} {response.reason}")
            if response.status_code == 206:
                self._check_rest(response, start, recorded, resume)
                total = stated_range(response)[1]
            else:
                start, total = 0, stated_length(response)
                if is_page(response):
                    raise _AddressFailed(PAGE)
                size = {} if total is None else {"size": total}
                with writing(self.note):
                    self.part.write_bytes(b"")
                write_json(self.note, {"url": self.url, "version": version(response)} | size)
            self._check_room((total or 0) - start)
            self._receive(response, start, total)

    def _check_rest(
        self, response: requests.Response, start: int, recorded: dict[str, Any], resume: bool
    ) -> None:
        """Checks that a partial response is the rest of the part, of the same version."""
        first, total = stated_range(response)
        fits = first == start and total is not None and recorded.get("size") in (None, total)
        if not resume or not fits or version(response) not in (None, recorded["version"]):
            self._forget()
            raise _RetryableError("the server sent another part of the file than requested")

    def _receive(self, response: requests.Response, start: int, total: int | None) -> None:
        done = start
        with self._open(start) as file:
            self.progress(done, total or done)
            for block in blocks(response):
                if done == 0 and (wrong := looks_like(self.path, block)):
                    raise _AddressFailed(wrong)
                with writing(self.part):
                    file.write(block)
                done += len(block)
                if total is not None and done > total:
                    self._forget()
                    raise _RetryableError(f"more than the {total:,} bytes that the server stated")
                self.progress(done, total or done)
        if total is not None and done < total:
            raise _RetryableError(f"the connection ended after {done:,} of {total:,} bytes")

    @contextlib.contextmanager
    def _open(self, start: int) -> Iterator[IO[bytes]]:
        """Opens the part, cut to `start` bytes; flushes it to the disk (`fsync`) in any case."""
        with writing(self.part):
            file = open(self.part, "r+b")  # noqa: SIM115
        with file:
            file.truncate(start)
            file.seek(start)
            try:
                yield file
            finally:
                with writing(self.part):
                    fsync(file)

    def _finish(self) -> DownloadResult:
        """Checks the part, and renames it."""
        if wrong := complaint(self.part, self.path):
            stated = "size" in _read(self.note)
            self._forget()
            # A server that stated the size would send the same bytes again.
            raise _AddressFailed(wrong) if stated else _RetryableError(wrong)
        found = sha256(self.part)
        if self.known is not None and self.known != found:
            self._forget()
            raise _WrongChecksum(
                f"{self.url}: checksum of {self.path.name} is {found[:12]}..., "
                f"expected {self.known[:12]}...; "
                "the file was changed or damaged at its source"
            )
        result = DownloadResult(self.url, self._size(), found)
        with writing(self.path):
            self.part.replace(self.path)
            self.note.unlink(missing_ok=True)
        return result

    def _check_room(self, need: int) -> None:
        free = shutil.disk_usage(self.path.parent).free
        if need > free:
            raise UserError(
                f"{self.path.parent}: {need / 1e6:,.0f} MB are needed to download {self.path.name}, "
                f"{free / 1e6:,.0f} MB are free; free some space or choose another --data.dir"
            )

    def _size(self) -> int:
        try:
            return self.part.stat().st_size
        except OSError:
            return 0

    def _forget(self) -> None:
        """Deletes the part, so that the next attempt starts over."""
        with writing(self.part):
            self.part.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = load_json(path)
        return found if isinstance(found, dict) else {}
    return {}
