"""A causal language model that has no family here, run through transformers' own class.

The class computes all but attention, which transformers lets others plug in
(https://huggingface.co/docs/transformers/attention_interface): there, keys and values go through the paged
cache. Whether that does justice to the model is not taken on trust. A short text is computed with the
class's own attention first, and a model for which ours comes out differently is refused.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from runtime.kernels.attention import AttentionForm, attend_densely, attention
from runtime.kernels.batch import PackedBatch
from runtime.kernels.rotary import rotary_store
from runtime.model.config import ConfigError, ModelConfig
from runtime.model.layers import LayerCache

# What the text that a model is tried with consists of, and how far its logits may be off, by dtype.
_TRIAL_TOKENS = 12
_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}
# Kinds of layers whose state is keys and values, and nothing else.
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# The Triton kernels' matrix products take no fewer dimensions.
_MIN_HEAD_DIM = 16
_counter = itertools.count()


@dataclass(frozen=True, slots=True)
class _Call:
    """One layer's attention, as the trial saw it."""

    form: AttentionForm
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class _Step:
    """What attention needs to know while a step is computed."""

    batch: PackedBatch
    cache: Sequence[LayerCache]


class FallbackDecoder:
    """A model of transformers with the interface of `Decoder`."""

    num_position_tables = 1
    halves = None
    # Many of the classes do what a captured graph cannot hold.
    capturable = False

    def __init__(self, directory: Path, architecture: str, device: torch.device, dtype: torch.dtype) -> None:
        self.before: Callable[[str], None] = lambda name: None
        self._where = directory / "config.json"
        self._model = _load(directory, architecture, device, dtype)
        self._name = f"firstlight_{next(_counter)}"
        self._step: _Step | None = None
        self._calls: dict[int, _Call] = {}
        self._takes_rows = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        self._plug_in(dtype)
        self.config = self._describe(architecture)

    def position_base(self, num_prompt: int) -> int:
        """Positions are counted from 0; see `Decoder.position_base`."""
        return 0

    def forward(self, batch: PackedBatch, cache: Sequence[LayerCache]) -> torch.Tensor:
        """The logits after `batch.logits_rows`, [R, vocab_size] float32."""
        self.before("all")
        rows = batch.logits_rows
        self._step = _Step(batch, cache)
        if rows is None or not self._takes_rows:
            logits = self._compute(batch.token_ids, batch.positions)
            return logits if rows is None else logits[rows.long()]
        return self._compute(batch.token_ids, batch.positions, logits_to_keep=rows.long())

    def _compute(self, token_ids: torch.Tensor, positions: torch.Tensor, **options: Any) -> torch.Tensor:
        output = self._model(
            input_ids=token_ids[None].long(), position_ids=positions[None].long(), use_cache=False, **options
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits

    # ---- attention --------------------------------------------------------------------------------

    def _attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """What the class calls in each layer: query [1, num_heads, T, dim] -> [1, T, num_heads, dim]."""
        form = AttentionForm(
            query.shape[1],
            query.shape[3] ** -0.5 if scaling is None else float(scaling),
            softcap or 0.0,
            sliding_window or 0,
        )
        layer: int | None = getattr(module, "layer_idx", None)
        if layer is None or (self._step is None and layer in self._calls):
            raise ConfigError(
                f"{self._where}: {type(module).__name__} does not say which layer it belongs to."
            )
        if self._step is None:
            self._calls[layer] = _Call(form, key.shape[1], max(query.shape[3], value.shape[3]))
            positions = torch.arange(query.shape[2], device=query.device)
            q, k, v = query[0].transpose(0, 1), key[0].transpose(1, 2), value[0]
            return attend_densely(q, k, v, positions, form)[None], None
        batch, cache = self._step.batch, self._step.cache[layer]
        head_dim = cache.values.shape[3]
        heads = [F.pad(part[0], (0, head_dim - part.shape[3])) for part in (query, key, value)]
        qkv = torch.cat(heads).transpose(0, 1).flatten(1).to(cache.values.dtype).contiguous()
        rotary_store(qkv, None, batch.positions, batch.slots, cache.keys, cache.values, form.num_heads)
        out = attention(qkv, cache.keys, cache.values, batch, form).view(1, -1, form.num_heads, head_dim)
        return out[..., : value.shape[3]].to(query.dtype), None

    def _plug_in(self, dtype: torch.dtype) -> None:
        """Take the place of the class's attention, if it comes to the same."""
        from transformers import AttentionInterface

        AttentionInterface.register(self._name, self._attend)
        tokens = torch.arange(_TRIAL_TOKENS, device=self._model.device)
        with torch.inference_mode():
            expected = self._compute(tokens, tokens)
            self._model.set_attn_implementation(self._name)
            found = self._compute(tokens, tokens)
        self._vocab_size = expected.shape[1]
        off = float((found - expected).norm() / expected.norm())
        if not off <= _TOLERANCES[dtype]:
            raise ConfigError(
                f"{self._where}: {type(self._model).__name__} attends in a way that the paged cache does not "
                f"know (its logits come out {off:.0%} different), so this model cannot be served."
            )

    def _describe(self, architecture: str) -> ModelConfig:
        """The model in the runtime's own terms, as far as the engine asks; the rest is the class's."""
        text = self._model.config.get_text_config()
        calls = [self._calls[layer] for layer in sorted(self._calls)]
        types = getattr(text, "layer_types", None) or ["full_attention"] * len(calls)
        reason = None
        if not calls or list(range(len(calls))) != sorted(self._calls):
            reason = "not every layer attends through the interface that lets attention be plugged in"
        elif len({(call.form.num_heads, call.num_kv_heads) for call in calls}) > 1:
            reason = "its layers differ in their numbers of heads"
        elif any(t == "sliding_attention" and not c.form.window for t, c in zip(types, calls, strict=False)):
            reason = "layers with a window do not say how wide it is"
        if reason is not None:
            raise ConfigError(f"{self._where}: {architecture} cannot be served: {reason}.")
        return ModelConfig(
            family="transformers",
            num_layers=len(calls),
            hidden_size=text.hidden_size,
            num_heads=calls[0].form.num_heads,
            num_kv_heads=calls[0].num_kv_heads,
            head_dim=max(_MIN_HEAD_DIM, *(call.head_dim for call in calls)),
            intermediate_size=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            vocab_size=self._vocab_size,
            max_position_embeddings=_max_length(text),
            rms_norm_eps=0.0,
            rope=None,
            torch_dtype=str(self._model.dtype).removeprefix("torch."),
        )


def _load(directory: Path, architecture: str, device: torch.device, dtype: torch.dtype) -> Any:
    """The class's model with its weights on the device. Raises `ConfigError`."""
    where = directory / "config.json"
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            f"{where}: architecture {architecture!r} is none of this runtime's own, and transformers, which "
            "may know it, is not installed: pip install 'firstlight[fallback]'."
        ) from None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]  # it would be in the log
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ConfigError(
            f"{where}: architecture {architecture!r} is neither one of this runtime's own nor a causal "
            f"language model that transformers {transformers.__version__} has a class for."
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            directory, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:  # of whatever type transformers raises for what a config.json may hold
        raise ConfigError(
            f"{where}: transformers cannot read it (and code that comes with a model is never run): {error}"
        ) from error
    model_class = getattr(transformers, architecture)
    reason = _refusal(config, model_class)
    if reason is not None:
        raise ConfigError(f"{where}: {architecture} cannot be served: {reason}.")
    model, report = model_class.from_pretrained(
        directory,
        config=config,
        dtype=dtype,
        attn_implementation="eager",
        local_files_only=True,
        output_loading_info=True,
    )
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(f"{directory} lacks weights that {architecture} needs, among them {some}.")
    return model.eval().to(device)


def _refusal(config: Any, model_class: Any) -> str | None:
    """Why a model cannot have the paged cache for its only state; None if, as far as it says, it can."""
    text = config.get_text_config()
    others = set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES
    forward = inspect.signature(model_class.forward).parameters
    if getattr(config, "quantization_config", None) is not None:
        return "quantised weights are read only for the architectures that this runtime has of its own"
    if getattr(model_class, "_is_stateful", False) or others:
        return f"it keeps a state beside keys and values ({', '.join(sorted(others)) or 'recurrent layers'})"
    if not model_class.is_backend_compatible() or "position_ids" not in forward:
        return "its class in transformers does not let attention be plugged in"
    return None


def _max_length(text: Any) -> int:
    """The longest text for which angles do not depend on how long the others of a batch are."""
    length = getattr(text, "max_position_embeddings", None) or 2048
    rope = getattr(text, "rope_parameters", None) or {}
    for settings in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if settings.get("rope_type") == "longrope":
            length = min(length, settings.get("original_max_position_embeddings") or length)
    return int(length)
