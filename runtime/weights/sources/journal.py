"""The record of an unfinished download: which bytes of which file are on the disk.

It outlives the process: a record is appended after its bytes were written, so whatever moment the
process is killed at, every recorded byte is there, and at most the blocks in flight come again.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from runtime.weights.sources.boot import boot_id
from runtime.weights.sources.intervals import Intervals
from runtime.weights.sources.remote import RemoteFile

_MANIFEST = "manifest.json"
_RECORDS = "records"
# Index of the file in the manifest, offset, length, and a checksum of these three.
_BODY = struct.Struct("<IQQ")
_RECORD = struct.Struct("<IQQI")


class Manifest(msgspec.Struct):
    """What an unfinished download is of. `chosen` are the files it will end with, as far as known."""

    boot_id: str
    files: list[RemoteFile]
    chosen: list[str]


class Journal:
    """The journal of one download, open for appending."""

    def __init__(self, directory: Path, files: Sequence[RemoteFile]) -> None:
        """Continue the journal in `directory` if it is of the same files, else begin a new one.

        Bytes that were written before the machine last went down may never have reached its disk, so
        a file without a digest is not continued across a reboot. `went_down` says that there was one.
        """
        self._directory = directory
        self._manifest = Manifest(boot_id(), list(files), [])
        self._indices = {file.name: i for i, file in enumerate(files)}
        self._done = [Intervals() for _ in files]
        self._times_forgotten = [0] * len(files)
        self.went_down = False
        earlier = read_manifest(directory)
        if earlier is not None and earlier.files == self._manifest.files:
            records = Records(directory, len(files))
            records.read_on()
            self._done, self._times_forgotten = records.done, records.times_forgotten
            self.went_down = earlier.boot_id != self._manifest.boot_id
            if self.went_down:
                self._drop_unverifiable()
        else:
            (directory / _RECORDS).unlink(missing_ok=True)
        self._write_manifest()
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self._fd = os.open(directory / _RECORDS, flags, 0o644)
        self._cut_torn_record()

    def close(self) -> None:
        """Stop appending."""
        os.close(self._fd)

    def choose(self, names: Sequence[str]) -> None:
        """Record which files the download will end with, for those who watch it."""
        self._manifest.chosen = list(names)
        self._write_manifest()

    def done(self, name: str) -> Intervals:
        """What is on the disk of this file; the caller adds to it as it appends."""
        return self._done[self._indices[name]]

    def append(self, name: str, offset: int, length: int) -> None:
        """Record that [offset, offset + length) of this file is written."""
        os.write(self._fd, _pack(self._indices[name], offset, length))

    def forget(self, name: str) -> None:
        """Record that nothing of this file is of use: its content failed verification."""
        self._done[self._indices[name]] = Intervals()
        self._times_forgotten[self._indices[name]] += 1
        os.write(self._fd, _pack(self._indices[name], 0, 0))

    def times_forgotten(self, name: str) -> int:
        """How often this file was forgotten, by this process and by those before it."""
        return self._times_forgotten[self._indices[name]]

    def _cut_torn_record(self) -> None:
        whole = os.fstat(self._fd).st_size // _RECORD.size * _RECORD.size
        os.ftruncate(self._fd, whole)

    def _drop_unverifiable(self) -> None:
        for i, file in enumerate(self._manifest.files):
            if not file.is_verifiable:
                self._done[i] = Intervals()
        # The new boot id goes into the manifest, so the records must say the same from here on.
        forgotten = [_pack(i, 0, 0) * times for i, times in enumerate(self._times_forgotten)]
        here = [
            _pack(i, start, end - start) for i, done in enumerate(self._done) for start, end in done.ranges()
        ]
        records = b"".join(forgotten + here)
        (self._directory / _RECORDS).write_bytes(records)

    def _write_manifest(self) -> None:
        temporary = self._directory / (_MANIFEST + ".new")
        temporary.write_bytes(msgspec.json.encode(self._manifest))
        temporary.replace(self._directory / _MANIFEST)


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of the unfinished download in `directory`; None where there is none."""
    try:
        return msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


class Records:
    """The records of an unfinished download, followed while this or another process appends to them.

    Of each of the manifest's `count` files, `done` holds what is on the disk, and `times_forgotten` how often
    it failed verification.
    """

    def __init__(self, directory: Path, count: int) -> None:
        self._path = directory / _RECORDS
        self._at = 0
        self.done = [Intervals() for _ in range(count)]
        self.times_forgotten = [0] * count

    def read_on(self) -> None:
        """Take in what was appended since the last time."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return
        for at in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
            index, offset, length, checksum = _RECORD.unpack_from(data, at)
            if checksum != zlib.crc32(data[at : at + _BODY.size]) or index >= len(self.done):
                break
            if length:
                self.done[index].add(offset, offset + length)
            else:
                self.done[index] = Intervals()
                self.times_forgotten[index] += 1
            self._at += _RECORD.size


def read_records(directory: Path, count: int) -> list[Intervals]:
    """What is on the disk of each of the manifest's `count` files."""
    records = Records(directory, count)
    records.read_on()
    return records.done


def _pack(index: int, offset: int, length: int) -> bytes:
    body = _BODY.pack(index, offset, length)
    return body + struct.pack("<I", zlib.crc32(body))
