"""What the flags and the environment amount to: one `ServerSettings`, ready to serve with."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec

from handler.flags import SERVE_FLAGS, UsageError, collect
from runtime.catalogue import Catalogue, ModelSpec, find_catalogue, load_catalogue
from runtime.protocol import EngineConfig
from runtime.text.template import read_template
from runtime.weights.sources.cache import default_cache_dir
from runtime.weights.sources.memory_cache import memory_cache_dir

DEFAULT_MAX_QUEUE = 1024
# What a Lambda function URL lets through, so that one limit holds on every platform.
DEFAULT_MAX_REQUEST_BYTES = 6_000_000
_OF_ONE_MODEL = {
    *("model", "models", "revision", "served_model_name", "chat_template", "quantization"),
    *("tensor_parallel_size", "trust_remote_code"),
}
_DTYPES = {"half": "float16", "float": "float32"}


class ServerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How to serve one model. `chat_template` is the template's text, None for the model's own.

    After `idle_sleep_s` seconds without a request it sleeps, after `idle_exit_s` the server ends; 0 is never.
    """

    engine: EngineConfig
    served_model_names: tuple[str, ...]
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    api_keys: tuple[str, ...] = ()
    max_queue: int = DEFAULT_MAX_QUEUE
    max_request_bytes: int = DEFAULT_MAX_REQUEST_BYTES
    drain_seconds: float = 30.0
    idle_sleep_s: float = 0.0
    idle_exit_s: float = 0.0
    max_awake_models: int = 1
    max_loaded_models: int = 4
    access_log: bool = True
    allowed_origins: tuple[str, ...] = ()
    otlp_traces_endpoint: str | None = None


def read_settings(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settle every value: flag, then environment, then models.yaml, then the default.

    Raises `FirstlightError` for a value that makes no sense, and for a model that is not known.
    """
    values = collect(given, SERVE_FLAGS, environ)
    if values.get("trust_remote_code"):
        _warn("--trust-remote-code is accepted, but code from a model's repository is never run")
    spec = model_spec(values)
    template = values.get("chat_template") or spec.chat_template
    engine = _engine_config(values, spec)
    chosen = {
        name: values[name]
        for name in (
            *("tool_call_parser", "reasoning_parser"),
            *("max_queue", "max_request_bytes", "drain_seconds", "max_awake_models", "max_loaded_models"),
            *("access_log", "otlp_traces_endpoint"),
        )
        if name in values
    }
    idle = {name: values.get(name, getattr(spec, name)) for name in ("idle_sleep_s", "idle_exit_s")}
    return ServerSettings(
        engine=engine,
        served_model_names=default_names(values, spec),
        chat_template=read_template(template) if template else None,
        api_keys=_api_keys(values),
        allowed_origins=tuple(chain.from_iterable(values.get("allowed_origins", ()))),
        **chosen,
        **idle,
    )


def read_others(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> list[ServerSettings]:
    """The same for the further models of --models; flags about one model are about the first."""
    values = collect(given, SERVE_FLAGS, environ)
    names = values.get("models", [])
    if not names:
        return []
    catalogue, default = read_catalogue(values), model_spec(values)
    if "all" in names:
        names = list(catalogue.models)
    shared = {name: value for name, value in values.items() if name not in _OF_ONE_MODEL}
    ids = dict.fromkeys(catalogue.resolve(name).id for name in names)
    others = [read_settings({**shared, "model": id_}, {}) for id_ in ids if id_ != default.id]
    taken = set(default_names(values, default))
    for other in others:
        if taken & set(other.served_model_names):
            raise UsageError(f"two models are named {', '.join(taken & set(other.served_model_names))}")
        taken |= set(other.served_model_names)
    return others


def default_names(values: Mapping[str, Any], spec: ModelSpec) -> tuple[str, ...]:
    """What requests may call the model: as it is told, else as it was named, and its id."""
    return tuple(
        values.get("served_model_name") or dict.fromkeys(filter(None, (values.get("model"), spec.id)))
    )


def _api_keys(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of --api-key and --api-key-file. A key that is empty would let everybody in."""
    keys = [key.strip() for key in values.get("api_key", ())]
    if not all(keys) or ("api_key" in values and not keys):
        raise UsageError("--api-key is empty; leave it out if no key shall be asked for")
    if "api_key_file" in values:
        keys += _keys_in(values["api_key_file"])
    return tuple(keys)


def _keys_in(file: str) -> list[str]:
    """The keys of a file, one a line; what stands after a # at a line's beginning is for people."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UsageError(f"--api-key-file: cannot read '{file}': {reason}") from None
    keys = []
    for number, key in enumerate(map(str.strip, lines), 1):
        if len(key.split()) > 1 and not key.startswith("#"):
            raise UsageError(f"--api-key-file: line {number} of '{file}' holds spaces; write one key a line")
        if key and not key.startswith("#"):
            keys.append(key)
    if not keys:
        raise UsageError(f"--api-key-file: '{file}' holds no key")
    return keys


def cache_directory(values: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> str:
    """The folder that keeps fetched and converted models; a new one, in memory, if none is to be kept."""
    if not values.get("cache", True):
        if "download_dir" in values:
            raise UsageError(
                "--no-cache keeps no models, so --download-dir has no meaning; remove one of them"
            )
        return str(memory_cache_dir())
    if "download_dir" in values:
        return str(Path(values["download_dir"]).expanduser().absolute())
    return str(default_cache_dir(environ))


def read_catalogue(values: Mapping[str, Any]) -> Catalogue:
    """The models.yaml that was named, or else the one that is found."""
    return load_catalogue(Path(values["catalogue"]) if "catalogue" in values else find_catalogue())


def model_spec(values: Mapping[str, Any]) -> ModelSpec:
    """The model that was named, or else the catalogue's default, at the revision that was named."""
    spec = read_catalogue(values).resolve(values.get("model"))
    if "revision" in values:
        spec = msgspec.structs.replace(spec, revision=values["revision"])
    return spec


def _engine_config(values: Mapping[str, Any], spec: ModelSpec) -> EngineConfig:
    same_name = (
        "device",
        "dtype",
        "quantization",
        "max_model_len",
        "max_num_seqs",
        "max_num_batched_tokens",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "block_size",
        "gpu_memory_utilization",
        "seed",
    )
    names = {
        **{name: name for name in same_name},
        "kv_cache_memory_bytes": "kv_cache_bytes",
        "tensor_parallel_size": "world_size",
    }
    chosen = {field: values[name] for name, field in names.items() if name in values}
    if "dtype" in chosen:
        chosen["dtype"] = _DTYPES.get(chosen["dtype"], chosen["dtype"])
    return EngineConfig.of(spec, cache_directory(values), **chosen)


def _warn(message: str) -> None:
    print(f"firstlight: warning: {message}", file=sys.stderr)
