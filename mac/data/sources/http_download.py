"""One file from the network, whole or not at all.

The file grows as `NAME.part` and takes its name when it is complete, of the stated size, of the format that
its name says, and of the checksum that is known of it. `NAME.part.json` notes which version of which address
the part is of (ETag, or the time of the last change): a later attempt asks for the rest of that version, so
that no file is ever put together from two.

What the network or the server does wrong is tried again, with growing pauses, as long as bytes keep coming;
what will not change by waiting (no such file, a page instead of data) leads to the next address.
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

_LATER = (408, 425, 429, 500, 502, 503, 504)  # states of a server that pass
_AGAIN = (requests.ConnectionError, requests.Timeout, urllib3.exceptions.HTTPError)

Progress = Callable[[int, int], Any]
"""Called with bytes that are here and bytes in all (as many as are here, where the server does not say)."""


class RetryPolicy(NamedTuple):
    """Retry policy.

    Attributes:
        tries: attempts in a row that bring no new byte, after which the next address is tried.
        pause: seconds before the second attempt, doubled before each further one, `longest` at most.
        stall: seconds without a byte after which a connection is given up.
        redirects: of one request.
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
    """No address gave the file; `offline` if none could even be reached."""

    def __init__(self, message: str, offline: bool):
        super().__init__(message)
        self.offline = offline


class _Again(Exception):
    """Something that another attempt may not meet."""


class _Elsewhere(Exception):
    """Something that this address will not mend."""


class _Changed(UserError):
    """The file is whole, and is not the one that is wanted."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    known: str | None = None,
    progress: Progress | None = None,
    patience: RetryPolicy | None = None,
) -> DownloadResult:
    """Brings one file to `path`, continuing an earlier attempt where that is safe.

    Only one process may work on a file at a time; the caller sees to that (`download`).

    Args:
        urls: addresses of the same file, in the order in which they are tried.
        known: its SHA-256, if it is known.
    Raises:
        Unavailable: no address gave the file; one line with what each said.
        UserError: it has another checksum, or the disk refuses.
    """
    said: list[str] = []
    changed: _Changed | None = None
    reached = False
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    for url in urls:
        attempt = _Address(
            url, path, known, progress or (lambda done, total: None), patience or RetryPolicy()
        )
        try:
            return attempt.run()
        except _Elsewhere as error:
            said.append(f"{url}: {error}")
        except _Changed as error:
            changed = error
        reached = reached or attempt.reached
    if changed is not None:
        raise changed
    raise Unavailable("; ".join(said), offline=not reached)


class _Address:
    """The attempts at one address. `reached` says whether a server ever answered."""

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
                raise _Elsewhere("the redirects never end") from None
            except (*_AGAIN, _Again) as error:
                reason = str(error) if isinstance(error, _Again) else reason_of(error)
            except requests.RequestException as error:
                raise _Elsewhere(one_line(error)) from None
            now = self._size()
            idle, most = (0, now) if now > most else (idle + 1, most)
            # A network that is not there is not waited for as long as a server that is.
            if idle >= (self.patience.tries if self.reached else min(self.patience.tries, 2)):
                raise _Elsewhere(reason)
            time.sleep(min(self.patience.pause * 2**idle, self.patience.longest))

    def _attempt(self) -> None:
        """One request; returns when the part is complete as far as the server says."""
        here, noted = self._size(), _read(self.note)
        resume = here > 0 and noted.get("url") == self.url and bool(noted.get("version"))
        asked = {"Range": f"bytes={here}-", "If-Range": noted["version"]} if resume else {}
        timeout = (min(self.patience.stall, 10.0), self.patience.stall)
        with self.session.get(self.url, headers=asked, stream=True, timeout=timeout) as response:
            self.reached = True
            if response.status_code == 416 and resume:
                if noted.get("size") == here and stated_range(response)[1] in (None, here):
                    return
                self._forget()
                raise _Again("the server and this machine disagree on the file's size")
            if response.status_code not in (200, 206):
                kind = _Again if response.status_code in _LATER else _Elsewhere
                raise kind(f"HTTP {response.status_code} {response.reason}")
            if response.status_code == 206:
                self._check_rest(response, here, noted, resume)
                total = stated_range(response)[1]
            else:
                here, total = 0, stated_length(response)
                if is_page(response):
                    raise _Elsewhere(PAGE)
                size = {} if total is None else {"size": total}
                with writing(self.note):
                    self.part.write_bytes(b"")
                write_json(self.note, {"url": self.url, "version": version(response)} | size)
            self._check_room((total or 0) - here)
            self._receive(response, here, total)

    def _check_rest(
        self, response: requests.Response, here: int, noted: dict[str, Any], resume: bool
    ) -> None:
        """A partial answer must be the rest of the partial file, of the same version."""
        first, total = stated_range(response)
        fits = first == here and total is not None and noted.get("size") in (None, total)
        if not resume or not fits or version(response) not in (None, noted["version"]):
            self._forget()
            raise _Again("the server sent another part of the file than was asked for")

    def _receive(self, response: requests.Response, here: int, total: int | None) -> None:
        done = here
        with self._open(here) as file:
            self.progress(done, total or done)
            for block in blocks(response):
                if done == 0 and (wrong := looks_like(self.path, block)):
                    raise _Elsewhere(wrong)
                with writing(self.part):
                    file.write(block)
                done += len(block)
                if total is not None and done > total:
                    self._forget()
                    raise _Again(f"more than the {total:,} bytes that the server stated")
                self.progress(done, total or done)
        if total is not None and done < total:
            raise _Again(f"the connection ended after {done:,} of {total:,} bytes")

    @contextlib.contextmanager
    def _open(self, here: int) -> Iterator[IO[bytes]]:
        """The part, cut to `here` bytes; what was written is on the disk however this ends."""
        with writing(self.part):
            file = open(self.part, "r+b")  # noqa: SIM115
        with file:
            file.truncate(here)
            file.seek(here)
            try:
                yield file
            finally:
                with writing(self.part):
                    fsync(file)

    def _finish(self) -> DownloadResult:
        """Checks the part, and gives it its name."""
        if wrong := complaint(self.part, self.path):
            stated = "size" in _read(self.note)
            self._forget()
            # A server that stated what it sent will send the same again.
            raise _Elsewhere(wrong) if stated else _Again(wrong)
        found = sha256(self.part)
        if self.known is not None and self.known != found:
            self._forget()
            raise _Changed(
                f"{self.url}: has the checksum {found[:12]}..., and {self.path.name} is known to have "
                f"{self.known[:12]}...; the file was changed or damaged there"
            )
        receipt = DownloadResult(self.url, self._size(), found)
        with writing(self.path):
            self.part.replace(self.path)
            self.note.unlink(missing_ok=True)
        return receipt

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
        """Begins anew at the next attempt."""
        with writing(self.part):
            self.part.unlink(missing_ok=True)
            self.note.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = load_json(path)
        return found if isinstance(found, dict) else {}
    return {}
