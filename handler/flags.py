"""The flags of the commands: name, meaning, environment variables. Spelling and meaning are vLLM's."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from handler import values
from runtime.errors import FirstlightError


class UsageError(FirstlightError):
    """A flag or an environment variable that cannot be right."""


@dataclass(frozen=True)
class Flag:
    """One setting. Its environment variable is `FIRSTLIGHT_<NAME>`; `env` lists further ones.

    `many` takes several values (in the environment: separated by commas). A `switch` stands without a
    value and means true; an `either` may stand without one, and has a `--no-` form.
    """

    name: str
    parse: Callable[[str], Any]
    help: str
    metavar: str | None = None
    env: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    many: bool = False
    switch: bool = False
    either: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")

    @property
    def variables(self) -> tuple[str, ...]:
        """The environment variables that set it, the strongest first."""
        return (f"FIRSTLIGHT_{self.key.upper()}", *self.env)


MODEL = Flag(
    "model",
    str,
    "what to run: an id from models.yaml, a Hub id (org/name), hf://org/name@revision, s3://bucket/prefix, "
    "wheel://distribution, or a local folder. Default: the default model of models.yaml.",
    env=("MODEL_ID", "HF_MODEL_ID"),
)
CATALOGUE = Flag("catalogue", str, "the file that lists the models (default: models.yaml).", "models.yaml")
DOWNLOAD_DIR = Flag(
    "download-dir",
    str,
    "where fetched and converted models are kept (default: firstlight in $XDG_CACHE_HOME or ~/.cache).",
    "FOLDER",
)
CACHE = Flag(
    "cache",
    values.boolean,
    "whether fetched and converted models are kept on the disk (default: yes). With --no-cache they are in "
    "memory (/dev/shm) until the server ends, and nothing is written to a disk.",
    either=True,
)
REVISION = Flag("revision", str, "the commit, tag or branch to take the model from.")

MODEL_FLAGS = (
    MODEL,
    CATALOGUE,
    DOWNLOAD_DIR,
    CACHE,
    REVISION,
    Flag(
        "max-model-len",
        values.count,
        "longest prompt and answer together, in tokens (default: from models.yaml, else the model's own "
        "config). 4k means 4,000, 4K means 4,096.",
        "TOKENS",
    ),
    Flag(
        "dtype",
        values.choice("auto", "half", "float16", "bfloat16", "float", "float32"),
        "number format to compute in: auto (the checkpoint's own where the device is good at it), float32, "
        "float16 or bfloat16.",
    ),
    Flag(
        "quantization",
        values.optional,
        "how the weights are quantised; None (the default) leaves it to the checkpoint.",
        "METHOD",
        short=("-q",),
    ),
    Flag(
        "chat-template", str, "a Jinja chat template, as a file or as text, in place of the model's.", "FILE"
    ),
    Flag(
        "trust-remote-code",
        values.boolean,
        "accepted so that existing commands work; code from a model's repository is never run.",
        switch=True,
    ),
    Flag("seed", values.whole, "seed of requests that bring none (default: 0).", "N"),
)

ENGINE_FLAGS = (
    Flag("device", values.choice("auto", "cuda", "cpu"), "where to run: auto, cuda or cpu (default: auto)."),
    Flag(
        "tensor-parallel-size",
        values.count,
        "how many GPUs share one model (default: from models.yaml).",
        "N",
        short=("-tp",),
    ),
    Flag(
        "gpu-memory-utilization",
        values.fraction,
        "share of the device's memory to use for weights and KV cache (default: 0.9).",
        "0..1",
    ),
    Flag("kv-cache-memory-bytes", values.count, "size of the KV cache, in place of a computed one.", "BYTES"),
    Flag("block-size", values.count, "tokens in one block of the paged KV cache (default: 16).", "TOKENS"),
    Flag("max-num-seqs", values.count, "most sequences in one step (default: 256).", "N"),
    Flag(
        "max-num-batched-tokens",
        values.count,
        "most tokens computed in one step (default: 8192 on a GPU, else 512; without chunked prefill at "
        "least --max-model-len).",
        "TOKENS",
    ),
    Flag(
        "enable-chunked-prefill",
        values.boolean,
        "split long prompts over several steps, so that running answers keep flowing (default: True).",
        "True|False",
        either=True,
    ),
    Flag(
        "enable-prefix-caching",
        values.boolean,
        "compute a prompt's beginning once for all requests that share it (default: True).",
        "True|False",
        either=True,
    ),
)

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
HOST = Flag(
    "host",
    str,
    f"address to listen on (default: {DEFAULT_HOST}, this machine only; 0.0.0.0 for all).",
    env=("HOST",),
)
PORT = Flag(
    "port", values.port, f"port to listen on; 0 takes a free one (default: {DEFAULT_PORT}).", env=("PORT",)
)
SERVER_FLAGS = (
    Flag(
        "served-model-name",
        str,
        "names that requests may use for the model; answers carry the first (default: the --model value).",
        "NAME",
        many=True,
    ),
    HOST,
    PORT,
    Flag(
        "api-key",
        str,
        "keys of which clients must send one as `Authorization: Bearer KEY`. The environment variable keeps "
        "them out of the process list. Default: no key is asked for.",
        "KEY",
        env=("VLLM_API_KEY",),  # who moves here with it set must not stand open
        many=True,
    ),
    Flag(
        "allowed-origins",
        values.origins,
        "web pages, by origin, whose scripts may call this server: https://app.example, a JSON list of them, "
        "or * for all (default: none but the server's own).",
        "ORIGIN",
        many=True,
    ),
    Flag("api-key-file", str, "a file with such keys, one a line.", "FILE"),
    Flag(
        "tool-call-parser",
        values.choice("auto", "none", "hermes", "llama3_json", "mistral", "internlm", "chatglm3", "json"),
        "how the model writes tool calls: hermes (Qwen too), llama3_json, mistral, internlm, chatglm3, json, "
        "or none (default: auto, which finds out from the chat template).",
        "FORMAT",
    ),
    Flag(
        "reasoning-parser",
        values.choice("auto", "none", "deepseek_r1", "qwen3", "mistral"),
        "how the model marks its reasoning: deepseek_r1, qwen3, mistral or none (default: auto).",
        "FORMAT",
    ),
    Flag(
        "enable-auto-tool-choice",
        values.boolean,
        "accepted so that existing commands work; tool calls are always looked for.",
        switch=True,
    ),
    Flag(
        "max-queue",
        values.count,
        "most sequences waiting for their first token; more get 429 (default: 1,024).",
        "N",
    ),
    Flag(
        "access-log",
        values.boolean,
        "write a line of JSON to stderr for each request, without its text (default: True).",
        "True|False",
        either=True,
    ),
    Flag(
        "otlp-traces-endpoint",
        str,
        "where to send OpenTelemetry traces by OTLP/HTTP: http://collector:4318/v1/traces. Needs the extra "
        "`otel`.",
        "URL",
        env=("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",),
    ),
    Flag("max-request-bytes", values.count, "largest request body (default: 6,000,000).", "BYTES"),
    Flag(
        "drain-seconds",
        values.number(0, 3600),
        "how long running answers may take to finish after SIGTERM (default: 30).",
        "S",
        short=("--grace",),
    ),
    Flag(
        "models",
        str,
        "further models, which requests may name and which are loaded when the first one does: named as for "
        "--model, or `all` for every entry of models.yaml.",
        "MODEL",
        many=True,
    ),
    Flag(
        "max-awake-models",
        values.count,
        "most of them that compute at a time; for another one, the one longest unused falls asleep (default: "
        "1). For more than one on a GPU, set --kv-cache-memory-bytes so that they fit.",
        "N",
    ),
    Flag(
        "max-loaded-models",
        values.count,
        "most of them that are awake or asleep; for another one, the one longest unused leaves (default: 4).",
        "N",
    ),
    Flag(
        "idle-sleep-s",
        values.number(0, 1e8),
        "after so many seconds without a request, sleep: free the device's memory and keep the weights in "
        "main memory, until a request comes (default: from models.yaml, else never, which is 0).",
        "S",
    ),
    Flag(
        "idle-exit-s",
        values.number(0, 1e8),
        "after so many seconds without a request, exit with status 0 (default: from models.yaml, else never, "
        "which is 0).",
        "S",
    ),
)

ANSWER_FLAGS = (
    Flag("max-tokens", values.count, "longest answer, in tokens.", "TOKENS"),
    Flag(
        "temperature",
        values.number(0, 2),
        "how freely to choose words: 0 always takes the likeliest.",
        "0..2",
    ),
    Flag(
        "top-p",
        values.number(0, 1),
        "choose only among the likeliest words with this share together.",
        "0..1",
    ),
)

SERVE_FLAGS = MODEL_FLAGS + ENGINE_FLAGS + SERVER_FLAGS


def add_flags(parser: argparse.ArgumentParser, title: str, flags: tuple[Flag, ...]) -> None:
    """Add `flags` to a parser under a heading. What is not given stays out of the namespace."""
    group = parser.add_argument_group(title)
    for flag in flags:
        _add(group, flag)


def _add(group: argparse._ArgumentGroup, flag: Flag) -> None:
    names = [f"--{flag.name}", *flag.short]
    common: dict[str, Any] = {"dest": flag.key, "help": flag.help, "default": argparse.SUPPRESS}
    if flag.switch:
        group.add_argument(*names, action="store_true", **common)
        return
    common |= {"type": flag.parse, "metavar": flag.metavar or flag.name.upper().replace("-", "_")}
    if flag.many:
        common |= {"nargs": "+", "action": "extend"}
    if flag.either:
        common |= {"nargs": "?", "const": True}
        negated: dict[str, Any] = {"dest": flag.key, "default": argparse.SUPPRESS, "help": argparse.SUPPRESS}
        group.add_argument(f"--no-{flag.name}", action="store_const", const=False, **negated)
    group.add_argument(*names, **common)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Let the model also be named without its flag."""
    parser.add_argument("model_name", nargs="?", metavar="MODEL", help="the same as --model MODEL")


def with_model(given: Mapping[str, Any]) -> dict[str, Any]:
    """The parsed command line with a model that was named without its flag put under the flag's name."""
    values = dict(given)
    name = values.pop("model_name", None)
    if name is not None and values.setdefault("model", name) != name:
        raise UsageError(f"two models are named: {name} and --model {values['model']}; give one")
    return values


# A pod beside a Kubernetes service named `firstlight` has FIRSTLIGHT_PORT=tcp://10.0.0.1:8000, for clients.
_SERVICE_LINKS = ("tcp://", "udp://", "sctp://")


def collect(
    given: Mapping[str, Any], flags: tuple[Flag, ...], environ: Mapping[str, str] = os.environ
) -> dict[str, Any]:
    """The values that a flag or, failing that, the environment sets; flags that nobody set are absent.

    Raises `UsageError` naming the environment variable whose text makes no sense.
    """
    found: dict[str, Any] = {}
    for flag in flags:
        if flag.key in given:
            found[flag.key] = given[flag.key]
            continue
        for variable in flag.variables:
            text = environ.get(variable, "")
            if text and not text.startswith(_SERVICE_LINKS):
                found[flag.key] = _from_environment(flag, variable, text)
                break
    return found


def _from_environment(flag: Flag, variable: str, text: str) -> Any:
    try:
        if flag.many:
            return [flag.parse(part.strip()) for part in text.split(",") if part.strip()]
        return flag.parse(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"environment variable {variable}: {error}") from None
