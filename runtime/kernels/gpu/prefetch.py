"""Weights of the product that comes next, on their way into the L2 cache while something else takes its time.

A kernel that keeps few multiprocessors busy, or waits for other GPUs, gets more programs than it needs for
itself. Those ask for the weights and end: nobody waits until they have come.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

# Half of the cache of an H100: what lies there, each half of the multiprocessors has a copy of.
MAX_BYTES = 24 << 20
# A program's share, of which each thread asks for the same number of bytes.
PROGRAM_BYTES = 1 << 18
_BULK_CAPABILITY = 90


def can_prefetch() -> bool:
    """Whether the GPU knows how to copy a run of memory into its L2 cache: from Hopper on."""
    return not triton.knobs.runtime.interpret and driver.active.get_current_target().arch >= _BULK_CAPABILITY


def prefetch_programs(weights: torch.Tensor | None) -> int:
    """How many programs are to call `prefetch` for the beginning of these weights."""
    return 0 if weights is None else min(weights.nbytes, MAX_BYTES) // PROGRAM_BYTES


@triton.jit
def prefetch(pointer, program, PROGRAM_BYTES: tl.constexpr):
    """Ask for a program's share of what lies at `pointer`, which is aligned to 16 bytes."""
    threads: tl.constexpr = tl.extra.cuda.num_threads()
    each: tl.constexpr = PROGRAM_BYTES // threads
    start = pointer.to(tl.int64) + program.to(tl.int64) * PROGRAM_BYTES + tl.arange(0, threads) * each
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [start, tl.full((threads,), each, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
