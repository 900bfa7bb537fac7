"""How quantised checkpoints spell their linear layers: GPTQ and AWQ.

In the place of a `weight` [N, K] of N outputs and K inputs stand, with groups of g inputs,

    GPTQ  qweight [K / p, N]   int32, p inputs to a word, lowest bits first
          g_idx   [K]          int32, each input's group
    AWQ   qweight [K, N / p]   int32, p outputs to a word, in AWQ's order
    both  qzeros  [K / g, N / p] int32, p outputs to a word, packed as the method packs outputs
          scales  [K / g, N]   floating point

with p = 32 / bits, and the weight is scales * (q - zeros). GPTQ's first format stores zeros less one.
Sources: the format descriptions of AutoGPTQ and GPTQModel; of AutoAWQ, "GEMM" version.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from runtime.kernels.quantization import Quantization
from runtime.model.config import ConfigError, RawConfig
from runtime.model.layout import Parameter, Part, RowRange

_BITS = {"gptq": (4, 8), "awq": (4,)}


def read_quantization(raw: RawConfig) -> Quantization | None:
    """What config.json, or an older quantize_config.json beside it, says of the weights."""
    section = raw.section("quantization_config")
    beside = raw.path.with_name("quantize_config.json")
    if section is None and beside.exists():
        section = RawConfig.read(beside)
    if section is None:
        return None
    method = section.values.get("quant_method", "gptq")
    if method not in _BITS:
        raise ConfigError(f"{section.where}: quant_method {method!r} is not supported ({', '.join(_BITS)}).")
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


def spelled(
    parameter: Parameter, names: Collection[str], quantization: Quantization | None
) -> Iterator[Parameter]:
    """The parameter as the checkpoint with tensors of these names has it: as it is, or quantised.

    A quantised one comes as several, `NAME.qweight`, `NAME.scales` and so on. Raises `ConfigError`.
    """
    quantised = [f"{_base(part)}.qweight" in names for part in parameter.parts]
    if not any(quantised):
        yield parameter
        return
    tensor = f"{_base(parameter.parts[0])}.qweight"
    if quantization is None:
        raise ConfigError(f"{tensor} is quantised, but config.json has no quantization_config.")
    if not all(quantised):
        raise ConfigError(f"{tensor} is quantised, but not what is computed together with it.")
    kinds = [_quantised(part, quantization) for part in parameter.parts]
    for kind in kinds[0]:
        yield Parameter(f"{parameter.name}.{kind}", tuple(parts[kind] for parts in kinds))


def _base(part: Part) -> str:
    return part.tensor.removesuffix(".weight")


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
        "qweight": replace(qweight, output_axis=1, integers=True),
        "qzeros": Part(f"{base}.qzeros", (groups, out_words), share, words, output_axis=1, integers=True),
        "scales": Part(f"{base}.scales", (groups, outputs), share, part.rows, output_axis=1),
    }
    if not quantization.in_order:
        # A vector of inputs, divided as the inputs are.
        parts["g_idx"] = Part(f"{base}.g_idx", (inputs,), "rows" if by_inputs else None, integers=True)
    return parts


def _words(part: Part, rows: RowRange, per_word: int) -> RowRange:
    first, last = rows
    if first % per_word or last % per_word:
        raise ConfigError(f"{part.tensor}: rows {first} to {last} do not fill words of {per_word}.")
    return first // per_word, last // per_word
