"""What HTTP costs, measured on a server whose engine computes nothing."""

from __future__ import annotations

from pathlib import Path

import http_cost
import pytest


def test_a_request_takes_longer_than_the_engine(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_cost, "REQUESTS", 20)
    found = http_cost.measure_latency(small_model)
    assert found.keys() == {"engine", *http_cost.KINDS}
    assert all(len(times) == 18 and min(times) > 0 for times in found.values())


def test_every_token_of_every_stream_is_counted(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_cost, "STREAM_TOKENS", 30)
    monkeypatch.setattr(http_cost, "STEP_MS", 1.0)
    for kind in ("chat", "completion"):
        used, merged = http_cost.measure_streams(small_model, kind, 8)
        assert used >= 0
        assert merged >= 1


def test_streams_that_wait_take_memory(small_model: Path) -> None:
    before, after = http_cost.measure_memory(small_model, 50)
    assert after > before > 10_000_000


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nab", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\na", False),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n", False),
        (b"HTTP/1.1 200 OK\r\n", False),
    ],
)
def test_where_an_answer_ends(answer: bytes, whole: bool) -> None:
    assert http_cost.ends(answer) is whole
