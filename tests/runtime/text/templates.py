"""Chat templates in the styles that models use, written for these tests."""

from __future__ import annotations

from typing import Any

CHATML = """\
{%- if messages[0].role != 'system' %}
{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' and message.tool_calls %}
        {{- '<|im_start|>assistant' }}
        {%- for call in message.tool_calls %}
            {{- '\\n<tool_call>\\n' ~ (call.function | tojson) ~ '\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if tools %}
{{- '<tools>' }}
{%- for tool in tools %}{{ '\\n' + tool | tojson(indent=2) }}{% endfor %}
{{- '</tools>\\n' }}
{%- endif %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{% endif %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(system='none', count=0) %}
{%- for message in messages if message.role != 'ignored' %}
    {%- set ns.count = ns.count + 1 %}
    {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' }}
    {%- if message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type != 'text' %}{% continue %}{% endif %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if tools is not none %}
    {%- for tool in tools %}{{ loop.index ~ ': ' ~ tool.function.name ~ '\\n' }}{% endfor %}
{%- endif %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system, rest = messages[0]['content'], messages[1:] %}
{%- else %}
    {%- set system, rest = none, messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must take turns: user, assistant, user, assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system %}
            {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}{{ ' ' + message['content'] | trim + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{% macro turn(role, content) -%}
<start_of_turn>{{ role }}
{{ content | trim }}<end_of_turn>
{% endmacro %}
{{ bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{{ turn('model' if message.role == 'assistant' else message.role, message.content) }}
{%- endfor %}
{%- if add_generation_prompt %}
<start_of_turn>model
{% endif %}
"""

# Name -> (template, the kind of tokenizer in conftest.py whose special tokens it writes).
TEMPLATES = {
    "chatml": (CHATML, "chatml"),
    "llama3": (LLAMA3, "llama3"),
    "mistral": (MISTRAL, "pieces"),
    "gemma": (GEMMA, "pieces"),
}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's the weather in <city> & région?",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def turns(*contents: str) -> list[dict[str, Any]]:
    """A conversation that the user begins, by turns."""
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]
