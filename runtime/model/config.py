"""config.json -> ModelConfig: what the decoder needs to know, in one set of terms for all families.

Nothing here needs torch: the plan of what to load is made before torch is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.errors import FirstlightError


class ConfigError(FirstlightError):
    """A config.json that does not describe a model this runtime can serve."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding. `scaling` is the checkpoint's own description of how it was stretched."""

    theta: float
    rotary_dim: int
    scaling: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer. Sizes are per model, not per rank."""

    family: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    attention_bias: bool
    attention_output_bias: bool
    mlp_bias: bool
    torch_dtype: str


class RawConfig:
    """A config.json being read: every look-up checks presence and type and says what is wrong."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: a model folder needs its config.json.") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(self.values, dict):
            raise ConfigError(f"{path} must hold a JSON object.")

    def get_int(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.path}: {key} must be a positive integer, not {value!r}.")
        return value

    def get_float(self, key: str, default: float) -> float:
        """A number above zero."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.path}: {key} must be a number above zero, not {value!r}.")
        return float(value)

    def get_bool(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.path}: {key} must be true or false, not {value!r}.")
        return value

    @property
    def architecture(self) -> str:
        """The class name the checkpoint was saved from, e.g. LlamaForCausalLM."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError(
                f"{self.path}: `architectures` must name the model class, e.g. LlamaForCausalLM."
            )
        return names[0]

    @property
    def torch_dtype(self) -> str:
        """The dtype the checkpoint says it was saved in; newer files spell the key `dtype`."""
        value = self.values.get("torch_dtype", self.values.get("dtype", "float32"))
        return value if isinstance(value, str) else "float32"

    def rope(self, head_dim: int, default_theta: float = 10000.0) -> RopeConfig:
        """Rotary settings in the older spelling (rope_theta, rope_scaling) or the newer (rope_parameters)."""
        parameters = self.values.get("rope_parameters")
        scaling = parameters if isinstance(parameters, dict) else self.values.get("rope_scaling")
        if scaling is not None and not isinstance(scaling, dict):
            raise ConfigError(f"{self.path}: rope_scaling must be an object or null, not {scaling!r}.")
        theta = (scaling or {}).get("rope_theta") or self.get_float("rope_theta", default_theta)
        kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
        if kind not in ("default", "linear", "llama3"):
            raise ConfigError(
                f"{self.path}: rope scaling of type {kind!r} is not supported (default, linear, llama3)."
            )
        rotary_dim = int(head_dim * self.get_float("partial_rotary_factor", 1.0))
        return RopeConfig(float(theta), rotary_dim, None if kind == "default" else scaling)
