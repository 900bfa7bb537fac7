"""A model's text side: tokenizer, chat template, limits and sampling defaults.

All of it comes from the model's small files, which are there long before its weights.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from runtime.catalogue import GENERATION_RANGES, ModelSpec
from runtime.text.backend import TokenizerError
from runtime.text.chat import turn_end
from runtime.text.sampling import DEFAULTED
from runtime.text.template import ChatTemplate
from runtime.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ModelText:
    """What turns requests into token ids and back. Lengths are in tokens.

    `defaults` are the model's own sampling settings; `eos_token_ids` all ids that end a sequence.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    defaults: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    max_model_len: int
    vocab_size: int


@dataclass(frozen=True)
class TextFiles:
    """What the files in a model's folder say. `vocab_size` is None where config.json spells it otherwise.

    `eos_token_ids` are those of the files, of the family, and the one that ends a turn in the template.
    """

    tokenizer: Tokenizer
    template: ChatTemplate | None
    generation: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    vocab_size: int | None

    @classmethod
    def read(cls, directory: Path, chat_template: str | None = None) -> Self:
        """Read a model's folder; `chat_template` takes the place of the model's own.

        Raises TokenizerError or ChatTemplateError, which say what is wrong with the files.
        """
        tokenizer = Tokenizer.load(directory)
        if chat_template is None:
            template = ChatTemplate.of(tokenizer)
        else:
            template = ChatTemplate(chat_template, special_tokens=tokenizer.special_tokens)
        end = None if template is None else turn_end(tokenizer, template)
        vocab_size = _read_json(directory / "config.json").get("vocab_size")
        return cls(
            tokenizer=tokenizer,
            template=template,
            generation=_defaults(_read_json(directory / "generation_config.json")),
            eos_token_ids=(*tokenizer.eos_token_ids, *(() if end is None else (end,))),
            vocab_size=vocab_size if isinstance(vocab_size, int) else None,
        )

    def with_limits(self, max_model_len: int, vocab_size: int, spec: ModelSpec | None = None) -> ModelText:
        """The model's text side with the engine's limits.

        The sampling defaults of its catalogue entry beat the files', and its stop tokens join theirs. Those
        of the files that the model cannot generate are left out, as checkpoints do name some.

        Raises TokenizerError where the entry names such a one.
        """
        generation = {} if spec is None else spec.generation
        stops = () if spec is None else spec.stop_token_ids
        if spec is not None and max(stops, default=0) >= vocab_size:
            raise TokenizerError(
                f"{spec.id}: stop_token_ids holds {max(stops)}; this model's ids end at {vocab_size - 1}."
            )
        own = (token_id for token_id in self.eos_token_ids if token_id < vocab_size)
        return ModelText(
            tokenizer=self.tokenizer,
            template=self.template,
            defaults={**self.generation, **generation},
            eos_token_ids=tuple(sorted({*own, *stops})),
            max_model_len=max_model_len,
            vocab_size=vocab_size,
        )


def _defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The sampling settings among a generation_config.json's: what else it holds is for other programs."""
    found: dict[str, Any] = {}
    for name in DEFAULTED:
        value = values.get(name)
        whole, low, high = GENERATION_RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            continue
        if not whole:
            found[name] = value
        elif value == int(value):
            found[name] = int(value)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    return value if isinstance(value, dict) else {}
