"""Loaded weights -> a running engine on its device. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from runtime.engine.blocks import BlockManager
from runtime.engine.core import Engine
from runtime.engine.host_runner import HostRunner
from runtime.engine.memory import block_bytes, cpu_num_blocks
from runtime.engine.scheduler import Scheduler
from runtime.errors import FirstlightError
from runtime.kernels import native
from runtime.model.config import ModelConfig
from runtime.model.decoder import Decoder
from runtime.model.families import Model
from runtime.protocol import EngineConfig, SamplingParams, Submit

Weights = Mapping[str, tuple[torch.Tensor, ...]]
_DTYPES = {
    "float32": torch.float32, "float": torch.float32, "float16": torch.float16, "half": torch.float16,
    "bfloat16": torch.bfloat16,
}  # fmt: skip


class SettingError(FirstlightError):
    """A setting that this model or this machine cannot honour."""


def build_engine(
    config: EngineConfig, model: Model, weights: Weights
) -> tuple[Engine, torch.device, torch.dtype]:
    """The engine, the device it runs on and the dtype it computes in. Raises `SettingError`."""
    device = _device(config)
    dtype = _dtype(config, model.config, device)
    max_model_len = _max_model_len(config, model.config)
    _check_budget(config, max_model_len)
    bytes_per_block = block_bytes(model.config, config.block_size, dtype)
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    num_blocks = _num_blocks(config, device, bytes_per_block, most)
    held = num_blocks * config.block_size
    if held < max_model_len:
        if config.max_model_len is not None:
            raise SettingError(
                f"The KV cache has room for {held} tokens, fewer than --max-model-len {max_model_len}: "
                "lower it, or give the cache more memory."
            )
        max_model_len = held
    if device.type == "cpu":
        # With the compiled kernels, which bring their own threads, torch's would only get in the way.
        torch.set_num_threads(native.default_threads() if native.library() is None else 1)
    decoder = Decoder(model.config, _placed(weights, device, dtype), max_model_len, dtype)
    runner = HostRunner(decoder, num_blocks, config.block_size, dtype)
    blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
    budget = config.max_num_batched_tokens
    scheduler = Scheduler(blocks, config.max_num_seqs, budget, config.enable_chunked_prefill)
    engine = Engine(runner, scheduler, max_model_len, config.seed)
    _check_answer(engine)
    return engine, device, dtype


def _device(config: EngineConfig) -> torch.device:
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device cuda was asked for, but torch finds no GPU that it can use.")
    return torch.device(config.device)


def _dtype(config: EngineConfig, model: ModelConfig, device: torch.device) -> torch.dtype:
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
    return _DTYPES.get(model.torch_dtype if config.dtype == "auto" else config.dtype, torch.bfloat16)


def _max_model_len(config: EngineConfig, model: ModelConfig) -> int:
    asked = config.max_model_len
    if asked is None:
        return model.max_position_embeddings
    if asked > model.max_position_embeddings:
        raise SettingError(
            f"--max-model-len {asked} is more than the {model.max_position_embeddings} positions that "
            "the model's config.json allows (max_position_embeddings)."
        )
    return asked


def _check_budget(config: EngineConfig, max_model_len: int) -> None:
    if not config.enable_chunked_prefill and config.max_num_batched_tokens < max_model_len:
        raise SettingError(
            f"--max-num-batched-tokens {config.max_num_batched_tokens} is less than --max-model-len "
            f"{max_model_len}: without chunked prefill, a step must be able to take a whole prompt."
        )


def _num_blocks(config: EngineConfig, device: torch.device, bytes_per_block: int, most: int) -> int:
    if device.type == "cpu":
        return cpu_num_blocks(config.kv_cache_bytes, bytes_per_block, most)
    free, total = torch.cuda.mem_get_info(device)
    budget = config.kv_cache_bytes or int(free - total * (1 - config.gpu_memory_utilization))
    return min(budget // bytes_per_block, most)


def _placed(weights: Weights, device: torch.device, dtype: torch.dtype) -> Weights:
    """The weights where and as the device's kernels take them; on a CPU that is mostly as they are."""
    if device.type == "cpu" and native.library() is not None:
        return weights
    return {name: tuple(part.to(device, dtype) for part in parts) for name, parts in weights.items()}


def _check_answer(engine: Engine) -> None:
    """Compute one token before anyone is let in: weights that are not what they should be show here."""
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)
    engine.submit(Submit(request_id="canary", prompt_token_ids=[0], sampling=sampling))
    (delta,) = engine.step().deltas
    if not all(abs(entry.logprob) < float("inf") for entry in delta.logprobs):
        raise SettingError("The model's first logits are not finite numbers: its weight files are damaged.")
    engine.reset_counters()
