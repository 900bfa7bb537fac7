"""A chat request between its fields and the engine: the prompt it makes, and how its replies are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec.json import encode

from handler.openai.errors import ApiError
from handler.openai.prompts import encode_messages, template_variables
from handler.openai.reply.call_grammar import CallRules
from handler.openai.reply.formats import CallFormat, call_format, reasoning_tags
from handler.openai.reply.grammar import Thinking, reply_grammar
from handler.openai.reply.reader import ReplyReader
from handler.openai.reply.reasoning import Reasoning
from handler.openai.reply.said import Said
from handler.openai.schema import ChatOptions
from handler.openai.structured import MAX_GRAMMAR_BYTES, Form
from handler.openai.tools import Offer
from handler.service import Service
from handler.textroom import off_loop
from runtime.protocol import Grammar, Submit
from runtime.text.bans import bans
from runtime.text.grammar import literal
from runtime.text.model_text import ModelText
from runtime.text.sampling import answer_room, sampling_params, truncated
from runtime.text.sequence import Sequence, TextDelta

# As much of a prompt's end as can hold the tag that opens the reasoning.
_PROMPT_END = 16


@dataclass
class Call:
    """One tool call of a reply; `arguments` is JSON text as far as it has come."""

    id: str
    name: str
    arguments: str = ""


class Reply:
    """One choice's reply: what its text says, piece by piece and in all."""

    def __init__(self, reader: ReplyReader, call_format: CallFormat | None, show_reasoning: bool) -> None:
        self._reader = reader
        self._format = call_format
        self._show_reasoning = show_reasoning
        self.reasoning_tokens = 0
        self.calls: list[Call] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []

    @property
    def reasoning(self) -> str:
        """The reasoning as far as it has come."""
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        """The text beside reasoning and calls as far as it has come."""
        return "".join(self._content)

    @property
    def can_reason(self) -> bool:
        """Whether the model is one that marks its reasoning."""
        return self._reader.can_reason

    @property
    def reasons(self) -> bool:
        """Whether it is still reasoning."""
        return self._reader.reasons

    def read(self, delta: TextDelta) -> Said:
        """What a piece of the sequence adds."""
        said = self._reader.push(delta.text)
        if self.reasons:
            self.reasoning_tokens += len(delta.token_ids)
        if delta.finish_reason is not None:
            rest = self._reader.flush()
            said.reasoning += rest.reasoning
            said.content += rest.content
            for piece in rest.calls:
                said.call(piece)
        if not self._show_reasoning:
            said.reasoning = ""
        self._reasoning.append(said.reasoning)
        self._content.append(said.content)
        for piece in said.calls:
            if piece.name is not None:
                assert self._format is not None
                self.calls.append(Call(self._format.new_id(), piece.name))
            self.calls[-1].arguments += piece.arguments
        return said

    def finish_reason(self, delta: TextDelta) -> str | None:
        """Why the sequence ended: it called tools, unless it was cut off on the way."""
        return "tool_calls" if self.calls and delta.finish_reason == "stop" else delta.finish_reason


class Conversation:
    """One chat request on the engine's side. After `prepare`, one sequence and one reply for each choice.

    `turns` are as chat templates take them; `form` is what the content must look like; `name` is the
    beginning of the sequences' names.
    """

    def __init__(
        self,
        service: Service,
        request: ChatOptions,
        turns: list[dict[str, Any]],
        offer: Offer,
        form: Form | None,
        name: str,
    ) -> None:
        self.service = service
        self.request = request
        self.turns = turns
        self.offer = offer
        self.form = form
        self.name = name
        self.sequences: list[Sequence] = []
        self.replies: list[Reply] = []

    async def prepare(self) -> ModelText:
        """Render and tokenize the messages. Raises `ApiError` or `RequestError` for what cannot be."""
        request = self.request
        text = await self.service.text.ready()
        settings = self.service.settings
        calls = call_format(settings.tool_call_parser, text)
        tags = reasoning_tags(settings.reasoning_parser, text)
        effort = request.reasoning_effort
        prompt = await encode_messages(
            text,
            self.turns,
            tools=self.offer.told,
            call_format=calls,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            add_special_tokens=request.add_special_tokens,
            variables=template_variables(text, request.chat_template_kwargs, request.documents, effort),
        )
        asked = request.max_completion_tokens or request.max_tokens
        prompt = truncated(prompt, request.truncate_prompt_tokens, asked, text.max_model_len)
        thinking = _thinking(text, tags, prompt)
        grammar = await self._grammar(text, calls, thinking)
        limit = "max_completion_tokens" if request.max_completion_tokens else "max_tokens"
        room = answer_room(len(prompt), asked, text.max_model_len, "messages", limit)
        sampling = sampling_params(
            request,
            text,
            max_tokens=room if asked else min(room, text.defaults.get("max_tokens", room)),
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
            banned=bans(text.tokenizer, request.bad_words),
            grammar=grammar,
        )
        reads_calls = calls if calls is not None and (self.offer.told or calls.always) else None
        shown = _ids(text, (*(reads_calls.tags if reads_calls else ()), *(tags or ())))
        for place in range(request.n):
            seed = None if sampling.seed is None else (sampling.seed + place) % (1 << 63)
            submit = Submit(
                request_id=f"{self.name}-{place}",
                prompt_token_ids=prompt,
                sampling=msgspec.structs.replace(sampling, seed=seed),
                cache_salt=request.cache_salt or "",
                priority=request.priority,
            )
            sequence = Sequence(
                text.tokenizer, submit, request, place, counts_prompt=place == 0, shown_ids=shown
            )
            self.sequences.append(sequence)
            self.replies.append(self._reply(reads_calls, thinking))
        return text

    async def _grammar(
        self, text: ModelText, calls: CallFormat | None, thinking: Thinking | None
    ) -> Grammar | None:
        """What holds the replies to what the request wants of them, if anything has to."""
        offer, form = self.offer, self.form
        if form is None and not offer.held:
            return None
        field = "tool_choice" if offer.required else "tools" if form is None else form.field
        write = None if calls is None else calls.grammar
        if write is None and offer.held:
            message = f"'{field}' cannot be met: with --tool-call-parser none, no calls are read."
            raise ApiError(400, message, param=field, code="unsupported_value")
        size = sum(len(encode(function.schema)) for function in offer.callable)
        if size > MAX_GRAMMAR_BYTES:
            message = (
                f"'tools' take {size} bytes of schemas; replies can be held to {MAX_GRAMMAR_BYTES} at most."
            )
            raise ApiError(400, message, param="tools", code="invalid_value")
        content = None if form is None or offer.required else await form.part()

        def tag(name: str) -> str:
            return _lark(text, name)

        def build() -> str:
            several = self.request.parallel_tool_calls and not offer.named
            rules = None
            if write is not None and offer.callable:
                rules = write(CallRules(offer.callable, several, tag))
            return reply_grammar(content, rules, must_call=offer.required, thinking=thinking, tag=tag)

        return Grammar(await off_loop(size, build), field)

    def _reply(self, calls: CallFormat | None, thinking: Thinking | None) -> Reply:
        reasoning = None
        if thinking is not None:
            reasoning = Reasoning(thinking.begin, thinking.end, inside=thinking.inside)
        names = {tool["function"]["name"] for tool in self.offer.told}
        reader = ReplyReader(
            reasoning,
            calls.reader(names) if calls is not None else None,
            parallel=self.request.parallel_tool_calls,
        )
        return Reply(reader, calls, self.request.include_reasoning)


def _ids(text: ModelText, tokens: tuple[str, ...]) -> frozenset[int]:
    found = (text.tokenizer.id_of(token) for token in tokens)
    return frozenset(token_id for token_id in found if token_id is not None)


def _thinking(text: ModelText, tags: tuple[str, str] | None, prompt: list[int]) -> Thinking | None:
    if tags is None:
        return None
    end = text.tokenizer.decode(prompt[-_PROMPT_END:], skip_special_tokens=False)
    return Thinking(*tags, inside=end.rstrip().endswith(tags[0]))


def _lark(text: ModelText, tag: str) -> str:
    """A tag in a Lark grammar: plain text, unless it is one of the vocabulary's special tokens."""
    token_id = text.tokenizer.id_of(tag)
    return f"<[{token_id}]>" if token_id in text.tokenizer.special_ids else literal(tag)
