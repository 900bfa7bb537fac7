"""What the kernels must know of quantised weights. Needs no torch: it is read before torch is there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Quantization:
    """How linear layers are quantised; the formats are described in `model/quantization.py`.

    group_size   how many inputs share a scale, -1 for all
    block_rows   how many outputs do, in blocks of e4m3
    in_order     whether groups are runs of neighbouring inputs (without GPTQ's desc_act)
    zero_offset  what is to be added to stored zero points
    """

    method: Literal["gptq", "awq", "fp8"]
    bits: int
    group_size: int
    in_order: bool
    zero_offset: int
    block_rows: int = 1
