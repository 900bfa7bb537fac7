"""What a model's small files say about its tokens, beside the vocabulary itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeGuard

from runtime.text.backend import AddedToken, TokenizerError

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
# Baichuan's roles have no text of their own: they are tokens, which generation_config.json names by id.
_ROLE_IDS = {"user_token": "user_token_id", "assistant_token": "assistant_token_id"}


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed files of a model's folder; one that is not there is empty.

    `template` is the text of chat_template.jinja, None where there is no such file.
    """

    tokenizer_config: dict[str, Any]
    special_tokens_map: dict[str, Any]
    added_tokens: dict[str, Any]
    generation_config: dict[str, Any]
    config: dict[str, Any]
    template: str | None

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read a model's folder. Raises TokenizerError, which names file and fault."""
        template = directory / "chat_template.jinja"
        return cls(
            tokenizer_config=_read_json(directory / "tokenizer_config.json"),
            special_tokens_map=_read_json(directory / "special_tokens_map.json"),
            added_tokens=_read_json(directory / "added_tokens.json"),
            generation_config=_read_json(directory / "generation_config.json"),
            config=_read_json(directory / "config.json"),
            template=template.read_text(encoding="utf-8") if template.is_file() else None,
        )

    @cached_property
    def special_tokens(self) -> dict[str, str]:
        """`bos_token`, `eos_token` and the like -> their text, as far as there are any."""
        found = {}
        for name in _SPECIAL_NAMES:
            for file in (self.tokenizer_config, self.special_tokens_map):
                if (text := _text_of(file.get(name))) is not None:
                    found[name] = text
                    break
        return found

    @cached_property
    def special_names(self) -> frozenset[str]:
        """The text of every token that the files call special."""
        names = set(self.special_tokens.values())
        for file in (self.tokenizer_config, self.special_tokens_map):
            for key in ("additional_special_tokens", "extra_special_tokens"):
                more = file.get(key)
                tokens = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
                names |= {text for token in tokens if (text := _text_of(token)) is not None}
        return frozenset(names)

    @cached_property
    def role_ids(self) -> dict[str, int]:
        """`user_token` and `assistant_token` -> their ids, in the families that have roles as tokens."""
        ids = {name: self.generation_config.get(key) for name, key in _ROLE_IDS.items()}
        return {name: index for name, index in ids.items() if _is_id(index)}

    @cached_property
    def added(self) -> list[AddedToken]:
        """The tokens that the files give ids to."""
        found: dict[int, AddedToken] = {}
        for text, index in self.added_tokens.items():
            if not _is_id(index):
                raise TokenizerError(f"added_tokens.json: {text!r} has {index!r}, which is no token's id")
            found[index] = AddedToken(text, index, special=text in self.special_names)
        decoder = self.tokenizer_config.get("added_tokens_decoder") or {}
        if not isinstance(decoder, dict):
            raise TokenizerError("tokenizer_config.json: added_tokens_decoder must hold tokens by their ids")
        for index, token in decoder.items():
            content = token.get("content") if isinstance(token, dict) else None
            if not index.isdecimal() or not isinstance(content, str):
                raise TokenizerError(
                    f"tokenizer_config.json: added_tokens_decoder[{index!r}] is no token with a content"
                )
            special = bool(token.get("special", False)) or content in self.special_names
            found[int(index)] = AddedToken(content, int(index), special=special)
        return list(found.values())

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that generation_config.json and config.json name as the end of an answer."""
        found: list[int] = []
        for file in (self.generation_config, self.config):
            value = file.get("eos_token_id")
            found += filter(_is_id, value if isinstance(value, list) else [value])
        return tuple(dict.fromkeys(found))

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """Template name -> source; the one without a name is "default"."""
        value = self.tokenizer_config.get("chat_template")
        if isinstance(value, list):
            found = dict(map(_named_template, value))
        else:
            found = {"default": value} if isinstance(value, str) else {}
        return found if self.template is None else found | {"default": self.template}


def _named_template(item: Any) -> tuple[str, str]:
    name, source = (item.get("name"), item.get("template")) if isinstance(item, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(source, str):
        raise TokenizerError("tokenizer_config.json: a chat template of a list needs `name` and `template`")
    return name, source


def _is_id(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text_of(token: Any) -> str | None:
    """A token's text, which files give as such or as an object's `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{path}: is not JSON: {error}; fetch the model again") from None
    if not isinstance(content, dict):
        raise TokenizerError(f"{path}: must hold a JSON object")
    return content
