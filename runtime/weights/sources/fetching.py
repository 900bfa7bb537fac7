"""One version of a remote model -> a published cache entry: what Hub and S3 have in common."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.weights.sources.cache import Entry, explained, require_space
from runtime.weights.sources.journal import Journal, read_manifest, read_records
from runtime.weights.sources.pickles import convert_into
from runtime.weights.sources.progress import FetchProgress
from runtime.weights.sources.remote import Remote, RemoteFile
from runtime.weights.sources.selection import (
    SAFETENSORS_INDEX,
    is_pickled,
    is_small,
    is_weight_candidate,
    require_config,
    weight_files,
)
from runtime.weights.sources.transfer import Download

OnProgress = Callable[[FetchProgress], None]


def bring(remote: Remote, source: str, entry: Entry, on_progress: OnProgress) -> Path:
    """Complete the entry from `remote` and return its directory.

    Small files come first, so that `on_progress` gets the directory while the weights still come.
    While another process brings the same entry this one waits, reports that one's progress, and then
    finds the entry complete. `source` is the normal form of the reference, for the entry's marker.
    """
    # A complete entry is only read, so it may lie on a disk that cannot be written.
    if entry.complete():
        return entry.directory
    names = {file.name for file in remote.files}
    require_config(names, remote.where)
    with explained(entry.model_dir), entry.locked(lambda: _report_other(entry, on_progress)):
        if not entry.complete():
            entry.sweep()
            doubtful = entry.is_doubtful
            entry.directory.mkdir(parents=True, exist_ok=True)
            entry.partial.mkdir(exist_ok=True)
            files = [f for f in remote.files if is_small(f.name) or is_weight_candidate(f.name)]
            journal = Journal(entry.partial, files)
            try:
                doubtful = doubtful or journal.went_down
                chosen = _download(remote, entry, files, journal, doubtful, on_progress)
            finally:
                journal.close()
            _publish(entry, source, {file.name: file.size for file in chosen}, on_progress)
    return entry.directory


def _publish(entry: Entry, source: str, files: dict[str, int], on_progress: OnProgress) -> None:
    """Publish these files, which are in place; pickled weights are converted first."""
    pickled = [name for name in files if is_pickled(name)]
    if pickled:
        files |= convert_into(entry, entry.directory, pickled, on_progress)
    entry.publish(source, {name: size for name, size in files.items() if name not in pickled})
    for name in pickled:
        (entry.directory / name).unlink()


def _download(
    remote: Remote,
    entry: Entry,
    files: list[RemoteFile],
    journal: Journal,
    doubtful: bool,
    on_progress: OnProgress,
) -> list[RemoteFile]:
    download = Download(remote, journal, entry.partial, entry.directory)
    download.drop_damaged(files, doubtful)
    chosen = files
    directory: Path | None = None

    def report() -> None:
        done = sum(download.bytes_done(file) for file in chosen)
        total = sum(file.size for file in chosen)
        on_progress(FetchProgress(bytes_done=done, bytes_total=total, directory=directory))

    small = [file for file in files if is_small(file.name)]
    require_space(entry.partial, sum(file.size - download.bytes_done(file) for file in small))
    download.run(small, report)
    wanted = weight_files({file.name for file in remote.files}, _index(entry), remote.where)
    weights = [file for name in wanted for file in files if file.name == name]
    chosen = small + weights
    journal.choose([file.name for file in chosen])
    require_space(entry.partial, sum(file.size - download.bytes_done(file) for file in weights))
    directory = entry.directory
    report()
    download.run(weights, report)
    return chosen


def _index(entry: Entry) -> bytes | None:
    try:
        return (entry.directory / SAFETENSORS_INDEX).read_bytes()
    except FileNotFoundError:
        return None


def _report_other(entry: Entry, on_progress: OnProgress) -> None:
    """Report how far the process that holds the entry's lock has come."""
    manifest = read_manifest(entry.partial)
    if manifest is None:
        on_progress(FetchProgress(bytes_done=0, bytes_total=0))
        return
    done = read_records(entry.partial, len(manifest.files))
    chosen = set(manifest.chosen)
    pairs = [(f, d) for f, d in zip(manifest.files, done, strict=True) if not chosen or f.name in chosen]
    on_progress(
        FetchProgress(
            bytes_done=sum(done.total for _, done in pairs),
            bytes_total=sum(file.size for file, _ in pairs),
            # The weights are chosen once the small files are in place.
            directory=entry.directory if chosen else None,
        )
    )
