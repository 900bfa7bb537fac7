"""Cases that mostly wait for kernels to be compiled, tried in several processes at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

_PROCESSES = 8


@contextmanager
def tried_apart(
    check: Callable[..., None], cases: Iterable[tuple[Any, ...]]
) -> Iterator[dict[tuple[Any, ...], Future[None]]]:
    """What becomes of check(*case) for each of these cases."""
    with ProcessPoolExecutor(_PROCESSES, get_context("spawn")) as pool:
        try:
            yield {case: pool.submit(check, *case) for case in cases}
        finally:
            pool.shutdown(cancel_futures=True)
