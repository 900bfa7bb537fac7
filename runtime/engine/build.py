"""Loaded weights -> a running engine on its device. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from runtime.engine.blocks import BlockManager
from runtime.engine.core import Engine
from runtime.engine.cpu.memory import HostMemory
from runtime.engine.cpu.runner import HostRunner
from runtime.engine.grammar.grammars import Grammars
from runtime.engine.memory import block_bytes, cpu_num_blocks, working_bytes
from runtime.engine.scheduler import Scheduler
from runtime.engine.sleeper import Memory
from runtime.engine.step import Runner
from runtime.errors import FirstlightError
from runtime.kernels import native
from runtime.kernels.quantization import Quantization
from runtime.model.config import ModelConfig
from runtime.model.decoder import CausalLM, Decoder
from runtime.model.families import ForeignModel, Model
from runtime.model.placing import Packed, place, turn_quantised
from runtime.protocol import EngineConfig

if TYPE_CHECKING:
    from runtime.parallel.group import Group

Weights = Mapping[str, tuple[torch.Tensor, ...]]
# Answers that run wait for a step with another's prompt. A CPU is as fast with this many tokens as with more,
# and takes half a second for them with a small model; a GPU needs many to be busy.
_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 8192}
_DTYPES = {
    "float32": torch.float32, "float": torch.float32, "float16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16,
}  # fmt: skip
# Other names that users know.
_METHODS = {"fbgemm_fp8": "fp8", "compressed-tensors": "fp8"}


class SettingError(FirstlightError):
    """A setting that this model or this machine cannot honour."""


def build_engine(
    config: EngineConfig,
    directory: Path,
    model: Model | ForeignModel,
    weights: Callable[[], Weights],
    device_type: str,
    memory: Memory,
    group: Group | None = None,
) -> tuple[Engine, torch.dtype]:
    """The engine on `cpu` or `cuda`, and the dtype it computes in. Raises `FirstlightError`.

    In a group it is this rank's part of the engine, and all ranks must build theirs together.
    `directory` holds the model's tokenizer; what it can do without while it sleeps lies in `memory`.
    """
    device = _device(device_type)
    dtype = _dtype(config, model.torch_dtype, device)
    if device.type == "cpu":
        # With the compiled kernels, which bring their own threads, torch's would only get in the way.
        compiled = isinstance(model, Model) and native.library() is not None
        torch.set_num_threads(1 if compiled else native.default_threads())
    packed = _turn_quantised(config, model, weights, device, dtype, memory)
    with memory.derived():
        shape, decoder_for = _load(model, weights, packed, device, dtype, group)
    if group is not None:
        group.prepare(shape.hidden_size, shape.vocab_size, dtype)
    max_model_len = _max_model_len(config, shape)
    budget = _budget(config, device, max_model_len)
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = _num_blocks(config, shape, device, dtype, budget, most)
    if group is not None:
        num_blocks = group.least(num_blocks)
    held = num_blocks * config.block_size
    if held < max_model_len:
        if config.max_model_len is not None:
            raise SettingError(
                f"The KV cache has room for {held} tokens, fewer than --max-model-len {max_model_len}: "
                "lower it, or give the cache more memory."
            )
        max_model_len = held
    with memory.derived():
        decoder = decoder_for(max_model_len)
    blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
    runner: Runner
    if device.type == "cpu":
        runner = HostRunner(decoder, num_blocks, config.block_size, dtype)
        if isinstance(memory, HostMemory):
            memory.note_pool(tensor for layer in runner.cache for tensor in (layer.keys, layer.values))
    else:
        from runtime.engine.gpu.memory import DeviceMemory
        from runtime.engine.gpu.runner import DeviceRunner

        assert isinstance(memory, DeviceMemory)
        decoder.before = memory.wait_for_weights
        runner = DeviceRunner(
            decoder, num_blocks, config.block_size, config.max_num_seqs, budget, max_model_len, dtype,
            memory,
        )  # fmt: skip
    scheduler = Scheduler(blocks, config.max_num_seqs, budget, config.enable_chunked_prefill)
    grammars = Grammars(directory, runner.vocab_size)
    pin_masks = device.type == "cuda"
    engine = Engine(runner, scheduler, max_model_len, config.seed, grammars, decoder.position_base, pin_masks)
    engine.keeps_fingerprint = group is not None
    return engine, dtype


def _turn_quantised(
    config: EngineConfig,
    model: Model | ForeignModel,
    weights: Callable[[], Weights],
    device: torch.device,
    dtype: torch.dtype,
    memory: Memory,
) -> Packed:
    """The projections that stay quantised, turned to the kernels' layout where they were loaded."""
    quantization = model.config.quantization if isinstance(model, Model) else None
    _check_quantization(config.quantization, quantization)

    def turn() -> Packed:
        return turn_quantised(weights(), quantization, device, dtype)

    packed = turn() if quantization is not None else {}
    if packed:
        memory.on_reload(turn)
    return packed


def _load(
    model: Model | ForeignModel,
    weights: Callable[[], Weights],
    packed: Packed,
    device: torch.device,
    dtype: torch.dtype,
    group: Group | None,
) -> tuple[ModelConfig, Callable[[int], CausalLM]]:
    """The shape of the model, or of a rank's part, and what makes its decoder for a max_model_len."""
    if isinstance(model, Model):
        shape = model.config
        placed = place(weights(), packed, shape.quantization, device, dtype)
        ours = shape if group is None else shape.of_rank(group.world_size)
        return ours, lambda max_model_len: Decoder(shape, placed, max_model_len, dtype, group)
    from runtime.model.fallback import FallbackDecoder

    decoder = FallbackDecoder(model.directory, model.architecture, device, dtype)
    return decoder.config, lambda max_model_len: decoder


def _check_quantization(asked: str | None, found: Quantization | None) -> None:
    """Weights are as the checkpoint has them; naming that is allowed, asking for another is not."""
    method = None if found is None else found.method
    # Users of vLLM name the kernel along with the method.
    plain = None if asked is None else _METHODS.get(asked, asked).removesuffix("_marlin")
    if plain not in (None, method):
        raise SettingError(
            f"--quantization {asked} does not fit this checkpoint, whose config.json says "
            f"{method or 'that it is not quantised'}; leave the flag out."
        )


def _device(device_type: str) -> torch.device:
    if device_type == "cuda" and not torch.cuda.is_available():
        raise SettingError(
            "There is a GPU, but the installed torch cannot use it: install a build of torch for CUDA, or "
            "choose --device cpu."
        )
    return torch.device(device_type)


def _dtype(config: EngineConfig, saved: str, device: torch.device) -> torch.dtype:
    if config.dtype not in ("auto", *_DTYPES):
        raise SettingError(
            f"--dtype {config.dtype} is not known; choose auto or one of {', '.join(_DTYPES)}."
        )
    if device.type == "cpu":
        # Weights keep their own dtype in memory either way; on a CPU only float32 is quick to compute in.
        if config.dtype not in ("auto", "float32", "float"):
            raise SettingError(
                f"--dtype {config.dtype} is not available on the CPU, which computes in float32."
            )
        return torch.float32
    return _DTYPES.get(saved if config.dtype == "auto" else config.dtype, torch.bfloat16)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    asked = config.max_model_len
    if asked is None:
        return model.max_position_embeddings
    if asked < 2:
        raise SettingError(f"--max-model-len {asked} leaves no room for a prompt and an answer.")
    if asked > model.max_position_embeddings:
        raise SettingError(
            f"--max-model-len {asked} is more than the {model.max_position_embeddings} positions that "
            "the model's config.json allows (max_position_embeddings)."
        )
    return asked


def _budget(config: EngineConfig, device: torch.device, max_model_len: int) -> int:
    """How many tokens a step may have."""
    asked, least = config.max_num_batched_tokens, 0 if config.enable_chunked_prefill else max_model_len
    if asked is None:
        return max(least, _MAX_NUM_BATCHED_TOKENS[device.type])
    if asked < least:
        raise SettingError(
            f"--max-num-batched-tokens {asked} is less than --max-model-len "
            f"{max_model_len}: without chunked prefill, a step must be able to take a whole prompt."
        )
    return asked


def _num_blocks(
    config: EngineConfig,
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    budget: int,
    most: int,
) -> int:
    bytes_per_block = block_bytes(model, config.block_size, dtype)
    if device.type == "cpu":
        return cpu_num_blocks(config.kv_cache_bytes, bytes_per_block, most, config.world_size)
    room = config.kv_cache_bytes
    if room is None:
        free, total = torch.cuda.mem_get_info(device)
        spare = working_bytes(model, budget, config.max_num_seqs, dtype)
        room = int(free - total * (1 - config.gpu_memory_utilization)) - spare
    return max(0, min(room // bytes_per_block, most))
