"""The clock of a start, the page cache it needs, and what becomes of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cold_start import medians
from harness import BenchError, page_cache
from harness.answers import Reference
from harness.process import tree
from harness.servers import Server
from harness.start_clock import clock

from tests.scripts.conftest import BENCH

PIECES = ["A", " hash", " table", " is"]
REFERENCE = Reference("count", [1, 2, 3], [5, 6, 7, 8], PIECES, [1.0] * 4)


def server(pieces: list[str]) -> Server:
    return Server("stub", (sys.executable, "-m", "tests.scripts.slow_server", "{port}", *pieces))


def test_times_are_in_order_and_begin_before_the_server_exists() -> None:
    start = clock(server(PIECES), REFERENCE, 4, timeout=30)
    assert 0.5 < start.listening < start.first_token <= start.last_token
    assert start.listening < start.ready
    assert start.marks == {"ready": 0.7}


def python(code: str) -> Server:
    return Server("python", (sys.executable, "-c", code))


def test_a_wrong_answer_voids_the_start() -> None:
    with pytest.raises(BenchError, match="wrongly"):
        clock(server(["A", " list"]), REFERENCE, 4, timeout=30)


def test_a_server_that_ends_says_why() -> None:
    with pytest.raises(BenchError, match=r"(?s)status 3.*no such model"):
        clock(
            Server("x", (sys.executable, "-c", "print('no such model'); exit(3)")), REFERENCE, 4, timeout=30
        )


def test_what_a_server_started_ends_with_it() -> None:
    code = (
        "import subprocess, time; subprocess.Popen(['sleep', '60']); print('up', flush=True); time.sleep(60)"
    )
    with Server("x", (sys.executable, "-c", code)).start() as process:
        while "up" not in process.log():
            process.check_alive()
        started = tree(process.pid)
        assert len(started) == 2
    assert_they_end(started)


def test_a_benchmark_that_is_told_to_end_leaves_no_server_behind(small_model: Path) -> None:
    command = [sys.executable, str(BENCH / "memory.py"), "--model", str(small_model), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as benchmark:
        while len(started := tree(benchmark.pid)) < 3:
            assert benchmark.poll() is None
            time.sleep(0.05)
        benchmark.terminate()
        assert benchmark.wait(30) == 128 + signal.SIGTERM
    assert_they_end(started)


def assert_they_end(pids: list[int]) -> None:
    """A process that was killed is gone a little later."""
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_files_leave_the_page_cache_and_come_back(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(os.urandom(3_000_001))
    assert page_cache.resident(files) == 1
    try:
        page_cache.evict(files)
    except BenchError:
        pytest.skip("this file system keeps everything in memory")
    assert page_cache.resident(files) == 0
    assert page_cache.read(files) > 0
    assert page_cache.resident(files) == 1


def test_marks_that_some_start_lacks_are_left_out() -> None:
    starts = [{"ready": 2.0, "listen": 0.1}, {"ready": 4.0, "listen": 0.3, "graphs": 9.0}]
    assert list(medians(starts).items()) == [("listen", 0.2), ("ready", 3.0)]
