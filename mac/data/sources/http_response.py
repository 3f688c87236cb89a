"""HTTP response headers, parsed defensively, and the reasons of network errors."""

import re
from collections.abc import Iterator

import requests
import urllib3

from mac.errors import one_line

BLOCK = 1 << 16
"""Most bytes that are read at a time."""


def blocks(response: requests.Response) -> Iterator[bytes]:
    """The content as it arrives. A server that compresses although it was asked not to is unpacked."""
    # Not `stream`, which waits for whole blocks and would lose what came before a connection stalls.
    while block := response.raw.read1(BLOCK, decode_content=is_packed(response)):
        yield block


def is_packed(response: requests.Response) -> bool:
    """Returns whether the content was compressed for the way."""
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def stated_length(response: requests.Response) -> int | None:
    """Bytes of the content; None where the server does not say, or counts packed ones."""
    stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdecimal() and not is_packed(response) else None


def stated_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and size of the whole file, as `Content-Range` states them."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", text.strip())
    if match is None or (match[2] and int(match[2]) + 1 != int(match[3])):
        return None, None
    return (int(match[1]) if match[1] else None), int(match[3])


def version(response: requests.Response) -> str | None:
    """Returns a validator for `If-Range`: a strong ETag or the time of the last change.

    Nothing where the content was packed for this answer: its bytes are not those of a range.
    """
    if is_packed(response):
        return None
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def is_page(response: requests.Response) -> bool:
    """Returns whether the content is a web page."""
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def reason_of(error: BaseException) -> str:
    """A network error in a few words."""
    text = repr(error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError) or "timed out" in text:
        return "no byte came for too long"
    for sign, meaning in (
        ("NameResolution", "the host's name cannot be resolved"),
        ("refused", "connection refused"),
        ("IncompleteRead", "the connection ended within the file"),
        ("reset", "the connection was reset"),
        ("unreachable", "network unreachable"),
    ):
        if sign in text:
            return meaning
    return one_line(error)
