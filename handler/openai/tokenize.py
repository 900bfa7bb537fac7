"""POST /tokenize and /detokenize and GET /tokenizer_info, in vLLM's shape."""

from __future__ import annotations

import sys
import traceback
from contextlib import nullcontext
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from handler.asgi import ClientGone, send_bytes, send_error
from handler.limits import decode_json, read_body
from handler.openai.errors import ApiError, as_api_error
from handler.openai.messages import as_turns
from handler.openai.prompts import encode_messages, encode_prompts
from handler.openai.reply.formats import call_format
from handler.openai.schema import DetokenizeRequest, TokenizeRequest
from handler.openai.strict import parse
from handler.openai.tools import offered
from handler.service import Service
from handler.textroom import off_loop
from runtime.errors import FirstlightError
from runtime.text.sampling import check_ids


class _JsonEndpoint:
    """An ASGI application that answers a JSON body with a JSON body."""

    def __init__(self, service: Service) -> None:
        self.service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.service.activity.request():
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            raw = await read_body(scope, receive, self.service.settings.max_request_bytes)
            # The text side is there for good once the engine was started for the first time.
            is_cold = self.service.client.state == "cold"
            async with self.service.place() if is_cold else nullcontext():
                answer = msgspec.json.encode(await self.answer(await decode_json(raw)))
        except ClientGone:
            return
        except Exception as error:
            if not isinstance(error, FirstlightError):
                traceback.print_exception(error, file=sys.stderr)
            await send_error(send, as_api_error(error))
            return
        await send_bytes(send, 200, answer)

    async def answer(self, body: Any) -> dict[str, Any]:
        """The answer to a decoded body."""
        raise NotImplementedError


class Tokenize(_JsonEndpoint):
    """A prompt's or a conversation's token ids."""

    async def answer(self, body: Any) -> dict[str, Any]:
        request = parse(TokenizeRequest, body)
        self.service.check_model(request.model)
        if (request.prompt is None) == (request.messages is None):
            raise ApiError(400, "Give either 'prompt' or 'messages'.", param="prompt", code="invalid_value")
        text = await self.service.text.ready()
        special = request.add_special_tokens
        if request.messages is not None:
            ids = await encode_messages(
                text,
                as_turns(request.messages),
                tools=offered([tool.function for tool in request.tools], "auto").told,
                call_format=call_format(self.service.settings.tool_call_parser, text),
                variables=request.chat_template_kwargs,
                add_generation_prompt=request.add_generation_prompt,
                continue_final_message=request.continue_final_message,
                add_special_tokens=bool(special),
            )
        else:
            (ids,) = await encode_prompts(
                text, [request.prompt or ""], special is not False, allow_empty=True
            )
        strings = [text.tokenizer.token_text(token_id) for token_id in ids]
        return {
            "count": len(ids),
            "max_model_len": text.max_model_len,
            "tokens": ids,
            "token_strs": strings if request.return_token_strs else None,
        }


class Detokenize(_JsonEndpoint):
    """The text of token ids."""

    async def answer(self, body: Any) -> dict[str, Any]:
        request = parse(DetokenizeRequest, body)
        self.service.check_model(request.model)
        text = await self.service.text.ready()
        tokens = request.tokens
        check_ids(tokens, text.vocab_size, "tokens")
        prompt = await off_loop(len(tokens), lambda: text.tokenizer.decode(tokens, skip_special_tokens=False))
        return {"prompt": prompt}


async def show_tokenizer(request: Request) -> Response:
    """GET /tokenizer_info: the special tokens, the chat template and the context length of the model."""
    service: Service = request.app.state.service
    text = await service.text.ready()
    found = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": None,
        **text.tokenizer.special_tokens,
        "chat_template": text.template.source if text.template is not None else None,
        "model_max_length": text.max_model_len,
    }
    return JSONResponse(found)
