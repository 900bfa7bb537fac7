"""Reading HTTP's headers about ranges and retries, for every source that speaks HTTP."""

from __future__ import annotations

import re
from collections.abc import Mapping

from runtime.weights.sources.remote import Transient

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that the server asks to wait, if it says so in seconds."""
    text = headers.get("Retry-After") or ""
    return float(text) if text.isdigit() else None


def body_range(status: int, headers: Mapping[str, str]) -> tuple[int, int | None]:
    """Where in the file the body begins, and the file's size if the headers state it.

    Some servers answer 200 and still send a range and say so; without a Content-Range the body is the
    whole file. Raises Transient for a part of a file that does not say which part it is.
    """
    stated = _CONTENT_RANGE.fullmatch(headers.get("Content-Range") or "")
    if stated:
        return int(stated[1]), None if stated[3] == "*" else int(stated[3])
    if status == 206:
        raise Transient("a part of the file came without saying which part (no Content-Range)")
    length = headers.get("Content-Length") or ""
    return 0, int(length) if status == 200 and length.isdigit() else None
