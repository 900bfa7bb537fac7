"""How much memory there is, and how large the KV cache may be."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import torch

from runtime.engine.scheduler import PROMPT_LOGPROBS_CHUNK
from runtime.model.config import ModelConfig

# Of the memory that is free on a CPU machine. Pages of the pool that are never used are never touched.
_CPU_FRACTION = 0.3
# Work space of the libraries, captured graphs, and what an allocator cannot use of what it holds.
_LIBRARIES_BYTES = 1 << 30


def block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """What one block of keys and values takes in all layers."""
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * block_size * dtype.itemsize


def working_bytes(config: ModelConfig, num_tokens: int, max_num_seqs: int, dtype: torch.dtype) -> int:
    """What a step of `num_tokens` tokens takes on a GPU beside weights and cache, generously."""
    widest = 2 * config.intermediate_size + config.intermediate_size + 4 * config.hidden_size
    logits = max(max_num_seqs, PROMPT_LOGPROBS_CHUNK) * config.vocab_size * 4
    # The widest projection, gate and up, when quantised weights are brought back to floating point.
    scratch = 2 * config.intermediate_size * config.hidden_size if config.quantization is not None else 0
    return (num_tokens * widest + scratch) * dtype.itemsize + 4 * logits + _LIBRARIES_BYTES


def decode_bytes(config: ModelConfig, num_seqs: int, dtype: torch.dtype) -> int:
    """What a decode step of that many sequences computes with, by and large: its logits and two layers."""
    layer = 3 * config.intermediate_size + 8 * config.hidden_size
    return num_seqs * (4 * config.vocab_size + 2 * layer * dtype.itemsize) + (16 << 20)


def available_bytes() -> int:
    """Main memory this process may still take: the machine's, or less if a container limits it.

    Pages that are only kept because they were read from files count as free, in either case.
    """
    return _free_bytes(())


def pinnable_bytes() -> int:
    """Main memory that may still be pinned. Pages of files count as free unless some process has them mapped.

    Those of models that sleep are mapped and pinned, and nothing tells them from pages that can be dropped.
    """
    return _free_bytes(("Mapped", "file_mapped"))


def _free_bytes(kept: Container[str]) -> int:
    """What the machine, and the container, have to give, without what these fields of theirs count."""
    available = 0
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *_ = line.replace(":", "").split()
        if name == "MemAvailable":
            available += int(value) * 1024
        elif name in kept:
            available -= int(value) * 1024
    limit = Path("/sys/fs/cgroup/memory.max")
    used = Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and (text := limit.read_text().strip()) != "max":
        available = min(available, int(text) - int(used.read_text()) + _file_bytes(kept))
    return max(0, available)


def _file_bytes(kept: Container[str]) -> int:
    """What the container holds of files."""
    stat = Path("/sys/fs/cgroup/memory.stat")
    fields = dict(line.split() for line in stat.read_text().splitlines()) if stat.exists() else {}
    total = int(fields.get("active_file", 0)) + int(fields.get("inactive_file", 0))
    return total - sum(int(value) for name, value in fields.items() if name in kept)


def cpu_num_blocks(kv_cache_bytes: int | None, bytes_per_block: int, most: int, num_ranks: int) -> int:
    """Blocks in a rank's pool: what was asked for, else a share of free memory; never more than `most`."""
    budget = kv_cache_bytes
    if budget is None:
        budget = int(available_bytes() * _CPU_FRACTION) // num_ranks
    return min(budget // bytes_per_block, most)
