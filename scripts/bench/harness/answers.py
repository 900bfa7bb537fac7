"""Reference answers: without the right tokens a speed means nothing.

A reference is made once by another implementation (`scripts/bench/reference.py`: transformers) and
holds, beside each greedy token, how far it was ahead of the second likeliest one, in standard
deviations of the logits. Right is an answer that agrees as far as that lead is larger than what number
formats can change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness import BenchError
from harness.checkpoint import fingerprint

BUNDLED = Path(__file__).resolve().parents[1] / "references"
# How small a lead may turn into a tie: at 16 bits, and with weights of 4 bits.
TIE, LOSSY_TIE = 0.05, 0.25
# Fewer tokens than this would be right by chance.
_FEWEST = 2


@dataclass(frozen=True)
class Reference:
    """One prompt and its greedy answer, token by token: ids, pieces of text, and by how much each leads the
    next best, in standard deviations of the logits. A lead below `tie` proves nothing at 16 bits."""

    name: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    pieces: list[str]
    leads: list[float]
    tie: float = TIE

    def certain(self, lossy: bool = False) -> int:
        """How many tokens of an answer must be these."""
        tie = max(self.tie, LOSSY_TIE) if lossy else self.tie
        close = (place for place, lead in enumerate(self.leads) if lead < tie)
        return next(close, len(self.leads))

    def check_text(self, who: str, text: str, tokens: int, lossy: bool = False) -> None:
        """Raise BenchError unless an answer of `tokens` tokens begins as it must."""
        expected = "".join(self.pieces[: min(tokens, self.certain(lossy))]).rstrip("\ufffd")
        if not text.startswith(expected):
            raise BenchError(
                f"{who} answers the reference prompt {self.name!r} wrongly:\n"
                f"  expected {expected!r}\n  got      {text[: len(expected) + 40]!r}"
            )

    def check_ids(self, who: str, token_ids: Sequence[int]) -> None:
        """Raise BenchError unless an answer begins with the tokens that it must begin with."""
        expected = self.token_ids[: min(len(token_ids), self.certain())]
        if list(token_ids[: len(expected)]) != expected:
            raise BenchError(
                f"{who} answers the reference prompt {self.name!r} wrongly:\n"
                f"  expected {expected}\n  got      {list(token_ids[: len(expected)])}"
            )


@dataclass(frozen=True)
class References:
    """The references of one model: `explain`, a question, and `count`, of exactly 128 tokens."""

    fingerprint: str
    made_by: str
    explain: Reference
    count: Reference

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self), separators=(",", ":")) + "\n", encoding="utf-8")


def read(path: Path) -> References:
    """The references in a file that `References.write` wrote."""
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        explain, count = (Reference(**data.pop(name)) for name in ("explain", "count"))
        return References(**data, explain=explain, count=count)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} cannot be read as reference answers: {error!r}") from None


def find(folder: Path) -> References:
    """The references of the model in a folder: beside it, or among the bundled ones.

    Raises BenchError if there are none, if they were made with other weights, or if they prove nothing.
    """
    mark = fingerprint(folder)
    for path in (folder / "reference.json", *sorted(BUNDLED.glob("*.json"))):
        if not path.exists():
            continue
        references = read(path)
        if references.fingerprint == mark:
            for reference in (references.explain, references.count):
                if reference.certain() < _FEWEST:
                    raise BenchError(f"{path}: the answer to {reference.name!r} begins with a tie")
            return references
    raise BenchError(
        f"there are no reference answers for {folder}, so no figure could be trusted. Make them with\n"
        f"  python scripts/bench/reference.py --model {folder}"
    )
