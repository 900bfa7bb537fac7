"""`firstlight chat`: a conversation in the terminal."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from handler.flags import ANSWER_FLAGS, ENGINE_FLAGS, MODEL_FLAGS, Flag, add_flags, add_model, with_model
from handler.session import Session, sampling_fields
from handler.settings import read_settings
from runtime.errors import FirstlightError

USAGE = "[MODEL] [FLAGS]"
DESCRIPTION = """\
Talk to a model in this terminal. It runs on this machine for as long as you talk; no server is needed.

In the conversation:
  /reset     forget what was said so far
  /exit      leave (so does Ctrl-D)
  Ctrl-C     stop the answer that is being written
"""

EPILOG = """\
examples:
  firstlight chat
  firstlight chat Qwen/Qwen2.5-0.5B-Instruct --system "Answer in rhymes." --temperature 0.7
"""

_SYSTEM = Flag("system", str, "what the model is told before the conversation begins.", "TEXT")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_model(parser)
    add_flags(parser, "answers", (_SYSTEM, *ANSWER_FLAGS))
    add_flags(parser, "model", MODEL_FLAGS)
    add_flags(parser, "engine", ENGINE_FLAGS)


def run(given: dict[str, Any]) -> int:
    """Talk until the user leaves."""
    settings = read_settings(with_model(given))
    with Session(settings) as session:
        name = settings.served_model_names[0]
        print(
            f"{name}. /reset forgets the conversation, /exit leaves, Ctrl-C stops an answer.", file=sys.stderr
        )
        _Conversation(session, given).run()
    return 0


class _Conversation:
    def __init__(self, session: Session, given: dict[str, Any]) -> None:
        self._session = session
        self._fields = sampling_fields(given)
        self._system = given.get("system")
        self._messages: list[dict[str, str]] = []
        self._reset()

    def run(self) -> None:
        while (line := self._read()) is not None:
            if line == "/exit":
                return
            if line == "/reset":
                self._reset()
                print("(forgotten)", file=sys.stderr)
            elif line.startswith("/"):
                print(f"There is no command {line.split()[0]}; there are /reset and /exit.", file=sys.stderr)
            elif line:
                self._answer(line)

    def _reset(self) -> None:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []

    def _read(self) -> str | None:
        """What the user typed; None at the end of the input."""
        while True:
            try:
                return input("> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)

    def _answer(self, line: str) -> None:
        messages = [*self._messages, {"role": "user", "content": line}]
        answer = ""
        pieces = self._session.stream({"messages": messages, **self._fields})
        try:
            for piece in pieces:
                answer += piece
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            pieces.close()
            print(" …", end="")
        except FirstlightError as error:
            print(f"firstlight: {error}", file=sys.stderr)
            return
        print()
        self._messages = [*messages, {"role": "assistant", "content": answer}]
