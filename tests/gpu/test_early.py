"""Kernels that start early wait, for whoever writes what they read or reads what they overwrite.

Each of them is launched between a kernel that takes its time and one that is quick. A kernel that did not
wait would read what was there before, or overwrite what is still read, or let the third one see what the
first has not written yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import triton
import triton.language as tl

from runtime.kernels.gpu.activation import gelu_tanh_mul, silu_mul
from runtime.kernels.gpu.attention_decode import decode_workspace, paged_decode
from runtime.kernels.gpu.early import early_launch
from runtime.kernels.gpu.embedding import embedding
from runtime.kernels.gpu.gemv import gemv
from runtime.kernels.gpu.launch import kernel
from runtime.kernels.gpu.norm import add_rms_norm, head_rms_norm
from runtime.kernels.gpu.packed_config import TileConfig
from runtime.kernels.gpu.packed_gemv import packed_gemv
from runtime.kernels.gpu.packed_tiles import TileWorkspace, packed_tiles
from runtime.kernels.gpu.rotary import rotary_store
from tests.runtime.kernels.packed_matrices import random_matrix

pytestmark = pytest.mark.gpu
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 512, 8, 2, 64, 16
REPEATS = 10


@kernel
@triton.jit
def _copies_kernel(
    from_a, to_a, from_b, to_b, from_c, to_c, a, b, c, naps, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for _ in range(naps):
        tl.inline_asm_elementwise(
            "nanosleep.u32 $1; mov.b32 $0, 0;", "=r,r", [naps], dtype=tl.int32, is_pure=False, pack=1
        )
    for start in range(0, a, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(to_a + at, tl.load(from_a + at, at < a), at < a)
    tl.debug_barrier()
    for start in range(0, b, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(to_b + at, tl.load(from_b + at, at < b), at < b)
    for start in range(0, c, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(to_c + at, tl.load(from_c + at, at < c), at < c)


def copies(*pairs: tuple[torch.Tensor, torch.Tensor], naps: int = 0) -> None:
    """Copy each of three tensors, one after the other, by a kernel that sleeps before that."""
    words = [each.view(-1).view(torch.int32) for pair in pairs for each in pair]
    _copies_kernel[(1,)](
        *words, *(each.numel() for each in words[::2]), naps, BLOCK=1024, num_warps=4, **early_launch()
    )


@dataclass(frozen=True)
class Case:
    """A kernel's launch, something that it reads, and something that it writes; they may be the same."""

    reads: torch.Tensor
    writes: torch.Tensor
    launch: Callable[[], object]


def bf16(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def words(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def embeds() -> Case:
    ids, table, out = words(5, 7), bf16(10, HIDDEN), bf16(2, HIDDEN)
    return Case(ids, out, lambda: embedding(ids, table, out))


def norms() -> Case:
    x, weight, out = bf16(2, HIDDEN), torch.ones(HIDDEN, device="cuda"), bf16(2, HIDDEN)
    return Case(x, out, lambda: add_rms_norm(None, x, weight, 1e-5, out))


def adds() -> Case:
    x, residual, weight = bf16(2, HIDDEN), bf16(2, HIDDEN), torch.ones(HIDDEN, device="cuda")
    return Case(x, residual, lambda: add_rms_norm(x, residual, weight, 1e-5, torch.empty_like(x)))


def adds_normed() -> Case:
    x, residual, weight = bf16(2, HIDDEN), bf16(2, HIDDEN), torch.ones(HIDDEN, device="cuda")
    out = torch.empty_like(x)
    return Case(x, residual, lambda: add_rms_norm(x, residual, weight, 1e-5, out, x_weight=weight))


def norms_heads() -> Case:
    qkv, weight = bf16(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.ones(HEAD_DIM, device="cuda")
    return Case(qkv, qkv, lambda: head_rms_norm(qkv, weight, weight, 1e-5, HEADS))


def _cache() -> tuple[torch.Tensor, torch.Tensor]:
    keys, values = bf16(2, 20, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return keys, values


def rotates() -> Case:
    qkv, angles = bf16(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), torch.randn(64, 2, HEAD_DIM // 2, device="cuda")
    at, (keys, values) = words(3, 4), _cache()
    return Case(qkv, qkv, lambda: rotary_store(qkv, angles, at, at, keys, values, HEADS))


def stores() -> Case:
    qkv, at, (keys, values) = bf16(2, (HEADS + 2 * KV_HEADS) * HEAD_DIM), words(3, 4), _cache()
    return Case(qkv, values, lambda: rotary_store(qkv, None, at, at, keys, values, HEADS))


def attends(num_splits: int) -> Case:
    q, out, (keys, values) = bf16(1, HEADS, HEAD_DIM), bf16(1, HEADS, HEAD_DIM), _cache()
    table, lengths = torch.arange(20, dtype=torch.int32, device="cuda")[None], words(0, 320)[1:]
    row = words(0)
    workspace = decode_workspace(1, HEADS, KV_HEADS, HEAD_DIM, num_splits, "cuda")
    return Case(
        q, out,
        lambda: paged_decode(
            q, keys, values, table, row, lengths, out,
            scale=0.1, num_splits=num_splits, workspace=workspace,
        ),
    )  # fmt: skip


def activates(activation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Case:
    x, out = bf16(2, 2 * HIDDEN), bf16(2, HIDDEN)
    return Case(x, out, lambda: activation(x, out))


def multiplies(num_rows: int, silu: bool) -> Case:
    x, weight = bf16(num_rows, HIDDEN), bf16(2 * HIDDEN, HIDDEN)
    out = bf16(num_rows, HIDDEN if silu else 2 * HIDDEN)
    return Case(x, out, lambda: gemv(x, weight, out, silu_mul=silu))


def multiplies_packed(num_rows: int, kind: str) -> Case:
    matrix = random_matrix(kind, 2 * HIDDEN, HIDDEN, 128, False, device="cuda")
    x, out = bf16(num_rows, HIDDEN), bf16(num_rows, 2 * HIDDEN)
    if num_rows == 1:
        return Case(x, out, lambda: packed_gemv(x, matrix, out))
    workspace = TileWorkspace.allocate(1 << 20, 64, "cuda")
    config = TileConfig(8, 64, 2, 4, 3, whole=5)
    return Case(x, out, lambda: packed_tiles(x, matrix, out, config, workspace))


CASES: dict[str, Callable[[], Case]] = {
    "embedding": embeds,
    "norm": norms,
    "addition and norm": adds,
    "norm, addition and norm": adds_normed,
    "norm of heads": norms_heads,
    "rotation": rotates,
    "cache": stores,
    "attention": lambda: attends(1),
    "attention in parts": lambda: attends(2),
    "SiLU": lambda: activates(silu_mul),
    "GELU": lambda: activates(gelu_tanh_mul),
    "product of one row": lambda: multiplies(1, silu=False),
    "gated product of one row": lambda: multiplies(1, silu=True),
    "product of several rows": lambda: multiplies(8, silu=False),
    "gated product of several rows": lambda: multiplies(8, silu=True),
    "product with 8 bits": lambda: multiplies_packed(1, "int8"),
    "product with 4 bits": lambda: multiplies_packed(1, "int4"),
    "product with FP8": lambda: multiplies_packed(1, "fp8"),
    "product of several rows with 8 bits": lambda: multiplies_packed(8, "int8"),
    "product of several rows with 4 bits": lambda: multiplies_packed(8, "int4"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_a_graph", [False, True])
def test_it_waits(name: str, in_a_graph: bool) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    fresh, old = case.reads.clone(), case.writes.clone()
    case.launch()
    expected = case.writes.clone()
    token, passed_on, seen, kept = (torch.zeros(64, device="cuda") for _ in range(4))
    token, kept = token + 1.0, torch.empty_like(old)
    nothing = token, torch.empty_like(token)

    def chain() -> None:
        copies((case.writes, kept), (fresh, case.reads), (token, passed_on), naps=200)
        case.launch()
        copies((passed_on, seen), nothing, nothing)

    def reset() -> None:
        case.reads.zero_()
        case.writes.copy_(old)
        passed_on.zero_()

    reset()
    chain()
    run: Callable[[], None] = chain
    if in_a_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        run = graph.replay
    for _ in range(REPEATS):
        reset()
        run()
        assert torch.equal(case.writes, expected)
        assert torch.equal(kept, old)
        assert torch.equal(seen, token)


def test_an_event_that_the_stream_waits_for_holds_a_kernel_back_as_well() -> None:
    """Weights that another stream brings are there, though they are read before others are waited for."""
    torch.manual_seed(0)
    x, fresh = bf16(1, HIDDEN), bf16(2 * HIDDEN, HIDDEN)
    weight, out = torch.zeros_like(fresh), bf16(1, 2 * HIDDEN)
    expected = gemv(x, fresh, torch.empty_like(out))
    token, passed_on = torch.ones(64, device="cuda"), torch.zeros(64, device="cuda")
    nothing = token, passed_on
    link, come = torch.cuda.Stream(), torch.cuda.Event()
    for _ in range(REPEATS):
        weight.zero_()
        torch.cuda.synchronize()
        with torch.cuda.stream(link):
            copies((fresh, weight), nothing, nothing, naps=500)
            come.record()
        copies(nothing, nothing, nothing, naps=200)
        torch.cuda.current_stream().wait_event(come)
        gemv(x, weight, out)
        assert torch.equal(out, expected)
