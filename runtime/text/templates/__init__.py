"""Chat templates for families whose repositories hold none, each by its own family's code."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def shipped_names() -> list[str]:
    """The names of the templates that come along."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def shipped_template(name: str) -> str:
    """The source of one of them."""
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
