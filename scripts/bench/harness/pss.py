"""How much memory processes use, shared pages counted in proportion (PSS), as the kernel tells it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness import BenchError

# `7f52c0000000-7f52d0000000 r--p 00000000 fe:00 1234   /path with spaces`
_MAPPING = re.compile(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+\s*(.*)")


@dataclass(frozen=True)
class Memory:
    """One process, in bytes. `total` is all of its PSS, `mapped` the part in mapped files of weights,
    and `peak` the most that was ever resident, shared pages counted in full."""

    command: str
    total: int
    mapped: int
    peak: int


def measure(pid: int, weight_files: Sequence[Path]) -> Memory:
    """The memory of one process now. Raises BenchError if it has ended or belongs to someone else."""
    proc = Path(f"/proc/{pid}")
    try:
        smaps = (proc / "smaps").read_text()
        rollup = (proc / "smaps_rollup").read_text()
        status = (proc / "status").read_text()
        command = (proc / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError as error:
        raise BenchError(f"the memory of process {pid} cannot be read: {error}") from None
    weights = {os.path.realpath(file) for file in weight_files}
    return Memory(
        command=command.strip(),
        total=_field(rollup, "Pss"),
        mapped=sum(size for path, size in mappings(smaps) if path in weights),
        peak=_field(status, "VmHWM"),
    )


def mappings(smaps: str) -> Iterator[tuple[str, int]]:
    """Path (empty for memory of no file) and PSS in bytes of each mapping in the text of an smaps file."""
    path = ""
    for line in smaps.splitlines():
        if line.startswith("Pss:"):
            yield path, _kilobytes(line)
        elif (found := _MAPPING.fullmatch(line)) is not None:
            path = found[1]


def _field(text: str, name: str) -> int:
    for line in text.splitlines():
        if line.startswith(f"{name}:"):
            return _kilobytes(line)
    return 0


def _kilobytes(line: str) -> int:
    return int(line.split()[1]) * 1024
