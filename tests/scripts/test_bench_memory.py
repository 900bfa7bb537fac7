"""The memory of processes, against psutil."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import psutil
import pytest
from harness import BenchError, pss
from memory import parts

SIZE = 8 << 20


def test_a_process_and_its_mapped_file(tmp_path: Path) -> None:
    file = tmp_path / "model 1.safetensors"
    file.write_bytes(os.urandom(SIZE))
    with open(file, "rb") as data, mmap.mmap(data.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        assert len(bytes(mapping)) == SIZE  # every page has been touched
        found = pss.measure(os.getpid(), [file])
        reference = psutil.Process().memory_full_info()
    assert found.mapped == SIZE
    assert found.total == pytest.approx(reference.pss, rel=0.1)
    assert found.peak >= reference.rss * 0.9
    assert parts([found, found]) == {
        "all": 2 * found.total,
        "mapped weights": 2 * SIZE,
        "the rest": 2 * (found.total - SIZE),
    }


def test_a_file_that_is_not_mapped_counts_nothing(tmp_path: Path) -> None:
    assert pss.measure(os.getpid(), [tmp_path / "other.safetensors"]).mapped == 0


def test_a_process_that_has_ended_is_an_error() -> None:
    with pytest.raises(BenchError, match="process"):
        pss.measure(2**22 - 1, [])
