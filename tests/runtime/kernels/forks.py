"""Ranks as real processes, for kernels that wait for each other."""

from __future__ import annotations

import multiprocessing
import os
import traceback
from collections.abc import Callable


def in_processes(world_size: int, work: Callable[[int], None]) -> None:
    """Run `work` for each rank in a fork of this process, which shares what is shared memory already."""

    def one(rank: int) -> None:
        try:
            work(rank)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one, args=(rank,)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        process.kill()
    assert [process.exitcode for process in ranks] == [0] * world_size
