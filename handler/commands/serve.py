"""`firstlight serve`: the socket listens and the engine starts before the server is even imported."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from handler.flags import ENGINE_FLAGS, MODEL_FLAGS, SERVER_FLAGS, add_flags, add_model, with_model
from handler.listen import listen, url_of
from handler.settings import read_settings
from runtime import marks
from runtime.client import EngineClient

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
    settings = read_settings(with_model(given))
    sock = listen(settings.host, settings.port)
    client = EngineClient(settings.engine)
    client.spawn()
    client.marks["listen"] = marks.since_exec()
    print(
        f"firstlight: serving {settings.served_model_names[0]} on {url_of(sock)}", file=sys.stderr, flush=True
    )

    # Imported only now: the engine is already on its way and clients can connect meanwhile.
    from handler.server import serve

    return serve(client, settings, sock)
