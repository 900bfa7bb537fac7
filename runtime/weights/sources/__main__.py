"""The fetching process: `python -m runtime.weights.sources REFERENCE CACHE_DIR`, started by `arrival`.

It says on its output, a JSON line each, how far it is, and ends when its input does.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import msgspec

from runtime.errors import FirstlightError
from runtime.weights.sources import FetchProgress, SourceError, fetch_reference, parse_reference
from runtime.weights.sources.arrival import Came, Done, Failed, Said


def main(arguments: list[str]) -> int:
    """Fetch what REFERENCE, as `Reference.url` has it, stands for."""
    reference, cache_dir = arguments
    threading.Thread(target=_end_with_input, daemon=True).start()
    try:
        directory = fetch_reference(parse_reference(reference), Path(cache_dir), _report)
    except SourceError as error:
        _say(Failed(error.kind, str(error)))
    except FirstlightError as error:
        _say(Failed(None, str(error)))
    else:
        _say(Done(str(directory)))
    return 0


def _report(progress: FetchProgress) -> None:
    directory = None if progress.directory is None else str(progress.directory)
    _say(Came(progress.bytes_done, progress.bytes_total, progress.phase, directory))


def _say(what: Said) -> None:
    os.write(sys.stdout.fileno(), msgspec.json.encode(what) + b"\n")


def _end_with_input() -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    status = main(sys.argv[1:])
    # Nothing is left that matters, and whoever waits for the end wants it now.
    os._exit(status)
