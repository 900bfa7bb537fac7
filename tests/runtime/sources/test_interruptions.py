"""Downloads that are killed, doubled, or out of room: real processes against stand-ins."""

from __future__ import annotations

import collections
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

import pytest

from runtime.weights.sources import SourceError, fetch, locate
from runtime.weights.sources import transfer as transfer_module
from tests.runtime.sources.hub_server import HubServer
from tests.runtime.sources.models import NEEDED, contents, model_files, spec
from tests.runtime.sources.s3_server import OpenDoor, upload

SPEC = spec("hf://org/name")
SIZE = 6_000_000
# Six ranges, so six connections, of four blocks each.
RANGE = 1_000_000
BLOCK = 250_000

FILES = {name: content for name, content in model_files(SIZE).items() if name in NEEDED}
SMALL_SIZE = sum(len(content) for content in FILES.values()) - SIZE

_CHILD = f"""
import sys
from pathlib import Path
from runtime.catalogue import ModelSpec
from runtime.weights.sources import fetch, transfer

transfer.RANGE_BYTES, transfer.BLOCK_BYTES = int(sys.argv[3]), {BLOCK}
spec = ModelSpec(id="model", source=sys.argv[2])
directory = fetch(spec, Path(sys.argv[1]), lambda p: print(p.bytes_done, p.bytes_total, flush=True))
print(directory, flush=True)
"""


def _start(cache_dir: Path, source: str = SPEC.source, range_bytes: int = RANGE) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _CHILD, str(cache_dir), source, str(range_bytes)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _kill_at(child: subprocess.Popen[str], bytes_done: int) -> int:
    """Kill the process once it says that so much is done; how much it had said last."""
    assert child.stdout is not None
    try:
        said = _read_until(child.stdout, bytes_done)
    finally:
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
    # The last line may be torn.
    return max([said, *(int(line.split()[0]) for line in rest.split("\n")[:-1])])


def _read_until(lines: IO[str], bytes_done: int) -> int:
    for line in lines:
        if (said := int(line.split()[0])) >= bytes_done:
            return said
    raise AssertionError("the download ended early")


# What is there of each connection's range when the process is killed: two blocks, and a part of the third.
_SENT = 2 * BLOCK + 100_000
_KEPT = 2 * BLOCK


def test_after_kill_9_only_what_is_missing_comes_again(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", FILES)
    released = threading.Event()
    hub.fail("/storage/", pause=lambda: released.wait(60), pause_after=_SENT, times=6)
    _kill_at(_start(cache_dir), 6 * _KEPT + SMALL_SIZE)
    released.set()
    assert locate(SPEC, cache_dir) is None
    hub.requests.clear()
    assert contents(fetch(SPEC, cache_dir)) == FILES
    assert SIZE - 6 * _SENT <= hub.body_bytes("/storage/") <= SIZE - 6 * _KEPT
    assert hub.body_bytes("/resolve/") == 0


def test_after_kill_9_of_an_s3_download_too(s3: Any, cache_dir: Path, door: OpenDoor) -> None:
    upload(s3, FILES)
    opened = door("stall", times=6, after=_SENT)
    _kill_at(_start(cache_dir, "s3://models/org/name"), 6 * _KEPT + SMALL_SIZE)
    opened.released.set()
    assert locate(spec("s3://models/org/name"), cache_dir) is None
    opened.mend()
    assert contents(fetch(spec("s3://models/org/name"), cache_dir)) == FILES
    assert SIZE - 6 * _SENT <= opened.body_bytes <= SIZE - 6 * _KEPT


def test_killed_again_and_again_nothing_that_was_done_is_fetched_twice(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", FILES)
    # Eight connections read 60 ranges, so the download takes a second and a half.
    hub.fail("/storage/", pause=lambda: time.sleep(0.2), pause_after=50_000, times=10_000)
    moments = random.Random(7)
    done = 0
    for _ in range(3):
        child = _start(cache_dir, range_bytes=100_000)
        done = _kill_at(child, done + moments.randrange(100_000, SIZE // 6))
    # The first Hub may take up requests of the killed ones only now.
    with HubServer() as later:
        later.add_repo("org/name", FILES)
        monkeypatch.setenv("HF_ENDPOINT", later.url)
        assert contents(fetch(SPEC, cache_dir)) == FILES
    assert done < SIZE
    reads = [r.range for r in later.requests if "/storage/" in r.path and r.range]
    asked = [read.removeprefix("bytes=").split("-") for read in reads]
    assert sum(int(last) + 1 - int(first) for first, last in asked) <= SIZE + SMALL_SIZE - done


def test_two_processes_at_once_download_once(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", model_files(SIZE))
    both_report = threading.Event()
    hub.fail("/storage/", pause=lambda: both_report.wait(60), pause_after=100_000)
    children = [_start(cache_dir) for _ in range(2)]
    last: list[str] = []
    for child in children:
        assert child.stdout is not None
        # The one that waits reports the progress of the one that downloads: more than the small files.
        _read_until(child.stdout, BLOCK)
    both_report.set()
    for child in children:
        output, _ = child.communicate(timeout=60)
        assert child.returncode == 0
        last.append(output.splitlines()[-1])
    assert last == [str(locate(SPEC, cache_dir))] * 2
    assert hub.body_bytes("/storage/") == SIZE
    assert (
        collections.Counter(r.path for r in hub.requests if "config.json" in r.path).most_common(1)[0][1] == 1
    )


def test_who_waits_for_a_process_that_is_killed_takes_over_where_it_was(
    hub: HubServer, cache_dir: Path
) -> None:
    hub.add_repo("org/name", FILES)
    released = threading.Event()
    hub.fail("/storage/", pause=lambda: released.wait(60), pause_after=_SENT, times=6)
    holder = _start(cache_dir)
    assert holder.stdout is not None
    _read_until(holder.stdout, 6 * _KEPT + SMALL_SIZE)
    waiter = _start(cache_dir)
    assert waiter.stdout is not None
    _read_until(waiter.stdout, 6 * _KEPT + SMALL_SIZE)
    hub.requests.clear()
    _kill_at(holder, 0)
    output, _ = waiter.communicate(timeout=60)
    released.set()
    assert output.splitlines()[-1] == str(locate(SPEC, cache_dir))
    assert hub.body_bytes("/storage/") <= SIZE - 6 * _KEPT


def _interrupted(hub: HubServer, cache_dir: Path) -> dict[str, bytes]:
    """Leave half of a download behind; the model's files."""
    files = model_files(SIZE)
    hub.add_repo("org/name", files)
    hub.fail("/storage/", cut_after=SIZE // 2)
    hub.fail("/storage/", status=500, times=1000)
    with pytest.raises(SourceError):
        fetch(SPEC, cache_dir)
    hub.mend()
    hub.requests.clear()
    return files


@pytest.mark.parametrize("cut", [1, 13, 23])
def test_a_torn_last_record_costs_one_block_at_most(hub: HubServer, cache_dir: Path, cut: int) -> None:
    files = _interrupted(hub, cache_dir)
    (records,) = cache_dir.rglob("*.partial/records")
    records.write_bytes(records.read_bytes()[:-cut])
    assert contents(fetch(SPEC, cache_dir))["model.safetensors"] == files["model.safetensors"]
    assert hub.body_bytes("/storage/") <= SIZE // 2 + transfer_module.BLOCK_BYTES


def test_bytes_that_rotted_in_the_partial_file_are_noticed(hub: HubServer, cache_dir: Path) -> None:
    files = _interrupted(hub, cache_dir)
    (partial,) = cache_dir.rglob("*.partial/model.safetensors")
    with open(partial, "r+b") as file:
        file.seek(1000)
        file.write(b"\0" * 100)
    assert contents(fetch(SPEC, cache_dir))["model.safetensors"] == files["model.safetensors"]


def test_a_partial_file_that_vanished_is_fetched_anew(hub: HubServer, cache_dir: Path) -> None:
    files = _interrupted(hub, cache_dir)
    (partial,) = cache_dir.rglob("*.partial/model.safetensors")
    partial.unlink()
    assert contents(fetch(SPEC, cache_dir))["model.safetensors"] == files["model.safetensors"]
    assert hub.body_bytes("/storage/") == SIZE


def test_what_an_unfinished_older_version_left_is_swept_away(hub: HubServer, cache_dir: Path) -> None:
    _interrupted(hub, cache_dir)
    commit = hub.add_repo("org/name", model_files(seed=1))
    fetch(SPEC, cache_dir)
    folders = {p.name for p in (cache_dir / "models" / "hub--org--name").iterdir() if p.is_dir()}
    assert folders == {commit, "refs"}


# ---- the disk ----------------------------------------------------------------------------------


def test_too_little_space_is_said_before_the_weights_come(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", model_files(SIZE))
    usage = shutil.disk_usage("/")._replace(free=SIZE // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SourceError, match=r"0\.01 GB are needed, 0\.00 GB are free") as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "no_space"
    assert hub.body_bytes("/storage/") == 0


def test_a_disk_that_fills_up_meanwhile(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", model_files(SIZE))
    genuine = os.pwrite

    def full_after_a_while(fd: int, data: bytes, offset: int) -> int:
        if offset > SIZE // 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", full_after_a_while)
    with pytest.raises(SourceError) as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "no_space"
    assert str(cache_dir) in str(caught.value)


@pytest.mark.parametrize("blocked", ["", "models", "models/hub--org--name"])
def test_a_cache_that_cannot_be_written(hub: HubServer, cache_dir: Path, blocked: str) -> None:
    hub.add_repo("org/name", model_files())
    obstacle = cache_dir / blocked
    obstacle.parent.mkdir(parents=True, exist_ok=True)
    obstacle.write_text("a file where a directory should be")
    assert locate(SPEC, cache_dir) is None
    with pytest.raises(SourceError) as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "read_only"
    assert "--download-dir" in str(caught.value)


def test_a_file_system_mounted_read_only(
    hub: HubServer, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/name", model_files())

    def refused(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refused)
    with pytest.raises(SourceError, match="Read-only file system") as caught:
        fetch(SPEC, cache_dir)
    assert caught.value.kind == "read_only"


def _fetch_on(mount: str, cache_dir: Path) -> subprocess.CompletedProcess[str]:
    """Fetch in a process that sees the cache directory mounted in another way."""
    cache_dir.mkdir(exist_ok=True)
    in_own_view = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*in_own_view, "true"], capture_output=True).returncode:
        pytest.skip("this user may not mount anything")
    command = [*in_own_view, "sh", "-ec", f'{mount}; shift; exec "$@"', "sh", str(cache_dir)]
    command += [sys.executable, "-c", _CHILD, str(cache_dir), SPEC.source, str(RANGE)]
    return subprocess.run(command, capture_output=True, text=True)


_SMALL_DISK = 'mount -t tmpfs -o size=3m none "$1"'
_READ_ONLY = 'mount --bind "$1" "$1"; mount -o remount,ro,bind "$1"'


@pytest.mark.parametrize(
    ("mount", "says"),
    [
        (_SMALL_DISK, "Not enough space in"),
        (_READ_ONLY, "cannot be used: Read-only file system"),
    ],
    ids=["small", "read-only"],
)
def test_a_disk_that_cannot_take_the_model(hub: HubServer, cache_dir: Path, mount: str, says: str) -> None:
    hub.add_repo("org/name", FILES)
    done = _fetch_on(mount, cache_dir)
    last = done.stderr.splitlines()[-1]
    assert (last.startswith("runtime.weights.sources.errors.SourceError"), says in last) == (True, True), last


def test_a_complete_model_on_a_read_only_disk_is_good_enough(hub: HubServer, cache_dir: Path) -> None:
    hub.add_repo("org/name", FILES)
    directory = fetch(SPEC, cache_dir)
    done = _fetch_on(_READ_ONLY, cache_dir)
    assert done.stdout.splitlines()[-1:] == [str(directory)], done.stderr


# ---- what importing costs ----------------------------------------------------------------------


def test_importing_and_locating_loads_no_client(cache_dir: Path) -> None:
    script = """
import json, sys
from pathlib import Path
from runtime.catalogue import ModelSpec
from runtime.weights.sources import locate
for source in ("hf://org/name", "s3://bucket/x", "wheel://nonesuch", "/nonesuch"):
    assert locate(ModelSpec(id="m", source=source), Path(sys.argv[1])) is None
print(json.dumps(sorted(sys.modules)))
"""
    output = subprocess.run(
        [sys.executable, "-c", script, str(cache_dir)], capture_output=True, text=True, check=True
    ).stdout
    heavy = {"huggingface_hub", "boto3", "botocore", "torch", "transformers", "numpy", "requests", "httpx"}
    assert heavy.isdisjoint(json.loads(output))
