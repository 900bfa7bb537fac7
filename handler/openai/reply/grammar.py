"""The grammar of a whole reply: its reasoning, then its content or its calls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from handler.openai.reply.call_grammar import CallGrammar
from runtime.text.grammar import Part, lark, literal, source

# What the rules of calls and reasoning refer to.
_TERMINALS = "TEXT: /(.|\\n)*/\nSPACE: /\\s{0,8}/"


@dataclass(frozen=True)
class Thinking:
    """The reasoning before an answer, between two tags; `inside`: the prompt has opened it already."""

    begin: str
    end: str
    inside: bool


def reply_grammar(
    content: Part | None,
    calls: CallGrammar | None,
    *,
    must_call: bool,
    thinking: Thinking | None,
    tag: Callable[[str], str],
) -> str:
    """What a reply may be: content, if that is held to anything, or calls, if there are any that may be made.

    With `must_call` it is calls. `tag` gives a tag as Lark has it; see `CallRules`.
    """
    others = {} if content is None or must_call else {"content": content}
    rules = []
    if calls is None:
        rules.append("answer: @content")
    elif must_call:
        rules += ["answer: calls", calls.calls]
    elif content is not None:
        rules += ["answer: calls | @content", calls.calls]
    else:
        rules += ["answer: free", calls.free]
    if content is not None and calls is None and thinking is None:
        return source(content)
    # Free text may hold the reasoning's tags like anything else.
    optional = content is not None or must_call
    start = _start(thinking, optional=optional, tag=tag)
    return source(lark("\n".join([start, *rules, _TERMINALS])), **others)


def _start(thinking: Thinking | None, *, optional: bool, tag: Callable[[str], str]) -> str:
    if thinking is None or not (thinking.inside or optional):
        return "start: answer"
    end = tag(thinking.end)
    # Plain text is any text, so that it takes a lazy rule to see where it stops.
    lazy = "[lazy]" if end == literal(thinking.end) else ""
    begin = "reasoning SPACE" if thinking.inside else f"({tag(thinking.begin)} reasoning SPACE)?"
    return f"start: {begin} answer\nreasoning{lazy}: TEXT {end}"
