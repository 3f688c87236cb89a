"""Defensive parsing of HTTP responses, and short descriptions of network errors."""

import re
from collections.abc import Iterator

import requests
import urllib3

from mac.errors import one_line

BLOCK = 1 << 16
"""Largest number of bytes read at a time."""


def content_blocks(response: requests.Response) -> Iterator[bytes]:
    """Yields the content as it arrives, decompressed if the server compressed it against the request."""
    # Not `stream`, which waits for whole blocks and would lose the bytes before a connection stalls.
    while block := response.raw.read1(BLOCK, decode_content=is_compressed(response)):
        yield block


def is_compressed(response: requests.Response) -> bool:
    """Returns whether the content was compressed for the transfer."""
    return response.headers.get("Content-Encoding", "identity").lower() != "identity"


def stated_length(response: requests.Response) -> int | None:
    """Returns the bytes of the content; None if the server does not say, or states the compressed size."""
    stated = response.headers.get("Content-Length", "")
    return int(stated) if stated.isdecimal() and not is_compressed(response) else None


def stated_range(response: requests.Response) -> tuple[int | None, int | None]:
    """Returns first byte and size of the whole file, as `Content-Range` states them."""
    text = response.headers.get("Content-Range", "")
    match = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+)", text.strip())
    if match is None or (match[2] and int(match[2]) + 1 != int(match[3])):
        return None, None
    return (int(match[1]) if match[1] else None), int(match[3])


def version(response: requests.Response) -> str | None:
    """Returns a validator for `If-Range`: a strong ETag or the time of the last change.

    Returns None for compressed content, whose bytes are not those of a range.
    """
    if is_compressed(response):
        return None
    tag = response.headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified")


def is_page(response: requests.Response) -> bool:
    """Returns whether the content is a web page."""
    kind = response.headers.get("Content-Type", "").split(";")[0].strip().lower()
    return kind in ("text/html", "application/xhtml+xml")


def reason_of(error: BaseException) -> str:
    """Describes a network error in a few words."""
    text = repr(error)
    if isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError) or "timed out" in text:
        return "no byte arrived for too long"
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
