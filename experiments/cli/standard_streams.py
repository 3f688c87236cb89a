"""Standard output and error that may fail: the log's disk is full, the reader gone, the terminal ASCII.

What cannot be written is dropped, so that no output ends a job of hours. Characters that the terminal's
encoding lacks are replaced by plain ones. Imports only Python's own modules, since `doctor.py` uses it.
"""

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple, TextIO

_PLAIN = {
    "–": "-", "—": "-", "−": "-", "·": ".", "×": "x", "…": "...", "→": "->", "±": "+-", "≤": "<=", "≥": ">=",
    "’": "'", "“": '"', "”": '"', "²": "2", "α": "alpha", "β": "beta", "γ": "gamma", "λ": "lambda", "τ": "tau"
}  # fmt: skip
_HANDLER = "experiments.cli.standard_streams.plain"


class _Tolerant(io.FileIO):
    """An open file whose writes never fail.

    Attributes:
        failure: the first error that was swallowed.
        told: who is told of it at once, since the work goes on; None if the output is all that was asked for.
    """

    def __init__(self, descriptor: int):
        super().__init__(descriptor, "w", closefd=False)
        self.failure: OSError | None = None
        self.told: TextIO | None = None

    def write(self, data: Any, /) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
        except OSError as error:
            if self.failure is None:
                self.failure = error
                self.tell_of_failure()
            return size
        return size if written is None else written  # None: it does not block, and is full now

    def tell_of_failure(self) -> None:
        """Says once that the work goes on, if it does and something was lost."""
        if self.failure and self.told:
            text = f"note: standard output cannot be written ({self.failure.strerror}); the work goes on"
            print(text, file=self.told, flush=True)


class Output(io.TextIOWrapper):
    """A standard stream of the process, through a `_Tolerant` file."""

    def __init__(self, stream: io.TextIOWrapper):
        stream.flush()
        self.file = _Tolerant(stream.fileno())
        # `python -u` has no buffer.
        buffered = isinstance(stream.buffer, io.BufferedWriter)
        super().__init__(
            io.BufferedWriter(self.file) if buffered else self.file,  # pyright: ignore[reportArgumentType]
            encoding=stream.encoding,
            errors=_HANDLER,
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )


class Streams(NamedTuple):
    """The process's streams while `standard_streams` is entered."""

    out: TextIO
    err: TextIO

    def outlive(self) -> None:
        """Declares that the work goes on, and may succeed, without its output; a note says so if it must."""
        if isinstance(self.out, Output):
            self.out.file.told = self.err
            self.out.file.tell_of_failure()

    def verdict(self, status: int) -> int:
        """The exit status of a program that would end with `status`, where its output is what was asked for.

        Unless the work outlives its output, a failure of that turns 0 into 128 + SIGPIPE if the reader is
        gone, as in `| head`, else into 2.
        """
        with contextlib.suppress(OSError):
            self.out.flush()
        file = self.out.file if isinstance(self.out, Output) else None
        if status or file is None or file.told or (failure := file.failure) is None:
            return status
        if failure.errno == errno.EPIPE:
            return 128 + getattr(signal, "SIGPIPE", 13)
        print(f"error: cannot write standard output: {failure.strerror}", file=self.err)
        return 2


@contextlib.contextmanager
def standard_streams() -> Iterator[Streams]:
    """Makes `sys.stdout` and `sys.stderr` tolerant while entered.

    Streams that are no open files, such as those of tests, stay as they are. One that is closed becomes the
    null device.
    """
    codecs.register_error(_HANDLER, _plain)
    before = sys.stdout, sys.stderr
    with contextlib.ExitStack() as stack:
        streams = Streams(*(_tolerant(stream, stack) for stream in before))
        sys.stdout, sys.stderr = streams
        try:
            yield streams
        finally:
            sys.stdout, sys.stderr = before


def ignore_write_errors() -> None:
    """Declares, within `standard_streams`, that the work that begins is worth more than what it prints."""
    Streams(sys.stdout, sys.stderr).outlive()


def _tolerant(stream: TextIO | None, stack: contextlib.ExitStack) -> TextIO:
    if stream is None:  # closed by the shell: `>&-`
        return stack.enter_context(open(os.devnull, "w"))
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        made = Output(stream)
    except OSError:  # it has no descriptor, or a closed one
        return stream
    stack.callback(made.flush)
    return made


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Replaces a character that an encoding lacks; undecodable bytes of a file's name stay as they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    letter = error.object[error.start]
    if "\udc80" <= letter <= "\udcff":
        return bytes([ord(letter) - 0xDC00]), error.start + 1
    return _PLAIN.get(letter, "?"), error.start + 1
