"""The JSON schemas of what this server answers, by the names that its OpenAPI document gives them."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]

STRING: Schema = {"type": "string"}
INTEGER: Schema = {"type": "integer"}
COUNT: Schema = {"type": "integer", "minimum": 0}
NUMBER: Schema = {"type": "number"}
BOOLEAN: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
ANY_OBJECT: Schema = {"type": "object"}


def ref(name: str) -> Schema:
    """A schema that stands elsewhere in the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def array(items: Schema) -> Schema:
    """A list."""
    return {"type": "array", "items": items}


def one_of(*values: str) -> Schema:
    """One of these words."""
    return {"type": "string", "enum": list(values)}


def maybe(schema: Schema) -> Schema:
    """The schema or null."""
    return {"anyOf": [schema, NULL]}


def closed(fields: dict[str, Schema], **optional: Schema) -> Schema:
    """An object with exactly these fields; the `optional` ones may be missing."""
    return {
        "type": "object",
        "properties": {**fields, **optional},
        "required": list(fields),
        "additionalProperties": False,
    }


_FUNCTION = closed({"name": STRING, "arguments": STRING})
_TOKEN_SCORE = {"token": STRING, "logprob": NUMBER, "bytes": array(INTEGER)}
_SCORE = closed({**_TOKEN_SCORE, "top_logprobs": array(closed(_TOKEN_SCORE))})
_SCORES = closed({"content": array(_SCORE), "refusal": NULL})
_TEXT_SCORES = closed(
    {
        "tokens": array(STRING),
        "token_logprobs": array(maybe(NUMBER)),
        "top_logprobs": array(maybe({"type": "object", "additionalProperties": NUMBER})),
        "text_offset": array(COUNT),
    }
)
_PROMPT_SCORES = array(
    maybe(
        {
            "type": "object",
            "additionalProperties": closed({"logprob": NUMBER, "rank": INTEGER, "decoded_token": STRING}),
        }
    )
)
_STOP_REASON = {"anyOf": [STRING, INTEGER, NULL]}
_CHAT_END = maybe(one_of("stop", "length", "tool_calls"))
_HEAD = {"id": STRING, "created": INTEGER, "model": STRING, "system_fingerprint": NULL}
_ENVELOPE = {**_HEAD, "service_tier": NULL, "usage": ref("Usage")}

_CHAT_CHOICE = closed(
    {
        "index": COUNT,
        "message": closed(
            {
                "role": one_of("assistant"),
                "content": maybe(STRING),
                "refusal": NULL,
                "reasoning_content": maybe(STRING),
                "tool_calls": array(
                    closed({"id": STRING, "type": one_of("function"), "function": _FUNCTION})
                ),
            }
        ),
        "logprobs": maybe(_SCORES),
        "finish_reason": _CHAT_END,
        "stop_reason": _STOP_REASON,
    },
    token_ids=array(COUNT),
)
_CALL_PIECE = closed(
    {"index": COUNT, "function": closed({"arguments": STRING}, name=STRING)},
    id=STRING,
    type=one_of("function"),
)
_CHAT_PIECE = closed(
    {
        "index": COUNT,
        "delta": closed(
            {},
            role=one_of("assistant"),
            content=STRING,
            reasoning_content=STRING,
            tool_calls=array(_CALL_PIECE),
        ),
        "logprobs": maybe(_SCORES),
        "finish_reason": _CHAT_END,
    },
    stop_reason=_STOP_REASON,
    token_ids=array(COUNT),
)
_COMPLETION_CHOICE = closed(
    {
        "index": COUNT,
        "text": STRING,
        "logprobs": maybe(_TEXT_SCORES),
        "finish_reason": maybe(one_of("stop", "length")),
        "stop_reason": _STOP_REASON,
    },
    prompt_logprobs=maybe(_PROMPT_SCORES),
    prompt_token_ids=array(COUNT),
    token_ids=array(COUNT),
)
_ITEM_END = {"id": STRING, "status": one_of("in_progress", "completed", "incomplete")}
_OUTPUT_ITEM = {
    "anyOf": [
        closed(
            {
                **_ITEM_END,
                "type": one_of("message"),
                "role": one_of("assistant"),
                "content": array(
                    closed(
                        {
                            "type": one_of("output_text"),
                            "text": STRING,
                            "annotations": array(ANY_OBJECT),
                            "logprobs": array(ANY_OBJECT),
                        }
                    )
                ),
            }
        ),
        closed(
            {
                **_ITEM_END,
                "type": one_of("function_call"),
                "call_id": STRING,
                "name": STRING,
                "arguments": STRING,
            }
        ),
        closed(
            {
                **_ITEM_END,
                "type": one_of("reasoning"),
                "summary": array(ANY_OBJECT),
                "content": array(closed({"type": one_of("reasoning_text"), "text": STRING})),
            }
        ),
    ]
}

SCHEMAS: dict[str, Schema] = {
    "Error": closed(
        {"error": closed({"message": STRING, "type": STRING, "param": maybe(STRING), "code": maybe(STRING)})}
    ),
    "Usage": closed(
        {
            "prompt_tokens": COUNT,
            "completion_tokens": COUNT,
            "total_tokens": COUNT,
            "prompt_tokens_details": closed({"cached_tokens": COUNT}),
        },
        completion_tokens_details=closed({"reasoning_tokens": COUNT}),
    ),
    "ChatCompletion": closed(
        {
            **_ENVELOPE,
            "object": one_of("chat.completion"),
            "choices": array(_CHAT_CHOICE),
            "prompt_logprobs": maybe(_PROMPT_SCORES),
        },
        prompt_token_ids=array(COUNT),
    ),
    "ChatCompletionChunk": closed(
        {**_HEAD, "object": one_of("chat.completion.chunk"), "choices": array(_CHAT_PIECE)},
        prompt_token_ids=array(COUNT),
        usage=maybe(ref("Usage")),
    ),
    "Completion": closed(
        {**_ENVELOPE, "object": one_of("text_completion"), "choices": array(_COMPLETION_CHOICE)}
    ),
    "CompletionChunk": closed(
        {**_HEAD, "object": one_of("text_completion"), "choices": array(_COMPLETION_CHOICE)},
        usage=maybe(ref("Usage")),
    ),
    "Response": closed(
        {
            "id": STRING,
            "object": one_of("response"),
            "created_at": INTEGER,
            "status": one_of("in_progress", "completed", "incomplete", "failed"),
            "background": BOOLEAN,
            "error": maybe(closed({"code": STRING, "message": STRING})),
            "incomplete_details": maybe(closed({"reason": STRING})),
            "instructions": maybe(STRING),
            "max_output_tokens": maybe(COUNT),
            "metadata": ANY_OBJECT,
            "model": STRING,
            "output": array(_OUTPUT_ITEM),
            "parallel_tool_calls": BOOLEAN,
            "previous_response_id": NULL,
            "reasoning": closed({"effort": maybe(STRING), "summary": NULL}),
            "service_tier": STRING,
            "store": BOOLEAN,
            "temperature": maybe(NUMBER),
            "text": ANY_OBJECT,
            "tool_choice": {"anyOf": [STRING, ANY_OBJECT]},
            "tools": array(ANY_OBJECT),
            "top_logprobs": COUNT,
            "top_p": maybe(NUMBER),
            "truncation": STRING,
            "usage": maybe(
                closed(
                    {
                        "input_tokens": COUNT,
                        "input_tokens_details": closed({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
                        "output_tokens": COUNT,
                        "output_tokens_details": closed({"reasoning_tokens": COUNT}),
                        "total_tokens": COUNT,
                    }
                )
            ),
        }
    ),
    "ResponseEvent": {
        "type": "object",
        "properties": {"type": STRING, "sequence_number": COUNT, "response": ref("Response")},
        "required": ["type", "sequence_number"],
    },
    "Model": closed(
        {
            "id": STRING,
            "object": one_of("model"),
            "created": INTEGER,
            "owned_by": STRING,
            "root": STRING,
            "parent": NULL,
            "max_model_len": maybe(COUNT),
        }
    ),
    "ModelList": closed({"object": one_of("list"), "data": array(ref("Model"))}),
    "Tokens": closed(
        {
            "count": COUNT,
            "max_model_len": COUNT,
            "tokens": array(COUNT),
            "token_strs": maybe(array(STRING)),
        }
    ),
    "Text": closed({"prompt": STRING}),
    "Tokenizer": {
        "type": "object",
        "properties": {
            "bos_token": maybe(STRING),
            "eos_token": maybe(STRING),
            "chat_template": maybe(STRING),
            "model_max_length": COUNT,
        },
        "required": ["bos_token", "eos_token", "chat_template", "model_max_length"],
    },
    "Health": {"type": "object", "properties": {"state": STRING}},
    "Version": closed({"version": maybe(STRING)}),
    "Status": {
        "type": "object",
        "properties": {"state": STRING, "model": STRING, "marks": ANY_OBJECT, "queue": ANY_OBJECT},
        "required": ["state", "model", "marks", "queue"],
    },
}
