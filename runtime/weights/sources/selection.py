"""Which of a repository's files a model needs, and which only look like it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Collection, Iterable

from runtime.weights.sources.errors import SourceError

SAFETENSORS_INDEX = "model.safetensors.index.json"

# Everything that is small and that something in the runtime reads before the weights.
_SMALL = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.json",
    "chat_template.jinja",
    "adapter_config.json",
    "quant*_config.json",
    "hf_quant_config.json",
    SAFETENSORS_INDEX,
)
_PICKLED = "pytorch_model*.bin"
_WEIGHTS = ("*.safetensors", _PICKLED)
# The same weights once more, in the layout of the family's first release.
_DUPLICATES = ("consolidated*",)


def is_small(name: str) -> bool:
    """Whether a file in the model's folder is configuration or text, to be fetched first."""
    return "/" not in name and any(fnmatch.fnmatchcase(name, pattern) for pattern in _SMALL)


def is_weight_candidate(name: str) -> bool:
    """Whether a file in the model's folder may hold weights; `weight_files` picks those that do."""
    if "/" in name or any(fnmatch.fnmatchcase(name, pattern) for pattern in _DUPLICATES):
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in _WEIGHTS)


def is_pickled(name: str) -> bool:
    """Whether a file holds weights as torch pickles them."""
    return fnmatch.fnmatchcase(name, _PICKLED)


def weight_files(names: Collection[str], index: bytes | None, where: str) -> list[str]:
    """The files that hold the weights, in the order in which to fetch them.

    `names` are the files in the model's folder, `index` the content of model.safetensors.index.json
    if there is one, `where` names the folder in errors. Pickled weights count only when there are no
    safetensors. Raises SourceError (kind "invalid") when the weights are missing or lie elsewhere.
    """
    if index is not None:
        return _indexed(names, index, where)
    if "model.safetensors" in names:
        return ["model.safetensors"]
    candidates = [name for name in names if is_weight_candidate(name)]
    safetensors = sorted(name for name in candidates if name.endswith(".safetensors"))
    chosen = safetensors or sorted(name for name in candidates if is_pickled(name))
    if not chosen:
        raise SourceError("invalid", f"{where} holds no weights: {_what_it_holds(names)}")
    return chosen


def require_config(names: Iterable[str], where: str) -> None:
    """Raise SourceError (kind "invalid") unless the folder has a model's (or an adapter's) config."""
    known = set(names)
    if not known & {"config.json", "adapter_config.json"}:
        raise SourceError("invalid", f"{where} has no config.json: {_what_it_holds(known)}")


def _indexed(names: Collection[str], index: bytes, where: str) -> list[str]:
    try:
        shards = set(json.loads(index)["weight_map"].values())
        ordered = sorted(shards)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SourceError(
            "invalid", f"{where}: {SAFETENSORS_INDEX} is not readable as an index ({error!r})."
        ) from error
    for shard in ordered:
        # Names are compared with the listing, so nothing outside the folder can be meant.
        if not isinstance(shard, str) or shard not in names or not is_weight_candidate(shard):
            raise SourceError(
                "invalid",
                f"{where}: {SAFETENSORS_INDEX} speaks of {shard!r}, which is not in the folder. "
                "Upload or restore that file, or correct the index.",
            )
    if not ordered:
        raise SourceError("invalid", f"{where}: {SAFETENSORS_INDEX} names no weights.")
    return ordered


def _what_it_holds(names: Collection[str]) -> str:
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF files; name a repository or folder that has safetensors instead."
    shown = ", ".join(sorted(names)[:6]) + (", …" if len(names) > 6 else "")
    remedy = "Point to the folder that holds config.json and the .safetensors files."
    return f"it holds {shown}. {remedy}" if names else f"it is empty. {remedy}"
