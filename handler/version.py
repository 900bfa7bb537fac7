"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str | None:
    """The installed version; None where it runs from its source folder without being installed."""
    try:
        return version("firstlight")
    except PackageNotFoundError:
        return None
