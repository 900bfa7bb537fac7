"""Both attention kernels at the shapes of real models in bf16, against float32 attention of their inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.runtime.kernels.paged_attention import FEATURES, Paged, Shape, feature_cases

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

import triton

from runtime.kernels.gpu.attention_decode import decode_workspace, paged_decode, splits_for
from runtime.kernels.gpu.attention_prefill import (
    paged_prefill,
    prefill_splits,
    prefill_tile,
    prefill_work_items,
    prefill_workspace,
)

pytestmark = pytest.mark.gpu
NUM_SMS = torch.cuda.get_device_properties(0).multi_processor_count
# Where a token sees few keys, its output is about as large as a value (up to 5 of these normal numbers):
# half an ulp of a bf16 is 2^-6 there, and the weights were rounded to 8 bits as well.
ABSOLUTE = 2**-5
# Over all elements such errors are independent: the two roundings of 2^-9, uniform, give about 0.002.
RELATIVE_NORM = 4e-3
MODELS = {
    "Llama-3-8B": Shape(32, 8, 128),
    "Qwen2.5-0.5B": Shape(14, 2, 64),
    "Qwen2-7B": Shape(28, 4, 128),
    "InternLM2-20B": Shape(48, 8, 128),
    "ChatGLM3": Shape(32, 2, 128),
    "Baichuan-13B": Shape(40, 40, 128),
    "Gemma-2-9B": Shape(16, 8, 256),
    "heads of 80": Shape(32, 32, 80),
    "heads of 96": Shape(24, 8, 96),
    "a group of 5": Shape(40, 8, 128),
}
SEQ_LENS = [1, 63, 64, 65, 128, 511, 1000, 2049, 0, 4000]
CHUNKS = [(1, 1), (500, 500), (64, 64), (129, 1300), (7, 3001), (1, 900), (1025, 1025)]


def shape_of(model: str, block_size: int = 16, dtype: torch.dtype = torch.bfloat16) -> Shape:
    plain = MODELS[model]
    return Shape(plain.num_heads, plain.num_kv_heads, plain.head_dim, block_size, dtype, "cuda")


def decode(paged: Paged, num_splits: int | None = None, **features: Any) -> torch.Tensor:
    shape, batch = paged.shape, len(paged.seq_lens)
    splits = num_splits or splits_for(batch, shape.num_kv_heads, max(paged.seq_lens))
    workspace = decode_workspace(batch, shape.num_heads, shape.num_kv_heads, shape.head_dim, splits, "cuda")
    return paged_decode(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.table_rows,
        paged.ints(paged.seq_lens),
        torch.full_like(paged.out, math.nan),
        num_splits=splits,
        workspace=workspace,
        **{"scale": shape.head_dim**-0.5, **features},
    )


def prefill(paged: Paged, num_splits: int = 1, **features: Any) -> torch.Tensor:
    shape = paged.shape
    tile = prefill_tile(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.dtype.itemsize)
    items = prefill_work_items(paged.counts, paged.seq_lens, tile)
    programs = len(items) * num_splits
    return paged_prefill(
        paged.q,
        paged.keys,
        paged.values,
        paged.block_tables,
        paged.query_start,
        paged.ints(paged.seq_lens),
        paged.ints(items),
        torch.full_like(paged.out, math.nan),
        table_rows=paged.table_rows,
        num_splits=num_splits,
        workspace=prefill_workspace(
            shape.num_kv_heads, shape.head_dim, 2, programs * shape.num_kv_heads, "cuda"
        ),
        **{"scale": shape.head_dim**-0.5, **features},
    )


def check(out: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out.float(), expected, atol=ABSOLUTE, rtol=0)
    assert (out.float() - expected).norm() <= RELATIVE_NORM * expected.norm()


def decode_batch(shape: Shape, seq_lens: list[int]) -> Paged:
    return Paged.random(shape, [1] * len(seq_lens), seq_lens)


def prefill_batch(shape: Shape, chunks: list[tuple[int, int]]) -> Paged:
    return Paged.random(shape, [new for new, _ in chunks], [length for _, length in chunks])


@pytest.mark.parametrize("model", MODELS)
def test_decode_of_models(model: str) -> None:
    paged = decode_batch(shape_of(model), SEQ_LENS)
    check(decode(paged), paged.expected(scale=paged.shape.head_dim**-0.5))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("num_splits", [1, 4])
def test_prefill_of_models(model: str, num_splits: int) -> None:
    paged = prefill_batch(shape_of(model), CHUNKS)
    check(prefill(paged, num_splits), paged.expected(scale=paged.shape.head_dim**-0.5))


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("model", ["Llama-3-8B", "Gemma-2-9B"])
def test_features(name: str, model: str) -> None:
    scale = MODELS[model].head_dim ** -0.5
    paged = decode_batch(shape_of(model), SEQ_LENS)
    features = feature_cases(paged.shape.num_heads, len(paged.q), "cuda")[name]
    check(decode(paged, **features), paged.expected(scale=scale, **features))
    paged = prefill_batch(shape_of(model), CHUNKS)
    features = feature_cases(paged.shape.num_heads, len(paged.q), "cuda")[name]
    check(prefill(paged, **features), paged.expected(scale=scale, **features))


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_block_sizes(block_size: int) -> None:
    shape = shape_of("Llama-3-8B", block_size)
    paged = decode_batch(shape, SEQ_LENS)
    check(decode(paged), paged.expected(scale=shape.head_dim**-0.5))
    paged = prefill_batch(shape, CHUNKS)
    check(prefill(paged), paged.expected(scale=shape.head_dim**-0.5))


@pytest.mark.parametrize("model", ["Llama-3-8B", "Gemma-2-9B"])
def test_float32_is_exact_but_for_the_order_of_sums(model: str) -> None:
    shape = shape_of(model, dtype=torch.float32)
    paged = decode_batch(shape, [1, 300, 1000])
    scale = shape.head_dim**-0.5
    torch.testing.assert_close(decode(paged, 3), paged.expected(scale=scale), atol=2e-5, rtol=0)
    paged = prefill_batch(shape, [(65, 65), (30, 500)])
    torch.testing.assert_close(prefill(paged, 2), paged.expected(scale=scale), atol=2e-5, rtol=0)


def test_whoever_ends_last_the_bits_are_the_same() -> None:
    shape = shape_of("Llama-3-8B")
    paged = decode_batch(shape, [4000, 3000, 2000, 777] * 8)
    first = decode(paged, 16)
    assert all(torch.equal(decode(paged, 16), first) for _ in range(50))
    paged = prefill_batch(shape, [(30, 4000), (60, 3000)])
    first = prefill(paged, 8)
    assert all(torch.equal(prefill(paged, 8), first) for _ in range(50))


def test_a_captured_decode_follows_what_the_device_tensors_say() -> None:
    shape = shape_of("Llama-3-8B")
    batch = 8
    shapes = [[5, 100, 3000, 1, 64, 65, 0, 0], [900, 1, 1, 4000, 2, 3, 127, 129]]
    batches = [decode_batch(shape, seq_lens) for seq_lens in shapes]
    largest = max(batches, key=lambda paged: len(paged.keys))
    q, out, seq_lens, table_rows = (
        torch.empty_like(largest.q.contiguous()),
        torch.empty_like(largest.out),
        largest.ints([0] * batch),
        torch.zeros_like(largest.table_rows),
    )
    tables = largest.ints([[0] * 512] * len(largest.block_tables))
    keys, values = torch.zeros_like(largest.keys), torch.zeros_like(largest.values)
    workspace = decode_workspace(batch, 32, 8, 128, 8, "cuda")

    def step() -> None:
        paged_decode(
            q, keys, values, tables, table_rows, seq_lens, out, scale=0.1, num_splits=8, workspace=workspace
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for paged in batches:
        q.copy_(paged.q)
        seq_lens.copy_(paged.ints(paged.seq_lens))
        table_rows.copy_(paged.table_rows)
        tables[:, : paged.block_tables.shape[1]] = paged.block_tables
        keys[: len(paged.keys)] = paged.keys
        values[: len(paged.keys)] = paged.values
        graph.replay()
        assert torch.equal(out, decode(paged, 8, scale=0.1))
        check(out, paged.expected(scale=0.1))


def test_after_warm_up_nothing_is_compiled_for_new_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = shape_of("Qwen2.5-0.5B")
    decode(decode_batch(shape, [20, 300]), 4)
    for splits in (1, 2):
        prefill(prefill_batch(shape, [(20, 20), (7, 500)]), splits)
    compiled: list[str] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **call: compiled.append(call["repr"])
    )
    for batch in (1, 3, 16, 33):
        for longest in (1, 16, 999, 2048):
            paged = decode_batch(shape, [longest] * batch)
            decode(paged, 1)
            decode(paged, 16)
            paged.table_rows = torch.cat([paged.table_rows, paged.table_rows])[batch:]
            decode(paged)
    for new in (1, 16, 100, 300):
        for history in (0, 1, 16, 2000):
            paged = prefill_batch(shape, [(new, history + new)] * 2)
            prefill(paged, 1)
            prefill(paged, 3)
    assert compiled == []


def test_splits_for_short_extensions_fit_the_workspace_of_the_device() -> None:
    shape = shape_of("Llama-3-8B")
    tile = prefill_tile(32, 8, 128, 2)
    workspace = prefill_workspace(8, 128, 2, NUM_SMS, "cuda")
    for new, length in ((1, 8000), (16, 8000), (100, 4000)):
        paged = prefill_batch(shape, [(new, length)])
        items = prefill_work_items([new], [length], tile)
        splits = prefill_splits(len(items), 8, length, NUM_SMS)
        assert splits > 1
        out = paged_prefill(
            paged.q,
            paged.keys,
            paged.values,
            paged.block_tables,
            paged.query_start,
            paged.ints([length]),
            paged.ints(items),
            paged.out,
            scale=0.1,
            table_rows=paged.table_rows,
            num_splits=splits,
            workspace=workspace,
        )
        check(out, paged.expected(scale=0.1))
