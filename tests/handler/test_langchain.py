"""langchain's standard tests of a chat model, with its own OpenAI client against this server.

They skip what a text model has no part in: images, sound and PDF files, as input and as results
of tools (`test_image_inputs`, `test_audio_inputs`, `test_pdf_inputs`, `test_image_tool_message`,
`test_pdf_tool_message`); the message format of another vendor (`test_anthropic_inputs`); and a
measurement against recorded answers (`test_stream_time`).
"""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_openai import ChatOpenAI
from langchain_tests.integration_tests import ChatModelIntegrationTests

from tests.handler import scripted
from tests.handler.conftest import MODEL, Server, starter

for _member in vars(ChatModelIntegrationTests).values():
    if inspect.iscoroutinefunction(_member):
        # One event loop for all: the client keeps its connections from test to test.
        pytest.mark.asyncio(loop_scope="module")(_member)


@pytest.fixture(scope="module")
def scripted_server(tiny_model: Path) -> Iterator[Server]:
    with starter(tiny_model) as make:
        yield make(prepare=scripted.prepare, chat_template=scripted.TEMPLATE)


class TestChatModel(ChatModelIntegrationTests):
    @pytest.fixture(autouse=True)
    def _address(self, scripted_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_BASE", f"{scripted_server.url}/v1")
        monkeypatch.setenv("OPENAI_API_KEY", "none")

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatOpenAI

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": MODEL, "stream_usage": True, "max_retries": 0}

    @property
    def supports_json_mode(self) -> bool:
        return True

    @property
    def supported_usage_metadata_details(self) -> dict[Any, list[Any]]:
        details = ["cache_read_input", "reasoning_output"]
        return {"invoke": details, "stream": details}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        return self._ask("Hello", stream)

    def invoke_with_reasoning_output(self, *, stream: bool = False) -> AIMessage:
        message = self._ask("Think about it.", stream)
        assert message.usage_metadata is not None
        # From the end of the tag in front to almost the end of the one behind; a token is a byte here.
        told = message.usage_metadata["output_token_details"]["reasoning"]
        assert told == len(f"{scripted.THOUGHT}</think>")
        return message

    def _ask(self, question: str, stream: bool) -> AIMessage:
        model = self.chat_model_class(**self.chat_model_params)
        if not stream:
            return model.invoke(question)
        first, *others = model.stream(question)
        return functools.reduce(operator.add, others, first)

    @property
    def model_override_value(self) -> str:
        return "alias"
