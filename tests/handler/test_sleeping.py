"""Sleep and wake over HTTP, with a real engine: nobody is lost, and only requests wake."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.handler.serving import ROOT, Served, served, until

TEXT = "There was a time when"


@pytest.fixture(scope="module")
def server(endless_model: Path) -> Iterator[Served]:
    with served("--model", str(endless_model), "--device", "cpu", "--served-model-name", "tiny") as running:
        until(lambda: running.get("/status")["state"] == "warm")
        yield running


@pytest.fixture(scope="module")
def expected(server: Served) -> str:
    return complete(server)


def complete(server: Served, **fields: Any) -> str:
    body = {"prompt": TEXT, "max_tokens": 8, "temperature": 0, **fields}
    connection = server.post("/v1/completions", **body)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    assert response.status == 200, answer
    text: str = answer["choices"][0]["text"]
    return text


def call(server: Served, path: str, **body: Any) -> tuple[int, Any]:
    connection = server.post(path, **body)
    response = connection.getresponse()
    answer = response.status, json.loads(response.read())
    connection.close()
    return answer


def ready_status(server: Served) -> int:
    connection = server.connect()
    connection.request("GET", "/health/ready")
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status


def slept_and_woken(server: Served) -> tuple[int, int]:
    sleep = server.get("/status")["sleep"]
    return sleep["sleeps"], sleep["wakes"]


@pytest.mark.parametrize("level", [1, 2])
def test_a_request_wakes_and_nothing_else_does(server: Served, expected: str, level: int) -> None:
    sleeps, wakes = slept_and_woken(server)
    assert call(server, "/sleep", level=level) == (200, {"state": "asleep", "sleep_level": level})
    for _ in range(3):
        assert ready_status(server) == 200
        assert server.get("/health/live") == {"status": "live"}
        assert server.get("/status")["state"] == "asleep"
        connection = server.connect()
        connection.request("GET", "/metrics")
        figures = connection.getresponse().read().decode()
        connection.close()
    assert 'firstlight_state{state="asleep"} 1.0' in figures
    assert f"firstlight_engine_wakes_total {float(wakes)}" in figures
    assert complete(server) == expected
    assert server.get("/status")["state"] == "warm"
    assert slept_and_woken(server) == (sleeps + 1, wakes + 1)


def test_wake_is_a_call_of_its_own(server: Served, expected: str) -> None:
    sleeps, wakes = slept_and_woken(server)
    for path in ("/sleep", "/sleep?level=2"):
        assert call(server, path)[1]["sleep_level"] == (2 if "level" in path else 1)
    for _ in range(2):
        assert call(server, "/wake") == (200, {"state": "warm"})
    assert slept_and_woken(server) == (sleeps + 1, wakes + 1)
    assert complete(server) == expected


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/sleep", {"level": 3}, 400),
        ("/sleep", {"level": "1"}, 400),
        ("/sleep", {"depth": 1}, 400),
        ("/sleep?level=7", None, 400),
        ("/sleep?depth=1", None, 400),
        ("/sleep", {"model": "nobody"}, 404),
        ("/wake", {"model": "nobody"}, 404),
        ("/wake?model=nobody", None, 404),
    ],
)
def test_what_cannot_be_is_refused(server: Served, path: str, body: Any, status: int) -> None:
    connection = server.connect()
    connection.request("POST", path, None if body is None else json.dumps(body).encode())
    response = connection.getresponse()
    assert (response.status, "error" in json.loads(response.read())) == (status, True)
    connection.close()
    assert server.get("/status")["state"] == "warm"


def test_a_sleep_during_a_burst_loses_nobody(server: Served, expected: str) -> None:
    sleeps, _ = slept_and_woken(server)
    with ThreadPoolExecutor(40) as pool:
        early = [pool.submit(complete, server, max_tokens=40) for _ in range(10)]
        until(lambda: server.get("/status")["engine"]["running"] > 0)
        slept = pool.submit(call, server, "/sleep", level=2)
        late = [pool.submit(complete, server) for _ in range(20)]
        assert slept.result()[0] == 200
        assert all(len(answer.result()) >= 8 for answer in early)
        assert [answer.result() for answer in late] == [expected] * 20
    assert slept_and_woken(server)[0] == sleeps + 1


def test_a_hundred_requests_wake_once(server: Served, expected: str) -> None:
    assert call(server, "/sleep", level=2)[0] == 200
    _, wakes = slept_and_woken(server)
    with ThreadPoolExecutor(100) as pool:
        answers = list(pool.map(lambda _: complete(server), range(100)))
    assert answers == [expected] * 100
    assert slept_and_woken(server)[1] == wakes + 1


def test_killed_in_its_sleep_it_comes_back_with_the_next_request(server: Served, expected: str) -> None:
    assert call(server, "/sleep")[0] == 200
    server.engine.send_signal(signal.SIGKILL)
    until(lambda: server.get("/status")["state"] == "cold")
    assert ready_status(server) == 200
    assert complete(server) == expected
    assert server.get("/status")["restarts"] == 1


def test_idle_it_sleeps_and_at_last_ends_with_status_0(endless_model: Path) -> None:
    flags = ("--model", str(endless_model), "--device", "cpu", "--idle-sleep-s", "0.6", "--idle-exit-s", "4")
    with served(*flags) as server:
        until(lambda: server.get("/status")["state"] == "asleep")
        text = complete(server)
        # A stream is somebody until its last byte, however long it takes.
        body = {"prompt": TEXT, "max_tokens": 4000, "temperature": 0, "stream": True}
        connection = server.post("/v1/completions", **body)
        response = connection.getresponse()
        began = time.monotonic()
        while time.monotonic() - began < 2:
            assert response.read1(100)
            assert server.get("/status")["state"] == "warm"
        connection.close()
        until(lambda: server.get("/status")["state"] == "asleep")
        assert complete(server) == text
        assert server.wait() == 0
        assert "nobody has come" in server.log


def test_sigterm_is_heeded_before_the_server_is_up(endless_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "handler", "serve", "--model", str(endless_model), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, env=dict(os.environ))

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    until(listens)
    process.terminate()
    assert process.wait(20) == 0
