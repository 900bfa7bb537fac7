"""What the benchmarks read from a stream, and that they refuse wrong and incomplete answers."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from harness import BenchError, client
from harness.answers import Reference
from harness.contender import require_complete
from harness.sse import Recording, read
from hypothesis import given
from hypothesis import strategies as st

from tests.scripts.stub_server import stub

PIECES = ["A", " hash", " table", " is", " ä", " structure"]


def recorded(raw: bytes, cuts: list[int]) -> Recording:
    """A recording of `raw` as it would be if it came in pieces that end at `cuts`."""
    recording = Recording()
    places = [0, *sorted({min(cut, len(raw)) for cut in cuts}), len(raw)]
    for begin, end in pairwise(places):
        if begin < end:
            recording.add(raw[begin:end])
    return recording


def chunked(bodies: list[bytes]) -> bytes:
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(body), body) for body in [*bodies, b""])
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


def events(data: list[object]) -> list[bytes]:
    return [b"data: " + json.dumps(item, ensure_ascii=False).encode() + b"\n\n" for item in data]


TEXTS = [{"choices": [{"index": 0, "text": piece, "finish_reason": None}]} for piece in PIECES]
USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 7, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 3}},
}
WHOLE = chunked([b": loading\n\n", *events([*TEXTS, USAGE]), b"data: [DONE]\n\n"])


@given(st.lists(st.integers(0, len(WHOLE)), max_size=20))
def test_however_the_bytes_arrive(cuts: list[int]) -> None:
    recording = recorded(WHOLE, cuts)
    assert recording.ended
    answer = read(recording)
    assert (answer.error, answer.text, len(answer.times)) == (None, "".join(PIECES), len(PIECES))
    assert (answer.prompt_tokens, answer.completion_tokens, answer.cached_tokens) == (7, 6, 3)
    assert recording.sent <= answer.first <= answer.last


def test_a_token_has_the_time_of_the_piece_that_completed_its_event() -> None:
    first_end = WHOLE.index(b" hash")  # the first token's event is complete, the second one's is not
    recording = recorded(WHOLE, [first_end])
    times = [moment for moment, _ in recording.pieces]
    assert read(recording).times == [times[0], *[times[1]] * (len(PIECES) - 1)]


def test_a_stream_that_breaks_off_is_an_error() -> None:
    answer = read(recorded(WHOLE[: WHOLE.index(b"data: [DONE]")], []))
    assert answer.error is not None
    assert "[DONE]" in answer.error


def test_an_error_within_the_stream_is_an_error() -> None:
    broken = chunked([*events([TEXTS[0], {"error": {"message": "engine died"}}]), b"data: [DONE]\n\n"])
    assert "engine died" in str(read(recorded(broken, [])).error)


def test_a_refusal_is_an_error() -> None:
    with stub([], status=503) as server:
        assert "503" in str(client.stream(server.port, {"prompt": [1], "max_tokens": 1}).error)


def test_the_last_event_of_chat_and_its_role_are_no_tokens() -> None:
    deltas = [{"role": "assistant"}, {"content": "Hi"}, {"content": " there"}]
    data = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    data.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    answer = read(recorded(chunked([*events(list(data)), b"data: [DONE]\n\n"]), []))
    assert (answer.text, len(answer.times), answer.finish_reason) == ("Hi there", 2, "stop")


def test_over_a_socket() -> None:
    with stub(PIECES) as server:
        answer = client.stream(server.port, {"prompt": [1, 2, 3], "max_tokens": 6})
        assert (answer.text, answer.error) == ("".join(PIECES), None)
        assert server.asked[0]["stream"] is True
        require_complete("stub", answer, 3, 6)


def test_a_wrong_count_is_refused() -> None:
    with stub(PIECES, extra=1) as server:
        answer = client.stream(server.port, {"prompt": [1, 2, 3], "max_tokens": 6})
    with pytest.raises(BenchError, match="asked for 6"):
        require_complete("stub", answer, 3, 6)


class TestReference:
    reference = Reference(
        "explain", [1, 2], [10, 11, 12, 13], ["A", " hash", " table", "s"], [1, 0.2, 0.6, 0.01]
    )

    def test_right_as_far_as_the_answer_is_certain(self) -> None:
        self.reference.check_text("x", "A hash table is", 4)
        self.reference.check_text("x", "A has", 1)
        self.reference.check_ids("x", [10, 11, 12, 99])
        self.reference.check_text("x", "A list", 4, lossy=True)

    @pytest.mark.parametrize(("text", "tokens"), [("A hash", 4), ("A hash tree", 4), ("", 1), ("B", 1)])
    def test_wrong(self, text: str, tokens: int) -> None:
        with pytest.raises(BenchError, match="wrongly"):
            self.reference.check_text("x", text, tokens)

    def test_wrong_ids(self) -> None:
        with pytest.raises(BenchError, match="wrongly"):
            self.reference.check_ids("x", [10, 99])
