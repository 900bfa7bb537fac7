"""How the text of a flag or an environment variable becomes a value."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable

_TRUE = {"1", "true", "yes", "on"}
_FALSE = {"0", "false", "no", "off"}
_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def boolean(text: str) -> bool:
    """`True`, `False` and their usual spellings."""
    lowered = text.strip().lower()
    if lowered in _TRUE:
        return True
    if lowered in _FALSE:
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def count(text: str) -> int:
    """A whole number above zero; `4k` is 4,000 and `4K` is 4,096, as users of vLLM write it."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)", text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number such as 4096, 4k (4,000) or 4K (4,096)")
    digits, suffix = match.groups()
    value = float(digits) * (_DECIMAL | _BINARY)[suffix] if suffix else float(digits)
    if value != int(value) or value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above zero")
    return int(value)


def whole(text: str) -> int:
    """Any whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number") from None


def port(text: str) -> int:
    """A TCP port, or 0 for any free one."""
    value = whole(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(
            f"{value} is no port: it must lie between 0 (any free port) and 65535"
        )
    return value


def fraction(text: str) -> float:
    """A number above 0 and at most 1."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} does not lie between 0 and 1")
    return value


def number(low: float, high: float) -> Callable[[str], float]:
    """A parser of numbers from `low` to `high`, both included."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not a number") from None
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} does not lie between {low:g} and {high:g}")
        return value

    return parse


def choice(*allowed: str) -> Callable[[str], str]:
    """A parser of one word out of `allowed`."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(allowed)}")
        return text

    return parse


def origins(text: str) -> tuple[str, ...]:
    """Origins of web pages (`https://host:port`), as a JSON list or one alone; `*` is any."""
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [text]
    except ValueError:
        found = [None]
    for origin in found:
        if not isinstance(origin, str) or not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+", origin):
            raise argparse.ArgumentTypeError(f"'{text}' is no origin such as https://app.example, and not *")
    return tuple(found)


def optional(text: str) -> str | None:
    """Any text; the word `None` means that nothing is set."""
    return None if text in ("None", "none", "") else text
