"""A Llama checkpoint in the Hub's layout as a GGUF file for llama.cpp, at F16 or Q4_0.

The tensors' names, the order of the rows of q and k, and the choice of Q8_0 for the embedding beside
Q4_0 are those of llama.cpp's own converter and quantiser (convert_hf_to_gguf.py, llama-quantize).
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import BenchError
from harness.report import progress

if TYPE_CHECKING:
    import gguf
    import numpy as np

_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHER_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_NORMAL, _CONTROL = 1, 3  # tokenizer.ggml.token_type


def converted(folder: Path, kind: str) -> Path:
    """The GGUF file of a model folder, made once and kept in the temporary directory.

    `kind` is "F16" or "Q4_0". Raises BenchError for an architecture that is not Llama's.
    """
    stamp = int((folder / "config.json").stat().st_mtime)
    name = re.sub(r"\W+", "-", str(folder)).strip("-")
    path = Path(tempfile.gettempdir()) / f"firstlight-bench-{name}-{stamp}-{kind}.gguf"
    if not path.exists():
        progress(f"converting {folder} to {kind} for llama.cpp")
        unfinished = path.with_suffix(f".{os.getpid()}")
        _write(folder, kind, unfinished)
        unfinished.rename(path)
    return path


def tensor_name(name: str) -> str:
    """llama.cpp's name of a tensor of a Hub checkpoint: `blk.3.attn_q.weight`."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OTHER_NAMES:
        return f"{_OTHER_NAMES[stem]}.{suffix}"
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
    if found is None or found[2] not in _LAYER_NAMES:
        raise BenchError(f"there is no name in GGUF for the tensor {name}")
    return f"blk.{found[1]}.{_LAYER_NAMES[found[2]]}.{suffix}"


def interleaved(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """q or k, [num_heads * head_dim, hidden_size], for rotary embeddings of neighbouring pairs.

    The Hub's layout turns dimension i with i + head_dim/2; llama.cpp's turns 2i with 2i + 1.
    """
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _write(folder: Path, kind: str, path: Path) -> None:
    import gguf
    from safetensors import safe_open

    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise BenchError(f"only Llama checkpoints are converted to GGUF, not {config.get('model_type')!r}")
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, config)
    _add_tokenizer(writer, folder, config)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                data = tensors.get_tensor(name).float().numpy()
                projection = name.split(".")[-2]
                if projection in heads:
                    data = interleaved(data, heads[projection])
                data, dtype = _encode(data, name, kind)
                writer.add_tensor(tensor_name(name), data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _encode(data: np.ndarray, name: str, kind: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    import gguf
    from gguf import GGMLQuantizationType as Type

    if data.ndim == 1:
        return data, Type.F32
    if kind == "Q4_0":
        embedding = "embed_tokens" in name or "lm_head" in name
        dtype = Type.Q8_0 if embedding else Type.Q4_0
        return gguf.quants.quantize(data, dtype), dtype
    return data.astype("float16"), Type.F16


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    if config.get("rope_scaling") is not None:
        raise BenchError("the conversion to GGUF knows no rope_scaling")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta", 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Enough to turn ids into text: prompts are sent as ids, so how text is cut does not matter."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    tokens = {index: token for token, index in vocabulary.items()} | special
    indices = range(config["vocab_size"])
    types = [_CONTROL if index in special or index not in tokens else _NORMAL for index in indices]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([tokens.get(index, f"<unused {index}>") for index in indices])
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(_first(config["eos_token_id"]))
    writer.add_add_bos_token(False)


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, list) else value)
