"""A first step while the weights are still on their way, by an engine of a few layers of zeros.

The first step of a process loads kernels and libraries onto the device, which takes a while; the first step
of the real engine then finds them there.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import torch

from runtime.engine import canary
from runtime.engine.build import Weights, build_engine
from runtime.model.families import Model
from runtime.protocol import EngineConfig, SleepLevel

# Families have layers of two kinds at most, one after the other.
_LAYERS = 2
_CACHE_BYTES = 128 << 20


def rehearse(config: EngineConfig, directory: Path, model: Model, weights: Weights, device: str) -> None:
    """Take a step like the engine's first. `weights` are only looked at for their shapes and dtypes.

    Raises what building an engine and taking a step raise; nothing depends on what is done here.
    """
    layers = min(_LAYERS, model.config.num_layers)
    few = replace(model.config, num_layers=layers, windows=model.config.windows[:layers])
    held = {name: tensors for name, tensors in weights.items() if _number(name) < layers}
    brief = msgspec.structs.replace(config, max_model_len=None, kv_cache_bytes=_CACHE_BYTES)
    engine, _ = build_engine(
        brief, directory, replace(model, config=few), lambda: _zeros(held), device, _Unkept()
    )
    canary.ask(engine)
    del engine
    # Python's own collector stands still during a start, and the weights and the KV cache want the memory.
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _number(name: str) -> int:
    """The number of the layer that a parameter belongs to; 0 for those of none."""
    kind, _, rest = name.partition(".")
    return int(rest.partition(".")[0]) if kind == "layers" else 0


def _zeros(weights: Weights) -> Weights:
    """Tensors of the same shapes and dtypes, all in the same memory."""
    tensors = [tensor for parts in weights.values() for tensor in parts]
    room = torch.zeros(max(tensor.nbytes for tensor in tensors), dtype=torch.uint8, device=tensors[0].device)
    return {
        name: tuple(room[: part.nbytes].view(part.dtype).view(part.shape) for part in parts)
        for name, parts in weights.items()
    }


class _Unkept:
    """A `Memory` that never goes to sleep."""

    def derived(self) -> AbstractContextManager[None]:
        return nullcontext()

    def cache(self) -> AbstractContextManager[None]:
        return nullcontext()

    def on_reload(self, work: Callable[[], object]) -> None:
        pass

    def prepare(self, level: SleepLevel, part: int, parts: int) -> None:
        pass

    def give_back(self, level: SleepLevel) -> None:
        pass

    def take_back(self) -> None:
        pass
