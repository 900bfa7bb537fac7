"""All ranks of an engine in one process, a thread each: the group is as real, and starts in no time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from runtime.catalogue import ModelSpec
from runtime.engine.core import Engine
from runtime.engine.start import start
from runtime.parallel.control import Meeting, listen
from runtime.parallel.ranks import Ranks
from runtime.protocol import EngineConfig

T = TypeVar("T")


def ranks_of(world_size: int) -> list[Ranks]:
    """Ranks that can meet."""
    listener = listen("127.0.0.1")
    meeting = Meeting("127.0.0.1", listener.getsockname()[1], "a token")
    return [Ranks(rank, world_size, meeting, None if rank else listener) for rank in range(world_size)]


def on_each(world_size: int, work: Callable[[Ranks], T]) -> list[T]:
    """What `work` returns on each rank, in a thread each; raises what went wrong on the first of them."""

    def one(ranks: Ranks) -> T:
        try:
            return work(ranks)
        except BaseException:
            ranks.control.close()  # nobody waits for this one
            raise

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(one, ranks_of(world_size)))


def run_ranks(directory: Path, world_size: int, work: Callable[[Engine], T], **changes: Any) -> list[T]:
    """Start an engine of so many ranks on a model and let each rank do the same work."""
    settings = {
        "device": "cpu", "kv_cache_bytes": 8 << 20, "max_num_seqs": 16, "stuck_after_s": 30.0, **changes,
    }  # fmt: skip
    spec = ModelSpec(id="tiny", source=str(directory))

    def one(ranks: Ranks) -> T:
        config = EngineConfig(
            model=spec, cache_dir=str(directory), rank=ranks.rank, world_size=world_size, **settings
        )
        engine, *_ = start(config, lambda event: None, ranks)
        return work(engine)

    return on_each(world_size, one)
