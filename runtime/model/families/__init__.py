"""One short file per family: how its config and checkpoint spell the one decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.model.config import ConfigError, ModelConfig, RawConfig
from runtime.model.families import (
    baichuan,
    chatglm,
    gemma2,
    gemma3,
    internlm2,
    llama,
    qwen,
    qwen2,
    qwen3,
)
from runtime.model.layout import Parameter
from runtime.model.quantization import read_quantization


@dataclass(frozen=True)
class Model:
    """A model as its folder describes it, before any weight is read."""

    config: ModelConfig
    parameters: tuple[Parameter, ...]

    @property
    def torch_dtype(self) -> str:
        """The dtype that the checkpoint says it was saved in."""
        return self.config.torch_dtype


@dataclass(frozen=True)
class ForeignModel:
    """A model of an architecture that has no family here."""

    directory: Path
    architecture: str
    torch_dtype: str


_Reader = Callable[[RawConfig], ModelConfig]
_Layout = Callable[[ModelConfig], Iterable[Parameter]]
_FAMILIES: dict[str, tuple[_Reader, _Layout]] = {
    architecture: (family.read_config, family.parameters)
    for family in (baichuan, chatglm, gemma2, gemma3, internlm2, llama, qwen, qwen2, qwen3)
    for architecture in family.ARCHITECTURES
}


def read_model(directory: Path) -> Model | ForeignModel:
    """Describe the model in a folder from its config.json. Raises `ConfigError`."""
    raw = RawConfig.read(directory / "config.json")
    if raw.architecture not in _FAMILIES:
        return ForeignModel(directory, raw.architecture, raw.torch_dtype)
    read_config, parameters = _FAMILIES[raw.architecture]
    config = replace(read_config(raw), quantization=read_quantization(raw))
    if config.num_heads % config.num_kv_heads:
        raise ConfigError(
            f"{raw.where}: {config.num_heads} heads cannot share {config.num_kv_heads} key/value heads."
        )
    return Model(config, tuple(parameters(config)))
