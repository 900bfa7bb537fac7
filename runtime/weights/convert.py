"""GGUF -> a folder as the Hub lays it out: safetensors, config and tokenizer files.

Converting happens once, into the cache, and needs numpy alone. Tensors are handled one at a time, so
the memory in use is about one tensor's size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from runtime.weights.gguf import GGUFError, GGUFFile, TensorInfo
from runtime.weights.gguf_tokenizer import tokenizer_files
from runtime.weights.safetensors_writer import SafetensorsWriter

Progress = Callable[[int, int], None]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}

_LAYER_PARTS = {
    "attn_norm.weight": "input_layernorm.weight",
    "attn_q.weight": "self_attn.q_proj.weight",
    "attn_k.weight": "self_attn.k_proj.weight",
    "attn_v.weight": "self_attn.v_proj.weight",
    "attn_output.weight": "self_attn.o_proj.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "ffn_gate.weight": "mlp.gate_proj.weight",
    "ffn_up.weight": "mlp.up_proj.weight",
    "ffn_down.weight": "mlp.down_proj.weight",
}
_QWEN2_BIASES = {
    "attn_q.bias": "self_attn.q_proj.bias",
    "attn_k.bias": "self_attn.k_proj.bias",
    "attn_v.bias": "self_attn.v_proj.bias",
}
_ROPE_FACTORS = "rope_freqs.weight"


class _Shape(NamedTuple):
    """What the metadata says of the model, in the field's terms."""

    architecture: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool


def convert_gguf(gguf_path: Path, out_dir: Path, on_progress: Progress | None = None) -> None:
    """Write the model in `gguf_path` into `out_dir` as a Hub repository would hold it.

    Quantised tensors become float16, which loses nothing against their own precision; tensors that
    were float keep their values exactly (float32 becomes float16 only where that is exact). Calls
    `on_progress(bytes read, bytes in all)` after each tensor. The folder is complete only when this
    returns: publishing it is the caller's part. Raises GGUFError for a file that cannot be converted.
    """
    with GGUFFile(gguf_path) as file:
        shape = _read_shape(file)
        names = _tensor_names(file, shape)
        texts = tokenizer_files(file.metadata, gguf_path, shape.vocab_size)
        config = _model_config(file, shape)
        out_dir.mkdir(parents=True, exist_ok=True)
        config["torch_dtype"] = _write_tensors(file, names, shape, out_dir, on_progress)
        _write_json(out_dir / "config.json", config)
        token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        _write_json(out_dir / "generation_config.json", {"_from_model_config": True, **token_ids})
        for name, content in texts.items():
            _write_json(out_dir / name, content)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


# ---- what the metadata says --------------------------------------------------------------------


def _number(file: GGUFFile, key: str, default: float | None = None) -> float:
    """A positive number of the metadata under the architecture's prefix."""
    full = f"{file.metadata['general.architecture']}.{key}"
    value = file.metadata.get(full, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise GGUFError(f"{file.path}: metadata key {full} is {value!r}; a positive number is needed")
    # The file stores float32; seven digits bring back the decimal that was meant.
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _integer(file: GGUFFile, key: str, default: int | None = None) -> int:
    value = _number(file, key, default)
    if not isinstance(value, int):
        raise GGUFError(f"{file.path}: metadata key {key} is {value}; a whole number is needed")
    return value


def _read_shape(file: GGUFFile) -> _Shape:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in _ARCHITECTURES:
        raise GGUFError(
            f"{file.path}: the architecture is {name!r}; only {', '.join(_ARCHITECTURES)} can be converted "
            "from GGUF. Use the model's original repository instead"
        )
    if file.metadata.get(f"{name}.expert_count"):
        raise GGUFError(f"{file.path}: mixture-of-experts models cannot be converted from GGUF")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise GGUFError(f"{file.path}: tensor 'token_embd.weight' is missing")
    hidden_size, num_heads = _integer(file, "embedding_length"), _integer(file, "attention.head_count")
    shape = _Shape(
        architecture=name,
        hidden_size=hidden_size,
        intermediate_size=_integer(file, "feed_forward_length"),
        num_layers=_integer(file, "block_count"),
        num_heads=num_heads,
        num_kv_heads=_integer(file, "attention.head_count_kv", num_heads),
        head_dim=_integer(file, "attention.key_length", hidden_size // num_heads),
        vocab_size=embedding.shape[0],
        tied="output.weight" not in file.tensors,
    )
    _check_heads(file, shape)
    return shape


def _check_heads(file: GGUFFile, shape: _Shape) -> None:
    if shape.head_dim % 2 or shape.num_heads % shape.num_kv_heads:
        raise GGUFError(
            f"{file.path}: {shape.num_heads} heads of size {shape.head_dim} do not go with rotary positions "
            f"and {shape.num_kv_heads} key-value heads"
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if _integer(file, key, shape.head_dim) != shape.head_dim:
            raise GGUFError(
                f"{file.path}: metadata key {shape.architecture}.{key} must equal the head size, "
                f"which is {shape.head_dim}"
            )


def _model_config(file: GGUFFile, shape: _Shape) -> dict[str, Any]:
    """config.json as the architecture's own repositories write it, but for the dtype."""
    config = {
        "architectures": [_ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _number(file, "attention.layer_norm_rms_epsilon"),
        "rope_theta": _number(file, "rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, shape),
        "max_position_embeddings": _integer(file, "context_length"),
        "vocab_size": shape.vocab_size,
        "tie_word_embeddings": shape.tied,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{name}_token_id"] = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
    return config


def _rope_scaling(file: GGUFFile, shape: _Shape) -> dict[str, Any] | None:
    kind = file.metadata.get(f"{shape.architecture}.rope.scaling.type", "none")
    if _ROPE_FACTORS in file.tensors:
        return _llama3_scaling(file, shape)
    if kind == "none":
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": _number(file, "rope.scaling.factor")}
    raise GGUFError(f"{file.path}: rope scaling of type {kind!r} cannot be converted from GGUF")


def _llama3_scaling(file: GGUFFile, shape: _Shape) -> dict[str, Any]:
    """Llama 3.1's rope scaling, which GGUF stores as one divisor per frequency.

    Its only free setting in published models is the factor, which is the largest divisor; the others
    are fixed, and the stored divisors must come out of them.
    """
    low, high, original = 1.0, 4.0, 8192
    tensor = file.tensors[_ROPE_FACTORS]
    divisors = np.concatenate([values for _, values in file.pieces(tensor)])
    factor = float(divisors.max())
    theta = _number(file, "rope.freq_base", 10000.0)
    turns = original / (2 * math.pi) * theta ** (-np.arange(0, shape.head_dim, 2) / shape.head_dim)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    expected = 1 / ((1 - share) / factor + share)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-3):
        raise GGUFError(f"{file.path}: tensor {_ROPE_FACTORS!r} is not the rope scaling of Llama 3.1")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


# ---- tensors -----------------------------------------------------------------------------------


def _tensor_names(file: GGUFFile, shape: _Shape) -> dict[str, str]:
    """GGUF name -> Hub name, in the order in which the model uses them; checks that all are there.

    That order keeps q, k and v, and gate and up, side by side in the file.
    """
    parts = _LAYER_PARTS | (_QWEN2_BIASES if shape.architecture == "qwen2" else {})
    if shape.num_layers > len(file.tensors):
        raise GGUFError(f"{file.path}: {shape.num_layers} layers, but only {len(file.tensors)} tensors")
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    for layer in range(shape.num_layers):
        names |= {f"blk.{layer}.{ours}": f"model.layers.{layer}.{hub}" for ours, hub in parts.items()}
    names["output_norm.weight"] = "model.norm.weight"
    if not shape.tied:
        names["output.weight"] = "lm_head.weight"
    for name in names:
        if name not in file.tensors:
            raise GGUFError(f"{file.path}: tensor {name!r} is missing")
        expected = _expected_shape(name, shape)
        if file.tensors[name].shape != expected:
            raise GGUFError(
                f"{file.path}: tensor {name!r} has the shape {list(file.tensors[name].shape)}; "
                f"the metadata asks for {list(expected)}"
            )
    for name in file.tensors:
        if name not in names and name != _ROPE_FACTORS:
            raise GGUFError(f"{file.path}: tensor {name!r} has no place in a {shape.architecture} model")
    return names


def _expected_shape(name: str, shape: _Shape) -> tuple[int, ...]:
    hidden, width = shape.hidden_size, shape.intermediate_size
    query, key = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    outputs = {"attn_q": query, "attn_k": key, "attn_v": key, "ffn_gate": width, "ffn_up": width}
    inputs = {"attn_output": query, "ffn_down": width}
    part, _, what = name.rpartition(".")
    part = part.rpartition(".")[2]
    if part in ("token_embd", "output"):
        return shape.vocab_size, hidden
    if part.endswith("norm"):
        return (hidden,)
    rows = outputs.get(part, hidden)
    return (rows,) if what == "bias" else (rows, inputs.get(part, hidden))


def _write_tensors(
    file: GGUFFile, names: dict[str, str], shape: _Shape, out_dir: Path, on_progress: Progress | None
) -> str:
    """Write model.safetensors; returns the dtype, as torch names it, that most bytes are in."""
    # Without gaps between tensors, one of odd size would push all later ones off their alignment.
    order = sorted(names, key=lambda name: math.prod(file.tensors[name].shape) % 32 != 0)
    total = sum(file.tensors[name].nbytes for name in names)
    done = 0
    bytes_by_dtype = {"F16": 0, "BF16": 0, "F32": 0}
    with SafetensorsWriter(out_dir / "model.safetensors", names.values()) as writer:
        for name in order:
            tensor = file.tensors[name]
            dtype, values = _values(file, tensor)
            if shape.architecture == "llama" and name.endswith((".attn_q.weight", ".attn_k.weight")):
                values = _undo_rotary_order(values, tensor.shape, shape.head_dim)
            writer.add(names[name], dtype, tensor.shape, values)
            bytes_by_dtype[dtype] += values.nbytes
            done += tensor.nbytes
            if on_progress is not None:
                on_progress(done, total)
    torch_names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
    return torch_names[max(bytes_by_dtype, key=lambda dtype: bytes_by_dtype[dtype])]


def _values(file: GGUFFile, tensor: TensorInfo) -> tuple[str, npt.NDArray[np.generic]]:
    """A tensor's values, flat, in the smallest of F16 and F32 that keeps them; BF16 stays as it is."""
    num_values = math.prod(tensor.shape)
    if num_values % 32 == 0:
        if tensor.type.name == "BF16":
            return "BF16", np.frombuffer(file.raw(tensor), dtype="<u2")
        half = np.empty(num_values, dtype=np.float16)
        with np.errstate(over="ignore"):
            if all(_fill(half, place, values, tensor) for place, values in file.pieces(tensor)):
                return "F16", half
    full = np.empty(num_values, dtype=np.float32)
    for place, values in file.pieces(tensor):
        if not np.isfinite(values).all():
            raise GGUFError(f"{file.path}: tensor {tensor.name!r} holds values that are not numbers")
        full[place] = values
    return "F32", full


def _fill(
    half: npt.NDArray[np.float16], place: slice, values: npt.NDArray[np.float32], tensor: TensorInfo
) -> bool:
    """Round a piece into `half`; False where float16 cannot take it (see `convert_gguf`)."""
    half[place] = values
    if tensor.type.name == "F32":
        return bool(np.array_equal(half[place], values))
    return bool(np.isfinite(half[place]).all())


def _undo_rotary_order(
    values: npt.NDArray[np.generic], shape: tuple[int, ...], head_dim: int
) -> npt.NDArray[np.generic]:
    """llama.cpp interleaves each head's two rotary halves; the Hub's layout has one after the other."""
    pairs = values.reshape(-1, head_dim // 2, 2, shape[1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1)
