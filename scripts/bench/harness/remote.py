"""A model that has to come over a network first: a stand-in for its source, and who fetches from it."""

from __future__ import annotations

import hashlib
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import BenchError, plain_reader, servers
from harness.checkpoint import weight_files
from harness.process import free_port
from harness.servers import Server
from harness.stand_in import BUCKET, PREFIX, REPOSITORY

KINDS = ("hub", "s3")
_START_SECONDS = 120.0


class Remote:
    """The model in `folder`, served by a stand-in on this machine while this is entered."""

    def __init__(self, folder: Path, device: str, arguments: Sequence[str]) -> None:
        self._folder = folder
        self._device = device
        self._arguments = arguments
        self._port = free_port()
        # On the disk that holds the model, so that a copy of it fits.
        self._cache = Path(tempfile.mkdtemp(prefix=".cold-cache-", dir=folder.parent))
        script = Path(__file__).with_name("stand_in.py")
        self._process = subprocess.Popen([sys.executable, str(script), str(self._port), str(folder)])

    def __enter__(self) -> Remote:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
                return self
            except OSError:
                time.sleep(0.1)
        self.__exit__()
        raise BenchError("the stand-in for the model's source did not start")

    def __exit__(self, *exception: object) -> None:
        self._process.terminate()
        self._process.wait()
        shutil.rmtree(self._cache, ignore_errors=True)

    def server(self, kind: str) -> Server:
        """This project's server, which has the model from the Hub or from S3."""
        url = f"http://127.0.0.1:{self._port}"
        environment = {
            "HF_ENDPOINT": url,
            "AWS_ENDPOINT_URL_S3": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        source = f"hf://{REPOSITORY}" if kind == "hub" else f"s3://{BUCKET}/{PREFIX}"
        arguments = [*self._arguments, "--download-dir", str(self._cache)]
        return servers.firstlight(self._folder, self._device, arguments, source, **environment)

    def forget(self) -> None:
        """Delete what servers have fetched."""
        shutil.rmtree(self._cache, ignore_errors=True)

    def digest_seconds(self) -> float:
        """Seconds that the weights' SHA-256 takes, all files at once: each takes one processor."""

        def digest(file: Path) -> None:
            with file.open("rb", buffering=0) as content:
                hashlib.file_digest(content, "sha256")

        files = weight_files(self._folder)
        began = time.monotonic()
        with ThreadPoolExecutor(len(files)) as pool:
            list(pool.map(digest, files))
        return time.monotonic() - began

    def transfer_seconds(self) -> float:
        """Seconds that the stand-in takes for the weights when nobody does anything with them."""
        files = weight_files(self._folder)
        paths = [f"/{BUCKET}/{PREFIX}{file.name}" for file in files]
        return plain_reader.seconds_to_read(self._port, paths, [file.stat().st_size for file in files])
