"""Chat templates: messages -> the text of a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from runtime.errors import FirstlightError, RequestError

if TYPE_CHECKING:
    import jinja2

    from runtime.text.tokenizer import Tokenizer

_TIME_LIMIT_S = 2.0
_SHIPPED = re.compile(r"(?:.*/)?template_(\w+)\.jinja|(\w+)")


class ChatTemplateError(FirstlightError):
    """A model's chat template that cannot be used at all."""


class ChatTemplate:
    """One model's chat template, or several by name, of which `tool_use` serves requests with tools."""

    def __init__(
        self, source: str | Mapping[str, str], *, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """`special_tokens` (bos_token and the like) are variables of the template, kept under that name.

        Raises ChatTemplateError if the source is no valid template.
        """
        sources = {"default": source} if isinstance(source, str) else source
        if "default" not in sources:
            raise ChatTemplateError(
                f"the model has no chat template named 'default'; it has {', '.join(sources) or 'none'}"
            )
        self._sources = dict(sources)
        self._templates = {name: _compile(name, text) for name, text in sources.items()}
        self.special_tokens = dict(special_tokens or {})

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self | None:
        """The template that came with a tokenizer, or None."""
        if not tokenizer.chat_templates:
            return None
        return cls(tokenizer.chat_templates, special_tokens=tokenizer.special_tokens)

    @property
    def source(self) -> str:
        """The template's text, as it is used without tools."""
        return self._sources["default"]

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template takes from outside, `messages` and special tokens included."""
        return frozenset().union(*map(_variables, self._sources.values()))

    def mentions(self, text: str) -> bool:
        """Whether the template's source spells `text` anywhere: a tag, or the name of a role."""
        return any(text in source for source in self._sources.values())

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text; `variables` are passed to the template.

        Messages and tools are plain JSON values. Raises RequestError with the template's own words
        where it refuses them, and when it takes too long or builds too much.
        """
        from runtime.text.bounds import TemplateLimitError, bounded, bounded_join

        name = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        given = {"messages": messages, "tools": tools, "documents": None} | self.special_tokens | variables
        given["add_generation_prompt"] = add_generation_prompt
        try:
            with bounded(_TIME_LIMIT_S):
                return bounded_join(self._templates[name].generate(given))
        except TemplateLimitError as error:
            raise RequestError(str(error), "messages") from error
        except RecursionError as error:
            raise RequestError("the chat template calls itself without end", "messages") from error
        except Exception as error:  # a template is a program: anything can go wrong in it
            detail = str(error) or type(error).__name__
            raise RequestError(
                f"the model's chat template refuses these messages: {detail}", "messages"
            ) from error


def _variables(source: str) -> set[str]:
    from jinja2 import meta

    from runtime.text.sandbox import ChatTemplateEnvironment

    return meta.find_undeclared_variables(ChatTemplateEnvironment().parse(source))


def read_template(template: str) -> str:
    """The source of a chat template that is given as text, as the path of a file, or by name.

    Names are those of the templates that come along. A path that does not exist means one of them too if
    its file is called `template_NAME.jinja`, as vLLM's examples are, to which deployments' guides refer.
    """
    if "{" in template:
        return template
    named = _SHIPPED.fullmatch(template)
    if named is not None and not Path(template).exists():
        from runtime.text.templates import shipped_names, shipped_template

        name = named[1] or named[2]
        if name in shipped_names():
            return shipped_template(name)
    try:
        return Path(template).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ChatTemplateError(f"cannot read the chat template '{template}': {reason}") from None


def _compile(name: str, source: str) -> jinja2.Template:
    from jinja2 import TemplateSyntaxError

    from runtime.text.sandbox import ChatTemplateEnvironment

    try:
        return ChatTemplateEnvironment().from_string(source)
    except TemplateSyntaxError as error:
        wrong = (error.message or "").removesuffix(".")
        raise ChatTemplateError(
            f"chat template {name!r}, line {error.lineno}: {wrong}; pass a corrected one with --chat-template"
        ) from error
    except RecursionError as error:
        raise ChatTemplateError(f"chat template {name!r} is nested too deeply") from error
