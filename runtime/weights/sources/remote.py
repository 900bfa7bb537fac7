"""What a source must offer so that its files can be fetched: a listing and ranged reads."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec

from runtime.weights.sources.errors import SourceError

if TYPE_CHECKING:
    from runtime.weights.sources.mover import Body


class RemoteFile(msgspec.Struct, frozen=True):
    """One file as the source lists it.

    `tag` changes whenever the content does (an ETag, a git object id). `sha256` is the content's
    digest, `git_sha1` the object id that git gives the content; either lets it be verified.
    """

    name: str
    size: int
    tag: str
    sha256: str | None = None
    git_sha1: str | None = None

    @property
    def is_verifiable(self) -> bool:
        """Whether the source gives a digest of the content."""
        return self.sha256 is not None or self.git_sha1 is not None


class RangeReply(NamedTuple):
    """An answer to a ranged read. `offset` says where in the file `body` begins: a server that knows
    no ranges answers from 0. `total` is the file's size as this answer states it, if it does."""

    offset: int
    total: int | None
    body: Body


class Transient(Exception):
    """A read that failed in a way that another try may mend. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class SourceChanged(SourceError):
    """The source replaced a file between its listing and its reading."""

    def __init__(self, message: str) -> None:
        super().__init__("verification", message)


class Remote(Protocol):
    """One version of a model at a source."""

    @property
    def where(self) -> str:
        """The source's name for messages, e.g. `hf://org/name@main`."""

    @property
    def files(self) -> Sequence[RemoteFile]:
        """The files in the model's folder, without those in folders of their own."""

    @property
    def connections(self) -> int:
        """How many ranged reads to keep going at once."""

    def open_range(self, file: RemoteFile, start: int, end: int) -> AbstractContextManager[RangeReply]:
        """Read [start, end) of a file; `end` > `start`. Called from many threads.

        Raises Transient (also while `body` is read) for what another try may mend, SourceChanged
        when the file is not the one listed, SourceError for everything that is final.
        """
