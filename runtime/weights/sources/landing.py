"""Which bytes of a model's file have landed, for who wants them on before the whole file is there.

    landing = Landing(progress.directory, "model.safetensors", stop)   # `directory` as `fetch` reports it
    landing.wait_for(0, 8 << 20)
    os.preadv(landing.descriptor, [buffer], 0)
    ...                                       # `fetch` returns, in the thread or process that it runs in
    landing.verified()                        # now what was read may be believed, or must be read again

What landed is not verified yet. A file that fails verification is fetched once more, into a new file.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from runtime.weights.sources.cache import partial_dir
from runtime.weights.sources.journal import Records, read_manifest
from runtime.weights.sources.partial import Stopped

_POLL_S = 0.005


class Replaced(Exception):
    """What was read of the file was not what it should hold: open it again, and read it again."""


class Landing:
    """One file while it comes, whichever process of this host fetches it. Safe to use from many threads.

    `descriptor` is open for reading, and stays valid when the file moves to its final place. Every wait
    ends with Stopped once `stop` is set, as it should be when the `fetch` that is waited for fails.
    """

    def __init__(self, directory: Path, name: str, stop: threading.Event) -> None:
        self._final = directory / name
        self._partial = partial_dir(directory) / name
        self._name = name
        self._stop = stop
        self._lock = threading.Lock()
        self._records: Records | None = None
        self._index = 0
        while (descriptor := _open(self._partial, self._final)) is None:
            self._pause()
        self.descriptor = descriptor

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def wait_for(self, start: int, end: int) -> None:
        """Wait until the bytes [start, end) can be read. Raises Replaced and Stopped."""
        while not self.verified():
            landed = self._landed(start, end)
            # Looked at after the records: those of the file in whose place another came may say more.
            if not any(self._is_at(path) for path in (self._partial, self._final)):
                raise Replaced
            if landed:
                return
            self._pause()

    def verified(self) -> bool:
        """Whether what is read through the descriptor is the whole file, with the content it should have."""
        return self._is_at(self._final)

    def _landed(self, start: int, end: int) -> bool:
        with self._lock:
            if self._records is None:
                manifest = read_manifest(self._partial.parent)
                if manifest is None:
                    return False
                self._index = [file.name for file in manifest.files].index(self._name)
                self._records = Records(self._partial.parent, len(manifest.files))
            self._records.read_on()
            return not self._records.done[self._index].missing(start, end)

    def _is_at(self, path: Path) -> bool:
        try:
            return os.path.samestat(os.fstat(self.descriptor), path.stat())
        except FileNotFoundError:
            return False

    def _pause(self) -> None:
        if self._stop.wait(_POLL_S):
            raise Stopped


def _open(*paths: Path) -> int | None:
    for path in paths:
        try:
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
    return None
