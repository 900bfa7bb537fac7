"""What the benchmarks share: clocks, statistics, tables, servers and the limits of the machine."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
"""The clone: what `python -m handler` and the imports of `runtime` are resolved against."""


class BenchError(Exception):
    """Why there is nothing to report: a server that does not start, a wrong answer, a missing peer."""
