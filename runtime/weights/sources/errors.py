"""The one error of this room: why a model's files could not be brought here, and what to do."""

from __future__ import annotations

from typing import Literal

from runtime.errors import FirstlightError

SourceErrorKind = Literal[
    "not_found", "gated", "revision", "no_space", "network", "verification", "invalid", "read_only"
]


class SourceError(FirstlightError):
    """A model's files could not be brought here. `kind` is what a program may act on.

    not_found: no such repository, bucket, folder or package, or it lacks a file every model has.
    gated: it exists, but these credentials (or none) do not open it.
    revision: the repository exists, the branch, tag, commit or version does not.
    no_space: the disk that holds the cache is too small for what is missing.
    network: the other end could not be reached, or kept failing after several tries.
    verification: what arrived, again and again, is not what the source says it holds.
    invalid: the reference is not written correctly, or what it names is no model.
    read_only: the cache directory cannot be made or written.
    """

    def __init__(self, kind: SourceErrorKind, message: str) -> None:
        super().__init__(message)
        self.kind = kind
