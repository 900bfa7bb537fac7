"""Weights of the product that comes next, on their way into the L2 cache while something else takes its time.

A kernel that keeps few multiprocessors busy, or waits for other GPUs, gets more programs than it needs for
itself. Those ask for the weights and end: nobody waits until they have come.
"""

from __future__ import annotations

import torch

from runtime.kernels.gpu.language import INTERPRETED, tl, triton

# Half of the cache of an H100: what lies there, each half of the multiprocessors has a copy of.
MAX_BYTES = 24 << 20
# What one thread asks for.
CHUNK_BYTES = 1024
_BULK_CAPABILITY = 9, 0


def can_prefetch() -> bool:
    """Whether the GPU knows how to copy a run of memory into its L2 cache: from Hopper on."""
    return not INTERPRETED and torch.cuda.get_device_capability() >= _BULK_CAPABILITY


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
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;",
        "=r,l,r",
        [pointer.to(tl.int64) + chunk * stride, tl.full((threads,), CHUNK_BYTES, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
