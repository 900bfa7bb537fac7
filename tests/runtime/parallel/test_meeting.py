"""How ranks meet: only those that belong together, on devices of one kind."""

from __future__ import annotations

import socket
from pathlib import Path

import msgspec
import pytest

from runtime.catalogue import ModelSpec
from runtime.engine.start import start
from runtime.parallel.control import Meeting, ParallelError, follow, lead, listen
from runtime.parallel.ranks import Ranks
from runtime.processes import TOKEN, LaunchError, Place, place_of
from runtime.protocol import EngineConfig, Event, frame
from tests.runtime.parallel.engines import on_each


def test_everyone_learns_everyones_value_by_rank() -> None:
    def work(ranks: Ranks) -> tuple[list[int], list[str]]:
        ranks.meet(has_gpu=False)
        return ranks.control.exchange(ranks.rank * 10), ranks.control.exchange(f"rank {ranks.rank}")

    assert on_each(3, work) == [([0, 10, 20], ["rank 0", "rank 1", "rank 2"])] * 3


def test_too_few_gpus_are_noticed_before_anything_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meet = Ranks.meet
    monkeypatch.setattr(Ranks, "meet", lambda ranks, has_gpu: meet(ranks, ranks.rank < 2))
    events: list[Event] = []

    def work(ranks: Ranks) -> str:
        spec = ModelSpec(id="large", source="hf://org/large")
        config = EngineConfig(
            model=spec, cache_dir=str(tmp_path), device="cpu", rank=ranks.rank, world_size=4
        )
        with pytest.raises(ParallelError) as caught:
            start(config, events.append, ranks)
        return str(caught.value)

    assert set(on_each(4, work)) == {
        "--tensor-parallel-size 4 needs 4 GPUs, and there are 2: choose at most 2, or --device cpu."
    }
    assert events == []
    assert list(tmp_path.iterdir()) == []


def test_strangers_are_sent_away() -> None:
    listener = listen("127.0.0.1")
    address, port = listener.getsockname()
    strangers = [socket.create_connection((address, port)) for _ in range(3)]
    strangers[0].close()
    strangers[1].sendall(frame(b"GET / HTTP/1.1\r\n\r\n"))
    strangers[2].sendall(frame(msgspec.msgpack.encode(["another token", 1, 2])))
    meeting = Meeting(address, port, "the token")

    def work(ranks: Ranks) -> list[int]:
        control = follow(meeting, 1, 2) if ranks.rank else lead(listener, meeting, 2)
        return control.exchange(ranks.rank)

    assert on_each(2, work) == [[0, 1], [0, 1]]


def test_a_follower_of_another_engine_is_an_error() -> None:
    listener = listen("127.0.0.1")
    meeting = Meeting(*listener.getsockname(), "the token")
    follow(meeting, 3, 4)
    with pytest.raises(ParallelError, match="came as rank 3 of 4 to an engine of 2 ranks"):
        lead(listener, meeting, 2)


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", TOKEN: "s"}
LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "lead.svc", TOKEN: "s"}


@pytest.mark.parametrize(
    ("environment", "world_size", "place"),
    [
        ({}, 4, Place(0, 4, {})),
        (TORCHRUN, 2, Place(1, 1, {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234", TOKEN: "s"})),
        (LWS, 8, Place(4, 4, {"MASTER_ADDR": "lead.svc", "MASTER_PORT": "29500", TOKEN: "s"})),
        (TORCHRUN, 1, Place(0, 1, {})),
    ],
    ids=["nothing", "torchrun", "LeaderWorkerSet", "one rank"],
)
def test_a_launcher_says_which_ranks_are_here(
    environment: dict[str, str], world_size: int, place: Place
) -> None:
    assert place_of(world_size, environment) == place


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        (TORCHRUN | {"WORLD_SIZE": "3"}, "4 does not divide by WORLD_SIZE=3"),
        (LWS | {TOKEN: ""}, "FIRSTLIGHT_RANKS_TOKEN to the same secret"),
        (LWS | {"LWS_LEADER_ADDRESS": ""}, "set MASTER_ADDR"),
    ],
)
def test_a_launcher_that_does_not_fit(environment: dict[str, str], says: str) -> None:
    with pytest.raises(LaunchError, match=says):
        place_of(4, environment)
