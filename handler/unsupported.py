"""Flags that are not ours: those that vLLM has and we do not, and slips of the pen."""

from __future__ import annotations

import difflib

# What users of vLLM's server may bring along, and what to do instead.
_KNOWN_ELSEWHERE = {
    "allow-credentials": "no cookies are used; --allowed-origins is enough",
    "allowed-headers": "pages of --allowed-origins may send any; leave the flag out",
    "allowed-methods": "pages of --allowed-origins may GET and POST; leave the flag out",
    "async-scheduling": "scheduling always overlaps the device's work; leave the flag out",
    "chat-template-content-format": "the format is found from the template; leave the flag out",
    "compilation-config": "nothing is compiled at start; leave the flag out",
    "config-format": "the format is found from the files; leave the flag out",
    "cpu-offload-gb": "weights are not offloaded; choose a smaller model or more GPUs",
    "data-parallel-size": "start one server for each replica",
    "disable-log-requests": "prompts are never logged; leave the flag out, or use --no-access-log",
    "disable-log-stats": "statistics are served at /metrics and not logged; leave the flag out",
    "disable-uvicorn-access-log": "use --no-access-log",
    "distributed-executor-backend": "ranks are plain processes on one host; leave the flag out",
    "enable-lora": "adapters are not supported yet",
    "enable-sleep-mode": "sleeping needs no flag: use POST /sleep or --idle-sleep-s; leave the flag out",
    "enable-reasoning": "reasoning is always looked for; leave the flag out",
    "enable-log-requests": "prompts are never logged; --access-log has a line for each request without them",
    "enforce-eager": "the first tokens always run eagerly; leave the flag out",
    "generation-config": "the model's generation_config.json is used; put other defaults into models.yaml",
    "guided-decoding-backend": "llguidance is the only one; leave the flag out",
    "hf-overrides": "the model's config is used as it is",
    "hf-token": "set the environment variable HF_TOKEN",
    "kv-cache-dtype": "the KV cache has the model's own dtype; leave the flag out",
    "limit-mm-per-prompt": "models here take text alone; leave the flag out",
    "load-format": "the format is found from the files; leave the flag out",
    "lora-modules": "adapters are not supported yet",
    "max-log-len": "prompts are never logged; leave the flag out",
    "max-logprobs": "up to 20 log-probabilities can be asked for; leave the flag out",
    "max-seq-len-to-capture": "graphs are captured for decoding alone; leave the flag out",
    "middleware": "put a proxy in front of the server",
    "num-gpu-blocks-override": "use --kv-cache-memory-bytes",
    "num-scheduler-steps": "scheduling always overlaps the device's work; leave the flag out",
    "override-generation-config": "put other defaults into models.yaml, under `generation`",
    "pipeline-parallel-size": "use --tensor-parallel-size",
    "collect-detailed-traces": "traces hold all that is known; leave the flag out",
    "response-role": "answers always have the role assistant",
    "rope-scaling": "the model's own config.json is used",
    "root-path": "let the proxy strip the prefix",
    "runner": "only text generation is served; leave the flag out",
    "speculative-config": "speculative decoding is not supported",
    "ssl-certfile": "put a proxy that ends TLS in front of the server",
    "ssl-keyfile": "put a proxy that ends TLS in front of the server",
    "structured-outputs-config": "structured outputs need no settings; leave the flag out",
    "swap-space": "preempted sequences are computed again, not swapped; leave the flag out",
    "task": "only text generation is served; leave the flag out",
    "tokenizer": "the tokenizer comes with the model; leave the flag out",
    "tokenizer-mode": "the tokenizer's format is found from its files; leave the flag out",
    "uvicorn-log-level": "the server logs its start, requests and failures; leave the flag out",
}


def explain(argument: str, known: list[str]) -> str:
    """Why `argument` is refused, in one sentence. `known` holds the names of the flags that exist."""
    if not argument.startswith("-"):
        return f"'{argument}' is one word too many; put a text of several words in quotes"
    name = argument.lstrip("-").partition("=")[0]
    if name in _KNOWN_ELSEWHERE:
        return f"--{name} is a flag of vLLM's that firstlight does not have: {_KNOWN_ELSEWHERE[name]}"
    close = difflib.get_close_matches(name, known, 1, 0.7)
    hint = f"; did you mean --{close[0]}?" if close else "; see --help"
    return f"there is no flag --{name}{hint}"
