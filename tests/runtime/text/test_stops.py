"""Stop strings against a search of the whole text."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from runtime.text.stops import StopStrings

# Few letters, so that stops occur, overlap and nearly occur.
LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def run(stops: list[str], pieces: list[str], include_stop: bool = False) -> tuple[str, str | None]:
    cutter = StopStrings(stops, include_stop=include_stop)
    emitted, found = "", None
    for piece in pieces:
        text, stop = cutter.push(piece)
        emitted, found = emitted + text, found or stop
    return emitted + cutter.flush(), found


@given(stops=STOPS, pieces=st.lists(LETTERS, max_size=8), include=st.booleans())
@example(stops=["aab"], pieces=["a", "a", "a", "b"], include=False)
def test_equals_a_search_of_the_whole_text(stops: list[str], pieces: list[str], include: bool) -> None:
    text = "".join(pieces)
    emitted, found = run(stops, pieces, include)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (emitted, found) == (text, None)
        return
    end = min(ends)
    assert found in stops
    assert text[:end].endswith(found)
    # Of the stops that are complete here, the longest cuts off the most.
    assert len(found) == max(len(stop) for stop in stops if text[:end].endswith(stop))
    assert emitted == (text[:end] if include else text[: end - len(found)])


@given(stops=STOPS, text=LETTERS)
def test_holds_back_only_what_may_begin_a_stop(stops: list[str], text: str) -> None:
    emitted, found = StopStrings(stops).push(text)
    held = text[len(emitted) :]
    assert found is not None or held == "" or any(stop.startswith(held) for stop in stops)


def test_what_is_not_a_stop_is_emitted_at_once() -> None:
    cutter = StopStrings(["\n\nUser:"])
    assert cutter.push("Hello\n") == ("Hello", None)
    assert cutter.push("world") == ("\nworld", None)


def test_nothing_comes_after_a_stop() -> None:
    cutter = StopStrings(["."])
    assert cutter.push("One. Two.") == ("One", ".")
    assert cutter.push("Three") == ("", None)
    assert cutter.flush() == ""


def test_no_stops_change_nothing() -> None:
    assert StopStrings([]).push("text") == ("text", None)


def test_an_empty_stop_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        StopStrings([""])
