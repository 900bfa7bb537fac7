"""`firstlight serve` with a stub in the engine's place, so that the handler alone is measured.

python -m scripts.bench.harness.stub_serve FOLDER PORT STEP_MS
"""

from __future__ import annotations

import sys
from pathlib import Path

from handler.listen import listen
from handler.server import serve
from handler.settings import ServerSettings
from scripts.bench.harness.stub_client import StubClient


def main() -> None:
    folder, port, step_ms = sys.argv[1:]
    with listen("127.0.0.1", int(port)) as sock:
        client = StubClient(Path(folder), float(step_ms))
        client.spawn()
        settings = ServerSettings(engine=client.config, served_model_names=("stub",))
        sys.exit(serve(client, settings, sock))


if __name__ == "__main__":
    main()
