"""Reading a model's file while it still comes, from this process and from another."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from runtime.weights.sources import FetchProgress, fetch
from runtime.weights.sources import transfer as transfer_module
from runtime.weights.sources.landing import Landing, Replaced
from runtime.weights.sources.partial import Stopped
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import NEEDED, model_files, spec

SPEC = spec("hf://org/name")
NAME = "model.safetensors"
SIZE = 4_000_000
RANGE = 1_000_000
# What a connection has sent of its range when it pauses, and what of it is on the disk then.
SENT, LANDED = 600_000, 500_000


@pytest.fixture(autouse=True)
def _small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer_module, "RANGE_BYTES", RANGE)
    monkeypatch.setattr(transfer_module, "BLOCK_BYTES", RANGE // 10)


@pytest.fixture
def stop() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def content(hub: HubServer) -> bytes:
    files = model_files(SIZE)
    hub.add_repo("org/name", files)
    return files[NAME]


class _Fetching:
    """A fetch in a thread. `directory` waits until the weights begin to come."""

    def __init__(self, cache_dir: Path) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._known = threading.Event()
        self._directory: Path | None = None
        self.result = self._pool.submit(fetch, SPEC, cache_dir, self._on_progress)

    def _on_progress(self, progress: FetchProgress) -> None:
        self._directory = progress.directory
        if progress.directory:
            self._known.set()

    @property
    def directory(self) -> Path:
        assert self._known.wait(30)
        assert self._directory is not None
        return self._directory


class _Reader:
    """The weights' file, read while it comes."""

    def __init__(self, directory: Path, stop: threading.Event) -> None:
        self.landing = Landing(directory, stop)
        self._file = directory / NAME
        self._descriptor = self.landing.open(self._file)

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.landing.close()
        os.close(self._descriptor)

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), waited for."""
        self.landing.wait(self._file, start, stop)
        return os.pread(self._descriptor, stop - start, start)


def test_bytes_can_be_read_as_soon_as_they_are_there(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    released = threading.Event()
    hub.fail("/storage/", pause=lambda: released.wait(60), pause_after=SENT, times=4)
    fetching = _Fetching(cache_dir)
    with _Reader(fetching.directory, stop) as reader:
        for start in range(0, SIZE, RANGE):
            assert reader.read(start, start + LANDED) == content[start : start + LANDED]
        assert not reader.landing.verified()
        released.set()
        assert reader.read(0, SIZE) == content
        fetching.result.result(30)
        assert reader.landing.verified()


def test_the_names_are_known_before_the_files_are_there(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    released = threading.Event()
    hub.fail("/storage/", pause=lambda: released.wait(60), times=4)
    fetching = _Fetching(cache_dir)
    landing = Landing(fetching.directory, stop)
    assert landing.names(fetching.directory) >= NEEDED
    assert not (fetching.directory / NAME).exists()
    released.set()
    fetching.result.result(30)
    assert landing.names(fetching.directory) >= NEEDED


def test_who_waits_for_a_fetch_that_fails_can_be_stopped(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    hub.fail("/storage/", cut_after=RANGE // 2, times=4)
    hub.fail("/storage/", status=500, times=1000)
    fetching = _Fetching(cache_dir)
    with _Reader(fetching.directory, stop) as reader:
        fetching.result.add_done_callback(lambda done: stop.set())
        with pytest.raises(Stopped):
            reader.read(0, SIZE)
        assert not reader.landing.verified()


def test_what_was_read_of_a_file_that_fails_verification_is_not_believed(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    read_wrong, released = threading.Event(), threading.Event()
    hub.fail("/storage/", corrupt=True, pause=lambda: read_wrong.wait(60), pause_after=SENT, times=4)
    hub.fail("/storage/", pause=lambda: released.wait(60), pause_after=SENT, times=4)
    fetching = _Fetching(cache_dir)
    with _Reader(fetching.directory, stop) as reader:
        assert reader.read(0, LANDED) != content[:LANDED]
        read_wrong.set()
        with pytest.raises(Replaced):
            while not reader.landing.verified():
                reader.read(0, SIZE)
        with pytest.raises(Replaced):
            reader.landing.open(fetching.directory / NAME)
        # It was read from once more, and what was read first is not what has become the model.
        with _Reader(fetching.directory, stop) as again:
            released.set()
            assert again.read(0, SIZE) == content
            fetching.result.result(30)
            assert (reader.landing.verified(), again.landing.verified()) == (False, True)


def test_a_file_in_the_place_of_another_is_never_taken_for_it(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    """Though nobody else has the first one open any more, so that its inode is free for the second."""
    hub.fail("/storage/", corrupt=True, times=4)
    for _ in range(5):
        fetching = _Fetching(cache_dir)
        landing = Landing(fetching.directory, stop)
        descriptor = landing.open(fetching.directory / NAME)
        try:
            landing.wait(fetching.directory / NAME, 0, 1)
            wrong = os.pread(descriptor, 1, 0) != content[:1]
        except Replaced:  # as soon as that
            wrong = True
        os.close(descriptor)
        directory = fetching.result.result(30)
        assert landing.verified() != wrong
        landing.close()
        shutil.rmtree(directory)
        hub.fail("/storage/", corrupt=True, times=4)


def test_another_process_may_fetch(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    script = """
import sys
from pathlib import Path
from runtime.catalogue import ModelSpec
from runtime.weights.sources import fetch
fetch(ModelSpec(id="model", source="hf://org/name"), Path(sys.argv[1]))
"""
    with subprocess.Popen([sys.executable, "-c", script, str(cache_dir)]) as other:
        # This one finds the entry locked and reports how far the other is.
        fetching = _Fetching(cache_dir)
        with _Reader(fetching.directory, stop) as reader:
            assert reader.read(0, SIZE) == content
            fetching.result.result(30)
            assert reader.landing.verified()
    assert other.returncode == 0


def test_a_file_that_is_there_needs_no_waiting(
    hub: HubServer, content: bytes, cache_dir: Path, stop: threading.Event
) -> None:
    with _Reader(fetch(SPEC, cache_dir), stop) as reader:
        assert reader.read(0, SIZE) == content
        assert reader.landing.verified()
