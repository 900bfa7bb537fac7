"""models.yaml -> ModelSpec: what each model is called, where it comes from and how it is run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import FirstlightError
from runtime.weights.sources.errors import SourceError
from runtime.weights.sources.reference import Reference, parse_reference
from runtime.yamlfile import CatalogueError, Value, read_yaml

__all__ = [
    "Catalogue",
    "CatalogueError",
    "ModelSpec",
    "UnknownModelError",
    "find_catalogue",
    "load_catalogue",
]

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*")
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_MAX_TOKENS = 1 << 24
_MAX_TP_SIZE = 1024
_MAX_SECONDS = 1e8
# What a model takes: GB of weights on GPUs and, where it is another number, in a CPU's memory; KiB of keys
# and values a token, in numbers of 16 bits.
MEMORY_KEYS = ("weights_gb", "cpu_weights_gb", "kv_kib_per_token")
_MAX_MEMORY = 1e6
# Those that `runtime.text.template.read_template` knows by name.
_TEMPLATES = Path(__file__).with_name("text") / "templates"

# The sampling defaults that a model may have: (whole number?, lowest, highest).
GENERATION_RANGES: dict[str, tuple[bool, float, float]] = {
    "max_tokens": (True, 1, _MAX_TOKENS),
    "min_tokens": (True, 0, _MAX_TOKENS),
    "temperature": (False, 0, 2),
    "top_p": (False, 0, 1),
    "top_k": (True, 0, _MAX_TOKENS),
    "min_p": (False, 0, 1),
    "repetition_penalty": (False, 0.01, 10),
    "presence_penalty": (False, -2, 2),
    "frequency_penalty": (False, -2, 2),
    "seed": (True, 0, (1 << 59) - 1),
}


class UnknownModelError(FirstlightError):
    """A name that is neither in the catalogue nor a reference to a model elsewhere."""


class ModelSpec(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model to serve: where its files come from and how it is run.

    `source` is one of `hf://org/name`, `s3://bucket/prefix[?versionId=...]`, `wheel://distribution`
    or an absolute path; `revision` is a branch, tag or commit of the Hub, or a wheel's version.
    `chat_template` is a template, its file or the name of one that comes along; `stop_token_ids` end an
    answer besides the ids that the model's own files name. Lengths are in tokens. After `idle_sleep_s`
    seconds without a request the engine sleeps, after `idle_exit_s` the server ends; 0 is never.
    """

    id: str
    source: str
    revision: str | None = None
    max_model_len: int | None = None
    tp_size: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    chat_template: str | None = None
    stop_token_ids: tuple[int, ...] = ()
    adapters: dict[str, str] = {}
    memory: dict[str, float] = {}
    generation: dict[str, Any] = {}
    idle_sleep_s: float = 0.0
    idle_exit_s: float = 0.0


class Catalogue(msgspec.Struct, frozen=True, kw_only=True):
    """The models of one file by their ids, and what holds for a model that has no entry there.

    `defaults` holds ModelSpec fields by name; the entries in `models` already include them.
    """

    path: Path
    default: str | None
    defaults: dict[str, Any]
    models: dict[str, ModelSpec]

    def resolve(self, name: str | None = None) -> ModelSpec:
        """The model that `name` stands for; None stands for the catalogue's default.

        `name` is an id, the part of an id after its last slash where only one entry has it, or a
        model without an entry: `org/name` on the Hub, a path, `s3://…`, `hf://…@revision`,
        `wheel://…`. Raises UnknownModelError, or SourceError for a reference that is not well formed.
        """
        if name is None:
            if self.default is None:
                raise UnknownModelError(
                    f"{self.path} names no default model. Name one with --model, or add a line "
                    "`default: ID` to the file."
                )
            return self.models[self.default]
        return self.models.get(name) or self._by_short_name(name) or self._without_entry(name)

    def _by_short_name(self, name: str) -> ModelSpec | None:
        """The one entry whose id, or last part of it, is `name` but for upper and lower case."""
        wanted = name.lower()
        found = [id_ for id_ in self.models if id_.lower() == wanted]
        found = found or [id_ for id_ in self.models if id_.rpartition("/")[2].lower() == wanted]
        if len(found) > 1:
            raise UnknownModelError(f"{name!r} is ambiguous: {', '.join(found)}. Write the whole id.")
        return self.models[found[0]] if found else None

    def _without_entry(self, name: str) -> ModelSpec:
        if not name.strip():
            raise UnknownModelError("The model's name is empty. Leave --model out to get the default.")
        reference = parse_reference(name)
        # One word alone is a mistyped entry far more often than one of the Hub's few ids without a
        # slash; those can still be written hf://name.
        if reference.kind == "hub" and "/" not in name:
            raise UnknownModelError(self._unknown(name))
        if reference.kind == "local":
            id_ = name
        else:
            id_ = f"s3://{reference.location}" if reference.kind == "s3" else reference.location
        return ModelSpec(**{**self.defaults, "id": id_, **_source_fields(reference)})

    def _unknown(self, name: str) -> str:
        from difflib import get_close_matches

        by_short_name = {id_.rpartition("/")[2].lower(): id_ for id_ in self.models}
        close = [id_ for id_ in self.models if name.lower() in id_.lower()][:3]
        close = close or [by_short_name[short] for short in get_close_matches(name.lower(), by_short_name)]
        hint = f"Did you mean {' or '.join(close)}?" if close else f"It has: {', '.join(self.models)}."
        return (
            f"There is no model {name!r} in {self.path}, and no such folder. {hint} A model without an "
            "entry is written org/name (Hugging Face Hub), ./folder, s3://bucket/prefix or hf://name."
        )


def find_catalogue() -> Path:
    """The catalogue to use when none is named: models.yaml right here, else the one that comes along."""
    here = Path("models.yaml")
    return here.absolute() if here.is_file() else Path(__file__).with_name("models.yaml").resolve()


def load_catalogue(path: Path) -> Catalogue:
    """Read and check a whole catalogue. Raises CatalogueError at the first mistake in it."""
    root = read_yaml(path)
    if root is None:
        raise CatalogueError(path, None, None, "empty", "Write at least one entry under `models`.")
    top = root.mapping("`default`, `defaults` and `models`", ("default", "defaults", "models"))
    if "models" not in top:
        raise root.error("`models` is missing", "Write the models by their ids under a key `models`.")
    shared = [key for key in _FIELDS if key not in ("source", "revision")]
    defaults = _fields(top["defaults"], shared) if "defaults" in top else {}
    models = {}
    for id_, value in top["models"].mapping("the models by their ids").items():
        if not _ID.fullmatch(id_) or ".." in id_:
            raise value.error(
                f"{id_!r} cannot be a model's id", "Use letters, digits and . _ - in parts parted by /."
            )
        models[id_] = _entry(id_, value, defaults)
    return Catalogue(
        path=path, default=_default(top.get("default"), models), defaults=defaults, models=models
    )


def _entry(id_: str, value: Value, defaults: dict[str, Any]) -> ModelSpec:
    fields = _fields(value, list(_FIELDS))
    if "source" not in fields:
        remedy = f"Say where its files come from, for example source: hf://{id_}"
        raise value.error("`source` is missing", remedy)
    reference: Reference = fields.pop("source")
    revision = fields.pop("revision", None)
    if revision is not None:
        place = value.mapping("the model's settings")["revision"]
        if reference.kind not in ("hub", "wheel"):
            remedy = "An object of S3 has its version in the source: s3://bucket/key?versionId=…"
            raise place.error("only models of the Hub and of the package index have a revision", remedy)
        if reference.revision is not None:
            raise place.error(f"the source already says @{reference.revision}", "Keep one of the two.")
        # Parsed once more as a whole, so that a revision has one grammar wherever it is written.
        reference = _parse(place, f"{reference.url}@{revision}")
    return ModelSpec(**{**defaults, **fields, "id": id_, **_source_fields(reference)})


def _source_fields(reference: Reference) -> dict[str, Any]:
    source = msgspec.structs.replace(reference, revision=None).url
    return {"source": source, "revision": reference.revision}


def _default(value: Value | None, models: dict[str, ModelSpec]) -> str | None:
    if value is None:
        return None
    id_ = value.text("the id of one of the models")
    if id_ not in models:
        from difflib import get_close_matches

        close = get_close_matches(id_, models, n=1)
        hint = f"Did you mean {close[0]}?" if close else "Write an id as it stands under `models`."
        raise value.error(f"there is no model {id_!r} below", hint)
    return id_


def _fields(value: Value, known: list[str]) -> dict[str, Any]:
    """The checked fields of one entry; a key with nothing after it counts as left out."""
    settings = value.mapping("the model's settings", known)
    return {key: _FIELDS[key](setting) for key, setting in settings.items() if not setting.is_null}


def _max_model_len(value: Value) -> int:
    return value.integer("a number of tokens", 1, _MAX_TOKENS)


def _tp_size(value: Value) -> int:
    return value.integer("a number of GPUs", 1, _MAX_TP_SIZE)


def _dtype(value: Value) -> str:
    dtype = value.text("a dtype")
    if dtype not in _DTYPES:
        raise value.error(f"{dtype!r} is no dtype", f"Write one of {', '.join(_DTYPES)}.")
    return dtype


def _quantization(value: Value) -> str | None:
    name = value.text("a quantisation method")
    return None if name.lower() == "none" else name.lower()


def _revision(value: Value) -> str:
    return value.text("a branch, tag, commit or version")


def _source(value: Value) -> Reference:
    return _parse(value, value.text("a source"))


def _chat_template(value: Value) -> str:
    """The template itself or its name as it stands, or the absolute path of the file that holds it."""
    text = value.text("a template or its file")
    if "{%" in text or "{{" in text or (_TEMPLATES / f"{text}.jinja").is_file():
        return text
    file = _beside(value, text)
    if not file.is_file():
        raise value.error(f"there is no file {file}", "Paths start from the folder of this file.")
    return str(file)


def _stop_token_ids(value: Value) -> tuple[int, ...]:
    ids = value.items("a list of token ids")
    return tuple(item.integer("a token id", 0, _MAX_TOKENS) for item in ids)


def _adapters(value: Value) -> dict[str, str]:
    adapters = {}
    for name, source in value.mapping("the adapters' sources by their names").items():
        if not _ID.fullmatch(name) or ".." in name:
            raise source.error(f"{name!r} cannot be an adapter's name", "Use letters, digits and . _ -")
        adapters[name] = _source(source).url
    return adapters


def _memory(value: Value) -> dict[str, float]:
    sizes = value.mapping("what the model takes", MEMORY_KEYS)
    return {name: size.number(f"`{name}`", 0, _MAX_MEMORY) for name, size in sizes.items()}


def _generation(value: Value) -> dict[str, Any]:
    settings = {}
    for name, setting in value.mapping("sampling settings", tuple(GENERATION_RANGES)).items():
        whole, low, high = GENERATION_RANGES[name]
        settings[name] = (
            setting.integer(f"`{name}`", int(low), int(high))
            if whole
            else setting.number(f"`{name}`", low, high)
        )
    return settings


def _seconds(value: Value) -> float:
    return value.number("seconds; 0 is never", 0, _MAX_SECONDS)


_FIELDS: dict[str, Callable[[Value], Any]] = {
    "source": _source,
    "revision": _revision,
    "max_model_len": _max_model_len,
    "tp_size": _tp_size,
    "dtype": _dtype,
    "quantization": _quantization,
    "chat_template": _chat_template,
    "stop_token_ids": _stop_token_ids,
    "adapters": _adapters,
    "memory": _memory,
    "generation": _generation,
    "idle_sleep_s": _seconds,
    "idle_exit_s": _seconds,
}


def _parse(value: Value, text: str) -> Reference:
    """A source, independent of the folder that firstlight happens to be started in."""
    if "://" not in text and not text.startswith("arn:"):
        if not text.startswith(("/", "./", "../", "~/")):
            remedy = f"Write hf://{text} for the Hub or ./{text} for a folder beside this file."
            raise value.error(f"{text!r} may be the Hub's or a folder", remedy)
        text = str(_beside(value, text))
    try:
        return parse_reference(text)
    except SourceError as error:
        raise value.error("not a source", str(error)) from error


def _beside(value: Value, text: str) -> Path:
    return value.path.resolve().parent.joinpath(Path(text).expanduser())
