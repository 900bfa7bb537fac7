"""How quantised checkpoints spell their linear layers: GPTQ, AWQ and e4m3.

In the place of a `weight` [N, K] of N outputs and K inputs stand, with groups of g inputs,

    GPTQ  qweight [K / p, N]   int32, p inputs to a word, lowest bits first
          g_idx   [K]          int32, each input's group
    AWQ   qweight [K, N / p]   int32, p outputs to a word, in AWQ's order
    both  qzeros  [K / g, N / p] int32, p outputs to a word, packed as the method packs outputs
          scales  [K / g, N]   floating point

with p = 32 / bits, and the weight is scales * (q - zeros). GPTQ's first format stores zeros less one.
E4m3 keeps the `weight` [N, K], with a `weight_scale` for all of it, or [N, 1] for each output, or a
`weight_scale_inv` [N / b, K / b] for blocks, by which it is multiplied in spite of its name.
Sources: the format descriptions of AutoGPTQ and GPTQModel; of AutoAWQ, "GEMM" version; of compressed-tensors
("float-quantized"), FBGEMM's and transformers' fine-grained fp8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from runtime.kernels.quantization import Quantization
from runtime.model.config import ConfigError, RawConfig
from runtime.model.layout import Parameter, Part, RowRange

_BITS = {"gptq": (4, 8), "awq": (4,)}
_FP8 = ("fp8", "fbgemm_fp8", "compressed-tensors")
_E4M3 = "F8_E4M3"


class Stored(Protocol):
    """What is asked of a checkpoint's tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


def read_quantization(raw: RawConfig) -> Quantization | None:
    """What config.json, or an older quantize_config.json beside it, says of the weights."""
    section = raw.section("quantization_config")
    beside = raw.path.with_name("quantize_config.json")
    if section is None and beside.exists():
        section = RawConfig.read(beside)
    if section is None:
        return None
    method = section.values.get("quant_method", "gptq")
    if method in _FP8:
        return _read_fp8(section)
    if method not in _BITS:
        supported = ", ".join((*_BITS, *_FP8))
        raise ConfigError(f"{section.where}: quant_method {method!r} is not supported ({supported}).")
    bits = section.get_int("w_bit" if "w_bit" in section.values else "bits")
    if bits not in _BITS[method]:
        supported = " or ".join(str(n) for n in _BITS[method])
        raise ConfigError(f"{section.where}: {method} with bits {bits} is not supported ({supported}).")
    group = section.values.get("q_group_size", section.values.get("group_size"))
    if not isinstance(group, int) or isinstance(group, bool) or group == 0 or group < -1:
        raise ConfigError(
            f"{section.where}: group_size must be a positive integer, or -1 for one group, not {group!r}."
        )
    if method == "awq":
        section.refuse("version", "gemm", "GEMM", None)
        return Quantization("awq", bits, group, in_order=True, zero_offset=0)
    section.refuse("checkpoint_format", "gptq", "gptq_v2", None)
    offset = 0 if section.values.get("checkpoint_format") == "gptq_v2" else 1
    return Quantization("gptq", bits, group, not section.get_bool("desc_act", False), offset)


def _read_fp8(section: RawConfig) -> Quantization:
    """The blocks that share a scale, if any do; the rest is seen from the tensors."""
    blocks = section.values.get("weight_block_size")
    if section.values.get("quant_method") == "compressed-tensors":
        section.refuse("format", "float-quantized")
        blocks = _compressed_blocks(section)
    if blocks is None:
        return Quantization("fp8", 8, -1, in_order=True, zero_offset=0)
    if not isinstance(blocks, list) or len(blocks) != 2 or any(type(n) is not int or n < 1 for n in blocks):
        raise ConfigError(
            f"{section.where}: the blocks that share a scale must be two numbers, not {blocks!r}."
        )
    return Quantization("fp8", 8, blocks[1], in_order=True, zero_offset=0, block_rows=blocks[0])


def _compressed_blocks(section: RawConfig) -> Any:
    """The blocks of the one scheme that all of a compressed-tensors checkpoint's layers have."""
    groups = section.section("config_groups")
    schemes = [] if groups is None else list(groups.values.values())
    scheme = schemes[0] if len(schemes) == 1 and isinstance(schemes[0], dict) else {}
    weights = scheme.get("weights")
    if not isinstance(weights, dict):
        raise ConfigError(f"{section.where}: config_groups must be one group, with its weights described.")
    if (weights.get("type"), weights.get("num_bits")) != ("float", 8):
        raise ConfigError(f"{section.where}: of compressed-tensors, float weights of 8 bits are supported.")
    return weights.get("block_structure") if weights.get("strategy") == "block" else None


def spelled(
    parameter: Parameter, tensors: Mapping[str, Stored], quantization: Quantization | None
) -> Iterator[Parameter]:
    """The parameter as the checkpoint with these tensors has it: as it is, or quantised.

    A quantised one comes as several, `NAME.qweight`, `NAME.scales` and so on. Raises `ConfigError`.
    """
    quantised = [_is_quantised(_base(part), tensors) for part in parameter.parts]
    if not any(quantised):
        yield parameter
        return
    tensor = _base(parameter.parts[0])
    if quantization is None:
        raise ConfigError(f"{tensor} is quantised, but config.json has no quantization_config.")
    if not all(quantised):
        raise ConfigError(f"{tensor} is quantised, but not what is computed together with it.")
    if quantization.method == "fp8":
        kinds = [_e4m3(part, tensors, quantization) for part in parameter.parts]
    else:
        kinds = [_quantised(part, quantization) for part in parameter.parts]
    for kind in kinds[0]:
        yield Parameter(f"{parameter.name}.{kind}", tuple(parts[kind] for parts in kinds), stacked=False)


def _base(part: Part) -> str:
    return part.tensor.removesuffix(".weight")


def _is_quantised(base: str, tensors: Mapping[str, Stored]) -> bool:
    weight = tensors.get(f"{base}.weight")
    return f"{base}.qweight" in tensors or (weight is not None and weight.dtype == _E4M3)


def _e4m3(part: Part, tensors: Mapping[str, Stored], quantization: Quantization) -> dict[str, Part]:
    """A weight of e4m3 and its scales, each with the share that the weight's split means."""
    outputs, inputs = part.shape
    base = _base(part)
    name = next(
        (n for n in (f"{base}.weight_scale", f"{base}.weight_scale_inv") if n in tensors),
        f"{base}.weight_scale",
    )
    shape = tensors[name].shape if name in tensors else ()
    block = quantization.block_rows
    blocks = -(-outputs // block), -(-inputs // max(1, quantization.group_size))
    if math.prod(shape) == 1:
        scales = Part(name, shape)
    elif quantization.group_size == -1 and shape in ((outputs,), (outputs, 1)):
        scales = Part(name, shape, part.split if part.split != "columns" else None, part.rows)
    elif quantization.group_size != -1 and shape == blocks:
        if any(row % block for rows in part.rows or () for row in rows):
            raise ConfigError(f"{name}: a block of scales would be shared by projections that are apart.")
        rows = None if part.rows is None else tuple((a // block, b // block) for a, b in part.rows)
        scales = Part(name, shape, part.split, rows)
    else:
        raise ConfigError(f"{name} has shape {list(shape)}, which does not fit a weight {list(part.shape)}.")
    return {"qweight": replace(part, holds="e4m3"), "scales": scales}


def _quantised(part: Part, quantization: Quantization) -> dict[str, Part]:
    """The tensors that stand for one weight [N, K], each with the share that the weight's split means."""
    outputs, inputs = part.shape
    per_word = 32 // quantization.bits
    groups = 1 if quantization.group_size == -1 else math.ceil(inputs / quantization.group_size)
    by_inputs = part.split == "columns"
    if part.rows is not None and len(part.rows) > 1 and not quantization.in_order:
        raise ConfigError(f"{_base(part)}.g_idx: desc_act is not supported for tensors packed like this one.")
    # With one group, or inputs in whatever order, every rank needs all scales; the last group, if it is not
    # a whole one, cannot be shared out.
    shareable = groups > 1 and quantization.in_order and inputs % quantization.group_size == 0
    share = part.split if shareable or not by_inputs else None
    words = tuple(_words(part, rows, per_word) for rows in part.rows or ((0, outputs),))
    base, out_words = _base(part), outputs // per_word
    if quantization.method == "awq":
        qweight = Part(f"{base}.qweight", (inputs, out_words), part.split, words)
    else:
        qweight = Part(f"{base}.qweight", (inputs // per_word, outputs), part.split, part.rows)
    parts = {
        "qweight": replace(qweight, output_axis=1, holds="int32"),
        "qzeros": Part(f"{base}.qzeros", (groups, out_words), share, words, output_axis=1, holds="int32"),
        "scales": Part(f"{base}.scales", (groups, outputs), share, part.rows, output_axis=1),
    }
    if not quantization.in_order:
        # A vector of inputs, divided as the inputs are.
        parts["g_idx"] = Part(f"{base}.g_idx", (inputs,), "rows" if by_inputs else None, holds="int32")
    return parts


def _words(part: Part, rows: RowRange, per_word: int) -> RowRange:
    first, last = rows
    if first % per_word or last % per_word:
        raise ConfigError(f"{part.tensor}: rows {first} to {last} do not fill words of {per_word}.")
    return first // per_word, last // per_word
