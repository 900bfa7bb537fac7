"""Every rank takes the same commands before the same step, however they come; who strays is found out."""

from __future__ import annotations

import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine.channel import Channel
from runtime.engine.turns import DivergenceError, FollowingChannel, LeadingChannel
from runtime.engine.watchdog import Watchdog
from runtime.parallel.control import Control, Line, Meeting
from runtime.parallel.ranks import Ranks
from runtime.protocol import Abort, Command, SamplingParams, Submit, encode_frame


def channels() -> tuple[socket.socket, LeadingChannel, list[FollowingChannel]]:
    """The handler's end of the socket, rank 0's channel, and those of two followers."""
    pairs = [socket.socketpair() for _ in range(2)]
    handler, theirs = socket.socketpair()

    def rank(number: int, sockets: list[socket.socket]) -> tuple[Ranks, Watchdog]:
        ranks = Ranks(number, 3, Meeting("", 0, ""))
        ranks.control = Control(number, [Line(one) for one in sockets])
        return ranks, Watchdog(ranks, 60.0, print)

    leader = LeadingChannel(Channel(theirs), *rank(0, [ours for ours, _ in pairs]))
    return handler, leader, [FollowingChannel(*rank(n, [end])) for n, (_, end) in enumerate(pairs, 1)]


def command(number: int) -> Command:
    if number % 3 == 2:
        return Abort([f"r{number - 1}"])
    sampling = SamplingParams(max_tokens=number + 1, temperature=0.5)
    return Submit(request_id=f"r{number}", prompt_token_ids=[number] * (number % 5 + 1), sampling=sampling)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.integers(0, 400), max_size=5), min_size=1, max_size=8))
def test_each_call_returns_the_same_everywhere(bursts: list[list[int]]) -> None:
    handler, leader, followers = channels()
    seen: list[list[list[Command]]] = [[], [], []]

    def read(place: int, channel: LeadingChannel | FollowingChannel) -> None:
        # A step's time differs from rank to rank: nothing may come of it.
        seen[place] = [channel.receive(patience=0) for _ in range(2 * len(bursts))]

    threads = [threading.Thread(target=read, args=(n, c)) for n, c in enumerate([leader, *followers])]
    for thread in threads:
        thread.start()
    for burst in bursts:
        handler.sendall(b"".join(encode_frame(command(number)) for number in burst))
    for thread in threads:
        thread.join()
    assert seen[1] == seen[0]
    assert seen[2] == seen[0]
    sent = [command(number) for burst in bursts for number in burst]
    taken = [one for call in seen[0] for one in call]
    assert taken == sent[: len(taken)]


def test_a_rank_that_computes_something_else_is_found_out() -> None:
    _, leader, followers = channels()
    for fingerprint in (7, -(1 << 62)):
        for follower in followers:
            follower.check(fingerprint)
        leader.check(fingerprint)
    followers[0].check(5)
    followers[1].check(6)
    with pytest.raises(DivergenceError, match="Rank 2 computed another batch than rank 0 in step 3"):
        leader.check(5)
