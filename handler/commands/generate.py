"""`firstlight generate PROMPT`: one answer on standard output."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from handler.flags import ANSWER_FLAGS, ENGINE_FLAGS, MODEL_FLAGS, UsageError, add_flags
from handler.session import Session, sampling_fields
from handler.settings import read_settings

USAGE = "PROMPT [FLAGS]"
DESCRIPTION = """\
Print the answer to one prompt, word by word as it is made.
A model with a chat template is asked as in a chat; --raw lets it continue the text as it stands.
"""

EPILOG = """\
examples:
  firstlight generate "Explain in two sentences what a hash table is."
  firstlight generate --raw "Once upon a time" --max-tokens 50 --temperature 0.8
  git diff | firstlight generate - --system "Write a commit message for this change."
"""

DEFAULT_MAX_TOKENS = 512


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("prompt", metavar="PROMPT", help="what to answer; - reads it from standard input")
    parser.add_argument("--raw", action="store_true", help="continue the text, without the chat template")
    parser.add_argument("--system", metavar="TEXT", help="what the model is told beforehand")
    add_flags(parser, "answer", ANSWER_FLAGS)
    add_flags(parser, "model", MODEL_FLAGS)
    add_flags(parser, "engine", ENGINE_FLAGS)


def run(given: dict[str, Any]) -> int:
    """Print the answer."""
    prompt = sys.stdin.read() if given["prompt"] == "-" else given["prompt"]
    system = given["system"]
    if system and given["raw"]:
        raise UsageError("--system needs the chat template, which --raw leaves out")
    fields = {"max_tokens": DEFAULT_MAX_TOKENS, **sampling_fields(given)}
    with Session(read_settings(given)) as session:
        if given["raw"] or not session.has_template():
            body = {"prompt": prompt, **fields}
        else:
            messages = [{"role": "system", "content": system}] if system else []
            body = {"messages": [*messages, {"role": "user", "content": prompt}], **fields}
        for piece in session.stream(body):
            print(piece, end="", flush=True)
        print()
        if sys.stderr.isatty():
            print(f"({session.spent})", file=sys.stderr)
    return 0
