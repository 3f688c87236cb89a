"""Local HTTP server of one file, which can misbehave in the ways that tests choose."""

import contextlib
import io
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mac.data.sources.http_download import DownloadResult, RetryPolicy, download
from mac.errors import UserError

Fault = Callable[["Handler"], None]


class Handler(BaseHTTPRequestHandler):
    """Handler that shows the next fault of the server's list, and none once the list is empty."""

    protocol_version = "HTTP/1.1"
    server: "Server"

    def do_GET(self) -> None:
        self.server.asked.append((self.path, self.headers.get("Range"), self.headers.get("If-Range")))
        self.close_connection = True
        fault = next(self.server.faults, None)
        with contextlib.suppress(OSError):  # the other side may be gone
            (fault or good)(self)

    def head(self, status: int, length: int | None, **headers: str) -> None:
        self.send_response(status)
        if length is not None:
            self.send_header("Content-Length", str(length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send(self, content: bytes) -> None:
        self.wfile.write(content)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    """Attributes: `content` and `tag` of the file; `faults` to come; `asked`: path, range and condition."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, content: bytes):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.tag = content, '"one"'
        self.faults: Iterator[Fault] = iter(())
        self.asked: list[tuple[str, str | None, str | None]] = []
        self.released = threading.Event()

    def url(self, name: str = "file.npz") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def plan(self, *faults: Fault) -> None:
        self.faults = iter(faults)


@contextlib.contextmanager
def serving(content: bytes) -> Iterator[Server]:
    with Server(content) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            server.shutdown()
            thread.join()


def closed_port() -> int:
    """A port at which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def good(handler: Handler) -> None:
    """Serves the file correctly, ranges included."""
    content, tag = handler.server.content, handler.server.tag
    asked = handler.headers.get("Range")
    if asked and handler.headers.get("If-Range") == tag:
        first = int(asked.removeprefix("bytes=").rstrip("-"))
        if first >= len(content):
            handler.head(416, 0, Content_Range=f"bytes */{len(content)}")
            return
        span = f"bytes {first}-{len(content) - 1}/{len(content)}"
        handler.head(206, len(content) - first, ETag=tag, Content_Range=span)
        handler.send(content[first:])
        return
    handler.head(200, len(content), ETag=tag)
    handler.send(content)


def drops(after: int, **headers: str) -> Fault:
    """Ends the connection within the body, whose length was stated rightly."""

    def fault(handler: Handler) -> None:
        handler.head(200, len(handler.server.content), **({"ETag": handler.server.tag} | headers))
        handler.send(handler.server.content[:after])

    return fault


def stalls(after: int) -> Fault:
    """Sends nothing more, and keeps the connection open."""

    def fault(handler: Handler) -> None:
        drops(after)(handler)
        handler.server.released.wait(20)

    return fault


def says(status: int, length: int | None = 0, **headers: str) -> Fault:
    return lambda handler: handler.head(status, length, **headers)


def sends(content: bytes, length: int | None = None, status: int = 200, **headers: str) -> Fault:
    """Sends `content`, and states `length` or the truth."""

    def fault(handler: Handler) -> None:
        handler.head(status, len(content) if length is None else length, **headers)
        handler.send(content)

    return fault


# Shared by the tests of downloads.

FAST = RetryPolicy(tries=3, pause=0.001, stall=5.0)
HASTY = FAST._replace(stall=0.2)


def npz() -> bytes:
    """An archive of about 200 kB."""
    file = io.BytesIO()
    np.savez(file, observations=np.random.default_rng(0).normal(size=(500, 50)))
    return file.getvalue()


CONTENT = npz()


def get(server: Server, path: Path, patience: RetryPolicy = FAST, **more: Any) -> DownloadResult:
    return download([server.url()], path, patience=patience, **more)


def refused(server: Server, path: Path, **more: Any) -> str:
    """Returns the error line of a failed download."""
    with pytest.raises(UserError) as caught:
        get(server, path, **more)
    assert not path.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def left(path: Path) -> bytes | None:
    part = path.with_name("file.npz.part")
    return part.read_bytes() if part.exists() else None
