"""A packed batch: every token that one step computes, of all its sequences, in one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from runtime.kernels.gpu.attention_tile import Workspace


@dataclass(slots=True)
class PackedBatch:
    """The inputs of one step, S sequences with T new tokens in all, of which R rows get logits.

    Integers are int64 on a CPU and int32 on a GPU, unless they are said to be int32.

    token_ids     [T]
    positions     [T], 0-based within the sequence, plus the sequence's base (`Decoder.position_base`)
    slots         [T], where each token's key and value go: block * block_size + offset; -1 for nowhere
    query_start   [S + 1] int32, where each sequence's new tokens begin
    seq_lens      [S] int32, tokens of each sequence after this step
    block_tables  [S, max_blocks] int32
    work_items    [N, 2] int32: (sequence, first new token in it), the tiles of the attention kernel
    logits_rows   [R], the tokens after which a next token is wanted; None for all
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    work_items: torch.Tensor
    logits_rows: torch.Tensor | None


@dataclass(slots=True)
class DeviceBatch(PackedBatch):
    """A packed batch on a GPU. Its first `num_decodes` sequences have one new token each.

    They are not counted in `query_start` and `work_items`, which are about the sequences after them;
    `query_start` still counts tokens from the first of the batch. Sequence s has its blocks in line
    `table_rows[s]` ([S] int32) of `block_tables` [num_slots, max_blocks].
    """

    table_rows: torch.Tensor
    num_decodes: int
    decode_splits: int
    prefill_splits: int
    workspace: Workspace
