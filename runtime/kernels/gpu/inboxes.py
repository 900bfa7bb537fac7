"""The memory through which GPUs send each other rows: how large it is, and how it begins.

`all_reduce.py` says what it is for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from runtime.kernels.gpu.launch import cdiv

SLOTS = 3
GATHER_BLOCK = 1024


@dataclass(frozen=True, slots=True)
class Inboxes:
    """All ranks' inboxes for up to `max_rows` rows of `width` elements.

    `addresses` [world_size] int64 are where they begin, in this rank's address space, and `turns` is where
    this rank's rows are in taking turns, int32, zeros to begin with: one for each row or, for `gather`, for
    each of its blocks. The inboxes are filled with marks to begin with.
    """

    addresses: torch.Tensor
    turns: torch.Tensor
    rank: int
    max_rows: int
    width: int

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return int(self.addresses.shape[0])


def one_shot_elements(world_size: int, max_rows: int, hidden_size: int) -> int:
    """The size of an inbox for `one_shot`: each rank's rows in each slot."""
    return SLOTS * world_size * max_rows * hidden_size


def two_shot_elements(max_rows: int, hidden_size: int) -> int:
    """The size of an inbox for `two_shot`: each rank's part of the own rows, and all rows' results."""
    return SLOTS * 2 * max_rows * hidden_size


def gather_elements(world_size: int, max_rows: int, width: int) -> int:
    """The size of an inbox for `gather`: each rank's rows in each slot."""
    return SLOTS * world_size * max_rows * width


def gather_blocks(max_rows: int, width: int) -> int:
    """How many turns `gather` counts."""
    return max_rows * cdiv(width, GATHER_BLOCK)


def fill_with_marks(inbox: torch.Tensor) -> None:
    """Make an inbox ready, before anybody writes to it."""
    # As integers: on a GPU, filling with either zero may come to clearing the memory.
    kind = torch.int16 if inbox.element_size() == 2 else torch.int32
    inbox.view(kind).fill_(torch.iinfo(kind).min)
