"""`firstlight serve`: the socket listens and the engine starts before the server is even imported."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

from handler import ahead
from handler.flags import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    ENGINE_FLAGS,
    HOST,
    MODEL_FLAGS,
    PORT,
    SERVER_FLAGS,
    add_flags,
    add_model,
    collect,
    with_model,
)
from handler.listen import listen, url_of
from runtime import marks

USAGE = "[MODEL] [FLAGS]"
DESCRIPTION = """\
Serve one model over HTTP, in OpenAI's format: /v1/chat/completions, /v1/completions, /v1/models.
The server listens at once and holds requests while the model is still being loaded.
A page to chat in the browser is at /.
"""

EPILOG = """\
examples:
  firstlight serve
      the default model, on http://127.0.0.1:8000
  firstlight serve Qwen/Qwen2.5-0.5B-Instruct --max-model-len 4096 --port 8080
      a model from the Hugging Face Hub
  firstlight serve s3://my-bucket/my-model --served-model-name assistant --api-key "$KEY"
      a model from S3, under a name of your choice, for those who hold the key

Every flag can also be set in the environment: --max-model-len is FIRSTLIGHT_MAX_MODEL_LEN.
PORT, HOST, MODEL_ID and HF_MODEL_ID work too, as hosting platforms set them.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_model(parser)
    add_flags(parser, "model", MODEL_FLAGS)
    add_flags(parser, "engine", ENGINE_FLAGS)
    add_flags(parser, "server", SERVER_FLAGS)


def run(given: dict[str, Any]) -> int:
    """Serve until a signal ends it. The exit status is 1 if the engine cannot start."""
    # Until the server is there, which drains first, there is nobody to finish anything for. Not by an
    # exception: some extension modules crash when one interrupts their import.
    signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
    values = with_model(given)
    with listen(*address(values)) as sock:
        listening = marks.since_exec()

        # Clients can connect from here on. The engine takes longest: its process is there already, and is
        # told what to serve as soon as that is known. What serves requests comes last.
        from handler.settings import read_others, read_settings
        from runtime.processes import start_engine

        settings = read_settings(values)
        others = read_others(values)
        started = start_engine(settings.engine, ahead.taken())

        from runtime.client import EngineClient

        client = EngineClient(settings.engine)
        client.spawn(started)
        client.marks["listen"] = listening
        name = settings.served_model_names[0]
        url = url_of(sock)
        print(
            f"firstlight: serving {name} on {url} (chat there in a browser; the API is {url}/v1)",
            file=sys.stderr,
            flush=True,
        )

        from handler.server import serve

        return serve(client, settings, sock, others)


def address(given: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> tuple[str, int]:
    """Host and port to listen on: from the flags, else the environment, else the default."""
    values = collect(given, (HOST, PORT), environ)
    return values.get("host", DEFAULT_HOST), values.get("port", DEFAULT_PORT)
