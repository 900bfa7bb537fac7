"""Which bytes of a model's files have landed, for who wants them on before the whole files are there.

    landing = Landing(progress.directory, stop)             # `directory` as `fetch` reports it
    descriptor = landing.open(directory / "model.safetensors")
    landing.wait(directory / "model.safetensors", 0, 8 << 20)
    os.preadv(descriptor, [buffer], 0)
    ...                                       # `fetch` returns, in the thread or process that it runs in
    landing.verified()                        # now what was read may be believed, or must be read again

What landed is not verified yet. A file that fails verification is fetched once more, into a new file.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from runtime.weights.sources import transfer
from runtime.weights.sources.cache import partial_dir
from runtime.weights.sources.journal import Records, read_manifest
from runtime.weights.sources.partial import Stopped
from runtime.weights.sources.selection import is_pickled, is_weight_candidate

_POLL_S = 0.003


class Replaced(Exception):
    """What was read of the named file was not what it should hold: open it again, and read it again."""


class Landing:
    """A model's files while they come, whichever process of this host fetches them; a `Gate`.

    Descriptors stay valid when files move to their final place. Every wait ends with Stopped once `stop`
    is set, as it should be when the `fetch` that is waited for ends.
    """

    def __init__(self, directory: Path, stop: threading.Event) -> None:
        self._directory = directory
        self._partial = partial_dir(directory)
        self._stop = stop
        self._lock = threading.Lock()
        self._records: Records | None = None
        self._indices: dict[str, int] = {}
        self._numbers: dict[str, int] = {}
        # The file behind every name, kept open: another could get its inode otherwise, and pass for it.
        self._opened: dict[str, int] = {}

    def names(self, directory: Path) -> set[str]:
        """The names that the model's files have or will have in its directory.

        Pickled weights have to come whole, and be converted, before there is anything to read.
        """
        while True:
            manifest = read_manifest(self._partial)
            if manifest is None:
                return {path.name for path in directory.iterdir()}
            if not any(is_pickled(name) for name in manifest.chosen):
                return set(manifest.chosen)
            self._pause()

    def open(self, file: Path) -> int:
        """A descriptor of the file, once that has its full size. Raises Replaced and Stopped."""
        while (descriptor := self._try_open(file.name)) is None:
            self._pause()
        with self._lock:
            if file.name not in self._opened:
                self._opened[file.name] = os.dup(descriptor)
        if not os.path.sameopenfile(self._opened[file.name], descriptor):
            os.close(descriptor)
            raise Replaced(file.name)
        return descriptor

    def wait(self, file: Path, start: int, stop: int) -> None:
        """Wait until the bytes [start, stop) can be read. Raises Replaced and Stopped."""
        while not self._in_place(file.name):
            landed = self._landed(file.name, start, stop)
            # Looked at after the records: those of the file in whose place another came may say more.
            if not (self._is_at(self._partial, file.name) or self._in_place(file.name)):
                raise Replaced(file.name)
            if landed:
                return
            self._pause()

    def turn(self, file: Path, start: int) -> tuple[int, int]:
        """The order in which the files' bytes are asked for."""
        with self._lock:
            if not self._numbers:
                self._numbers = {name: i for i, name in enumerate(_weights(self._partial))}
        return transfer.turn(self._numbers.get(file.name, 0), start)

    def verified(self) -> bool:
        """Whether every file that was opened is whole and holds what it should, as far as is known."""
        with self._lock:
            return all(self._in_place(name) for name in self._opened)

    def check(self) -> bool:
        """Like `verified`, but raises Replaced as soon as one of them is known to hold something else."""
        with self._lock:
            for name in self._opened:
                # In this order: it may be moved from the one place to the other meanwhile.
                if not (self._is_at(self._partial, name) or self._in_place(name)):
                    raise Replaced(name)
        return self.verified()

    def close(self) -> None:
        """Let go of the files; descriptors that were handed out stay open."""
        with self._lock:
            for descriptor in self._opened.values():
                os.close(descriptor)
            self._opened.clear()

    def _try_open(self, name: str) -> int | None:
        for folder in (self._partial, self._directory):
            try:
                descriptor = os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            if folder == self._directory or os.fstat(descriptor).st_size == self._size(name):
                return descriptor
            os.close(descriptor)
        return None

    def _size(self, name: str) -> int | None:
        manifest = read_manifest(self._partial)
        sizes = {} if manifest is None else {listed.name: listed.size for listed in manifest.files}
        return sizes.get(name)

    def _landed(self, name: str, start: int, stop: int) -> bool:
        with self._lock:
            if self._records is None:
                manifest = read_manifest(self._partial)
                if manifest is None:
                    return False
                self._indices = {listed.name: i for i, listed in enumerate(manifest.files)}
                self._records = Records(self._partial, len(manifest.files))
            self._records.read_on()
            return not self._records.done[self._indices[name]].missing(start, stop)

    def _in_place(self, name: str) -> bool:
        return self._is_at(self._directory, name)

    def _is_at(self, folder: Path, name: str) -> bool:
        try:
            return os.path.samestat((folder / name).stat(), os.fstat(self._opened[name]))
        except FileNotFoundError:
            return False

    def _pause(self) -> None:
        if self._stop.wait(_POLL_S):
            raise Stopped


def _weights(partial: Path) -> list[str]:
    """The files with the weights, in the order in which they are brought."""
    manifest = read_manifest(partial)
    return [] if manifest is None else [name for name in manifest.chosen if is_weight_candidate(name)]
