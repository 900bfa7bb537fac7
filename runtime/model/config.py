"""config.json -> ModelConfig: what the decoder needs to know, in one set of terms for all families.

Nothing here needs torch: the plan of what to load is made before torch is imported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from runtime.errors import FirstlightError
from runtime.kernels.quantization import Quantization

Activation = Literal["silu", "gelu_tanh"]
# As config.json spells them.
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# The ways of scaling rotary angles that are known, with the numbers that each needs.
_ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": (),
}


class ConfigError(FirstlightError):
    """A config.json that does not describe a model this runtime can serve."""


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the first `rotary_dim` dimensions of each head.

    scaling        the checkpoint's own description of how it was stretched to longer contexts
    interleaved    dimension 2 i turns with 2 i + 1 ("gptj" layout), not i with i + rotary_dim / 2 ("neox")
    ntk_length     prompts longer than this turn more slowly, by Qwen's dynamic NTK; None for no such thing
    """

    theta: float
    rotary_dim: int
    scaling: dict[str, Any] | None = None
    interleaved: bool = False
    ntk_length: int | None = None

    def doublings(self, num_prompt: int) -> int:
        """How often `ntk_length` must be doubled to hold a prompt; what a request's angles depend on."""
        if self.ntk_length is None:
            return 0
        return (-(-num_prompt // self.ntk_length) - 1).bit_length()


@dataclass(frozen=True)
class ModelConfig:
    """One decoder-only transformer, whole; `of_rank` has the sizes per rank.

    rope                  None where positions do not rotate
    local_rope            that of the layers with a window, where it is another
    alibi                 whether positions count as biases of the scores (Press et al., 2021)
    windows               how many tokens back each layer sees, itself included, 0 for all; () for no windows
    attention_scale       what products of queries and keys are multiplied by; None for head_dim ** -0.5
    attention_softcap     c in c * tanh(score / c); 0 for none
    log_n_length          from this many tokens on, queries grow with the logarithm of their position
    norm_offset           what is added to every norm's weight
    embedding_multiplier  what embeddings are multiplied by
    normalized_head       whether the rows of the head count as unit vectors
    logits_softcap        as `attention_softcap`, of the logits

    Parts that a checkpoint either has or has not are known by their tensors: biases, norms of queries and
    keys, norms behind attention and MLP.
    """

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
    rope: RopeConfig | None
    torch_dtype: str
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    local_rope: RopeConfig | None = None
    alibi: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    log_n_length: int | None = None
    norm_offset: float = 0.0
    embedding_multiplier: float = 1.0
    normalized_head: bool = False
    logits_softcap: float = 0.0
    quantization: Quantization | None = None

    def of_rank(self, world_size: int) -> ModelConfig:
        """The sizes of what each of `world_size` ranks computes: its heads, and its part of the MLP."""
        return replace(
            self,
            num_heads=self.num_heads // world_size,
            num_kv_heads=max(1, self.num_kv_heads // world_size),
            intermediate_size=self.intermediate_size // world_size,
        )


class RawConfig:
    """A config.json being read: every look-up checks presence and type and says what is wrong."""

    def __init__(self, path: Path, values: dict[str, Any], key: str | None = None) -> None:
        self.path = path
        self.values = values
        # What errors name.
        self.where = str(path) if key is None else f"{path}: {key}"

    @classmethod
    def read(cls, path: Path) -> RawConfig:
        """Read a file that holds a JSON object."""
        try:
            values = json.loads(path.read_text())
        except FileNotFoundError:
            raise ConfigError(f"{path} is missing: a model folder needs its config.json.") from None
        except (ValueError, OSError) as error:
            raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{path} must hold a JSON object.")
        return cls(path, values)

    def section(self, key: str) -> RawConfig | None:
        """The object under a key; None where there is none or null."""
        values = self.values.get(key)
        if values is not None and not isinstance(values, dict):
            raise ConfigError(f"{self.where}: {key} must be an object or null, not {values!r}.")
        return None if values is None else RawConfig(self.path, values, key)

    def get_int(self, key: str, default: int | None = None) -> int:
        """A positive integer."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{self.where}: {key} must be a positive integer, not {value!r}.")
        return value

    def get_float(self, key: str, default: float) -> float:
        """A number above zero."""
        value = self.values.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise ConfigError(f"{self.where}: {key} must be a number above zero, not {value!r}.")
        return float(value)

    def get_bool(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {key} must be true or false, not {value!r}.")
        return value

    def get_optional_int(self, key: str, default: int | None = None) -> int | None:
        """A positive integer, or None where the key is null."""
        return None if self.values.get(key, default) is None else self.get_int(key, default)

    def get_optional_float(self, key: str, default: float | None = None) -> float | None:
        """A number above zero, or None where the key is null."""
        return None if self.values.get(key, default) is None else self.get_float(key, default or 1.0)

    def get_activation(self, key: str, default: str) -> Activation:
        """The MLP's activation."""
        name = self.values.get(key) or default
        if name not in _ACTIVATIONS:
            raise ConfigError(f"{self.where}: {key} {name!r} is not supported ({', '.join(_ACTIVATIONS)}).")
        return _ACTIVATIONS[name]

    def get_windows(self, window: int | None, windowed: Sequence[bool]) -> tuple[int, ...]:
        """Each layer's window: `window` where `layer_types`, or else `windowed`, says so."""
        types = self.values.get("layer_types")
        if types is not None:
            if (
                not isinstance(types, list)
                or len(types) != len(windowed)
                or not set(types) <= {"full_attention", "sliding_attention"}
            ):
                raise ConfigError(
                    f"{self.where}: layer_types must say full_attention or sliding_attention "
                    f"for each of {len(windowed)} layers."
                )
            windowed = [kind == "sliding_attention" for kind in types]
        if window is None or not any(windowed):
            return ()
        return tuple(window if each else 0 for each in windowed)

    def refuse(self, key: str, *supported: Any) -> None:
        """Refuse a key that, if there, is not one of the values that this runtime knows."""
        if key in self.values and self.values[key] not in supported:
            raise ConfigError(
                f"{self.where}: {key} {self.values[key]!r} is not supported "
                f"({', '.join(json.dumps(value) for value in supported)})."
            )

    @property
    def architecture(self) -> str:
        """The class name the checkpoint was saved from, e.g. LlamaForCausalLM."""
        names = self.values.get("architectures")
        if not isinstance(names, list) or not names or not isinstance(names[0], str):
            raise ConfigError(
                f"{self.where}: `architectures` must name the model class, e.g. LlamaForCausalLM."
            )
        return names[0]

    @property
    def torch_dtype(self) -> str:
        """The dtype the checkpoint says it was saved in; newer files spell the key `dtype`."""
        value = self.values.get("torch_dtype", self.values.get("dtype", "float32"))
        return value if isinstance(value, str) else "float32"

    def rope(self, head_dim: int, default_theta: float = 10000.0) -> RopeConfig:
        """Rotary settings in the older spelling (rope_theta, rope_scaling) or the newer (rope_parameters)."""
        key = "rope_parameters" if self.values.get("rope_parameters") is not None else "rope_scaling"
        settings = self.values.get(key) or {}
        if not isinstance(settings, dict):
            raise ConfigError(f"{self.where}: {key} must be an object or null, not {settings!r}.")
        return self.rope_from(settings, key, head_dim, default_theta)

    def rope_from(
        self, settings: dict[str, Any], key: str, head_dim: int, default_theta: float
    ) -> RopeConfig:
        """Rotary settings of the object under `key`; what it leaves out is looked for beside it.

        The `dynamic` kind leaves everything as it is up to max_position_embeddings, and nothing longer is
        served.
        """
        kind = settings.get("rope_type") or settings.get("type") or "default"
        if kind not in _ROPE_TYPES:
            raise ConfigError(
                f"{self.where}: rope scaling of type {kind!r} is not supported ({', '.join(_ROPE_TYPES)})."
            )
        if kind == "yarn":
            trained = self.get_int("max_position_embeddings")
            settings = {"original_max_position_embeddings": trained} | settings
        for name in _ROPE_TYPES[kind]:
            value = settings.get(name)
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ConfigError(f"{self.where}: {key} must have {name}, a number above zero.")
        beside = {
            name: self.values[name]
            for name in ("rope_theta", "partial_rotary_factor")
            if self.values.get(name) is not None
        }
        theta, share = (
            (beside | settings).get(name, default)
            for name, default in (("rope_theta", default_theta), ("partial_rotary_factor", 1.0))
        )
        if not all(isinstance(value, int | float) and value > 0 for value in (theta, share)):
            raise ConfigError(
                f"{self.where}: rope_theta and partial_rotary_factor must be numbers above zero."
            )
        rotary_dim = int(head_dim * share)
        return RopeConfig(float(theta), rotary_dim, None if kind in ("default", "dynamic") else settings)
