"""A packed batch: every token that one step computes, of all its sequences, in one row of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class PackedBatch:
    """The inputs of one step, S sequences with T new tokens in all, of which R rows get logits.

    token_ids     [T] int64
    positions     [T] int64, 0-based within the sequence
    slots         [T] int64, where each token's key and value go: block * block_size + offset
    query_start   [S + 1] int32, where each sequence's new tokens begin
    seq_lens      [S] int32, tokens of each sequence after this step
    block_tables  [S, max_blocks] int32
    work_items    [N, 2] int32: (sequence, first new token in it), the attention kernel's tiles on a CPU
    logits_rows   [R] int64, the tokens after which a next token is wanted
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    work_items: torch.Tensor
    logits_rows: torch.Tensor
