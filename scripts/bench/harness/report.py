"""One report: the machine, the tables that are printed, and the same figures as JSON."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import BenchError, machine, table

if TYPE_CHECKING:
    from harness.servers import Server


class Report:
    """Collects what a benchmark found. Nothing of it is shown before `finish`, and that is only reached
    when every answer was right."""

    def __init__(self, claim: str, options: argparse.Namespace) -> None:
        machine.warn_if_busy()
        self._claim = claim
        self._json: Path | None = options.json
        self._tables: list[str] = []
        self.data: dict[str, Any] = {
            "claim": claim,
            "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": machine.facts(),
            "options": {name: _plain(value) for name, value in vars(options).items()},
        }

    def add_table(self, title: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self._tables.append(f"{title}\n{table.render(headers, rows)}")

    def add_note(self, text: str) -> None:
        self._tables.append(text)

    def add_servers(self, servers: Sequence[Server]) -> None:
        """Note how each server is started, and which version of it."""
        self.data["servers"] = {
            server.name: {"command": server.command, "version": server.version} for server in servers
        }

    def finish(self) -> None:
        """Print the tables and write the JSON file that was asked for."""
        facts = self.data["machine"]
        place = ", ".join([facts["processor"], f"{facts['cores']} cores", facts["memory"], *facts["gpus"]])
        print(f"{self._claim}\n{place}; load average before: {facts['load_average']:.2f}")
        for text in self._tables:
            print(f"\n{text}")
        if self._json is not None:
            self._json.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is a script's docstring, with the flags that every report has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure there as JSON")
    return parser


def progress(text: str) -> None:
    """Say on stderr what is being measured now."""
    print(f"· {text}", file=sys.stderr, flush=True)


def run(main: Callable[[], None]) -> None:
    """Run a benchmark's `main`; why there is no report goes to stderr, and the exit status is 1.

    When it is told to end (by `timeout`, for example), it ends the servers that it has started first.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        main()
    except BenchError as error:
        sys.exit(f"no report: {error}")


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
