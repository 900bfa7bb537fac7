"""A tape gives what the kernels on it give, bit for bit, whatever its inputs hold by then."""

from __future__ import annotations

import pytest
import torch

from runtime.kernels.activation import silu_mul
from runtime.kernels.attention import AttentionForm, attention
from runtime.kernels.batch import PackedBatch
from runtime.kernels.embedding import embedding, embedding_torch
from runtime.kernels.linear import LinearWeights, linear
from runtime.kernels.norm import add_rms_norm
from runtime.kernels.rotary import rotary_store
from runtime.kernels.tape import Tape, record
from tests.runtime.kernels.compiled import needs_kernels

pytestmark = needs_kernels

HIDDEN, HEADS, KV_HEADS, DIM, BLOCK = 48, 6, 2, 16, 16


class Layer:
    """A transformer layer of compiled kernels, with inputs that can be changed in place."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.table = torch.randn(100, HIDDEN).half()
        self.norm = torch.randn(HIDDEN)
        self.qkv = LinearWeights([torch.randn(heads * DIM, HIDDEN) for heads in (HEADS, KV_HEADS, KV_HEADS)])
        self.output = LinearWeights([torch.randn(HIDDEN, HEADS * DIM).bfloat16()], [torch.randn(HIDDEN)])
        self.gate_up = LinearWeights([torch.randn(64, HIDDEN), torch.randn(64, HIDDEN)])
        self.down = LinearWeights([torch.randn(HIDDEN, 64)])
        self.cos_sin = torch.randn(50, 2, DIM // 2)
        self.keys = torch.randn(9, KV_HEADS, DIM, BLOCK)
        self.values = torch.randn(9, KV_HEADS, BLOCK, DIM)
        self.batch = PackedBatch(
            token_ids=torch.tensor([3, 99]),
            positions=torch.tensor([20, 5]),
            slots=torch.tensor([4 * BLOCK + 4, 7 * BLOCK + 5]),
            query_start=torch.tensor([0, 1, 2], dtype=torch.int32),
            seq_lens=torch.tensor([21, 6], dtype=torch.int32),
            block_tables=torch.tensor([[1, 4], [7, 0]], dtype=torch.int32),
            work_items=torch.tensor([[0, 0], [1, 0]], dtype=torch.int32),
            logits_rows=None,
        )

    def next_step(self) -> None:
        batch = self.batch
        batch.token_ids.copy_(torch.tensor([41, 8]))
        for tensor in (batch.positions, batch.slots, batch.seq_lens):
            tensor += 1

    def compute(self) -> torch.Tensor:
        batch = self.batch
        residual = embedding(batch.token_ids, self.table, torch.float32, 2.5)
        qkv = linear(add_rms_norm(None, residual, self.norm, 1e-5), self.qkv)
        rotary_store(qkv, self.cos_sin, batch.positions, batch.slots, self.keys, self.values, HEADS)
        attended = attention(qkv, self.keys, self.values, batch, AttentionForm(HEADS, 0.25))
        normed = add_rms_norm(linear(attended, self.output), residual, self.norm, 1e-6)
        x = linear(silu_mul(linear(normed, self.gate_up)), self.down)
        return add_rms_norm(x, residual, self.norm, 1e-5)


def recorded(compute) -> Tape:
    tape = record(compute)
    assert tape is not None
    return tape


@torch.inference_mode()
def test_played_is_computed() -> None:
    taped, plain = Layer(), Layer()
    tape = recorded(taped.compute)
    assert torch.equal(tape.play(), plain.compute())
    for _ in range(3):
        taped.next_step()
        plain.next_step()
        assert torch.equal(tape.play(), plain.compute())
        assert torch.equal(taped.keys, plain.keys)
        assert torch.equal(taped.values, plain.values)


@torch.inference_mode()
def test_memory_that_is_in_use_is_not_lent_again() -> None:
    torch.manual_seed(1)
    weights = LinearWeights([torch.randn(32, 32)])
    x, ones = torch.randn(2, 32), torch.ones(32)

    def compute() -> torch.Tensor:
        early = linear(x, weights)
        others = [linear(early, weights) for _ in range(3)]
        last = others.pop(1)
        others.clear()
        for _ in range(4):
            last = linear(last, weights)  # each in the memory of one that is no more
        add_rms_norm(early, last, ones, 1e-5)
        return last

    tape = recorded(compute)
    for _ in range(3):
        # Between two plays, others may take and write whatever memory is free.
        torch.full((64, 2, 32), torch.nan)
        x.normal_()
        assert torch.equal(tape.play(), compute())


@pytest.mark.parametrize(
    "stray",
    [
        lambda x: x + 1,
        lambda x: x.mul_(2),
        lambda x: x.view(-1),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x.half(),
        lambda x: x * x.sum().item(),
    ],
)
def test_what_a_tape_cannot_hold_is_noticed(stray) -> None:
    layer = Layer()

    def compute() -> torch.Tensor:
        stray(x := layer.compute())
        return x

    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert record(compute) is None
            assert record(layer.compute) is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden_size", [1, 15, 16, 100])
def test_embedding_against_its_twin(dtype: torch.dtype, hidden_size: int) -> None:
    torch.manual_seed(2)
    table = torch.randn(50, hidden_size + 3).to(dtype)[:, 2 : hidden_size + 2]
    for count in (0, 1, 16, 40):
        ids = torch.randint(0, 50, (count,))
        for multiplier in (1.0, 67.882):
            ours = embedding(ids, table, torch.float32, multiplier)
            torch.testing.assert_close(ours, embedding_torch(ids, table, torch.float32, multiplier))
