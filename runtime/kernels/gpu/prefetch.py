"""Weights of the product that comes next, on their way into the L2 cache while something else takes its time.

A kernel that keeps few multiprocessors busy, or waits for other GPUs, gets more programs than it needs for
itself. Those ask for the weights and end: nobody waits until they have come.
"""

from __future__ import annotations

from functools import cache

import torch

from runtime.kernels.gpu.language import INTERPRETED, tl, triton

# Half of the cache of an H100: what lies there, each half of the multiprocessors has a copy of.
MAX_BYTES = 24 << 20
# Of fewer rows, products are kernels of our own, which ask for what they need; see `gemv.py`. Those of more
# wait for more than weights.
_ROWS = range(9, 257)
# What one thread asks for.
CHUNK_BYTES = 1024
_BULK_CAPABILITY = 9, 0


@cache
def can_prefetch() -> bool:
    """Whether the GPU knows how to copy a run of memory into its L2 cache: from Hopper on."""
    return not INTERPRETED and torch.cuda.get_device_capability() >= _BULK_CAPABILITY


def worth_fetching(upcoming: torch.Tensor | None, num_rows: int) -> torch.Tensor | None:
    """The weights, if a product of so many rows with them gains by it; else None."""
    return upcoming if num_rows in _ROWS and can_prefetch() else None


def prefetch_programs(weights: torch.Tensor | None, num_warps: int) -> tuple[int, int]:
    """How many programs of so many warps are to call `prefetch` for these weights, and with which `stride`.

    What they ask for is spread over all of the weights. A product then reads from the cache and from memory
    at the same time; were it the beginning, it would read that no faster than the cache can be read.
    """
    if weights is None:
        return 0, 0
    num_bytes = 32 * num_warps * CHUNK_BYTES
    programs = min(weights.nbytes, MAX_BYTES) // num_bytes
    return programs, weights.nbytes * CHUNK_BYTES // max(1, programs * num_bytes) // 128 * 128


@triton.jit
def prefetch(pointer, program, stride, CHUNK_BYTES: tl.constexpr):
    """Ask for a program's share of what lies at `pointer`, a chunk every `stride` bytes."""
    threads: tl.constexpr = tl.extra.cuda.num_threads()
    chunk = program.to(tl.int64) * threads + tl.arange(0, threads)
    _ask(pointer.to(tl.int64) + chunk * stride, tl.full((threads,), CHUNK_BYTES, tl.int32))


@triton.jit
def prefetch_rows(
    pointer, first, limit, ROW_BYTES: tl.constexpr, ROWS: tl.constexpr, NUM_BYTES: tl.constexpr
):
    """Ask for the first bytes of some rows of those before `limit` that lie at `pointer`, from `first` on."""
    # Few large chunks, each by one thread: the unit that carries them out takes its time for each.
    index = tl.arange(0, max(ROWS, tl.extra.cuda.num_threads()))
    row = (first + index).to(tl.int64)
    size = tl.where((index < ROWS) & (row < limit), NUM_BYTES, 0)
    _ask(pointer.to(tl.int64) + row * ROW_BYTES, size)


@triton.jit
def _ask(address, size):
    """A chunk of so many bytes for each address, both multiples of 16; nothing where that is zero."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred some;
            setp.ne.s32 some, $2, 0;
            @some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.b32 $0, 0;
        }
        """,
        "=r,l,r",
        [address, size],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
