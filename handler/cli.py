"""The command line: which command, which flags, and what is said when they make no sense."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from handler.unsupported import explain
from runtime.errors import FirstlightError

DESCRIPTION = """\
Run a large language model as if it were a function: nothing runs until it is called.

The two commands to know:
  firstlight serve            serve the default model on http://127.0.0.1:8000 in OpenAI's format
  firstlight chat             talk to it in this terminal
"""

EPILOG = """\
Every flag can also be set in the environment: --max-model-len is FIRSTLIGHT_MAX_MODEL_LEN.
A flag beats the environment, which beats models.yaml, which beats the default.
`firstlight COMMAND --help` explains a command.
"""

# Each command is a module with USAGE, DESCRIPTION, EPILOG, configure(parser) and run(values) -> exit status.
COMMANDS = {
    "serve": "serve a model over HTTP, in OpenAI's format",
    "chat": "talk to a model in the terminal",
    "generate": "print the answer to one prompt",
    "pull": "fetch a model into the cache, so that a later start need not",
    "models": "list the models of models.yaml and what is in the cache",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit status: 0 good, 1 it failed, 2 the command line is wrong."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # `python -m handler --model X` serves, as vLLM's server module does.
    if arguments and arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version"):
        arguments.insert(0, "serve")
    if not arguments or arguments[0] not in COMMANDS:
        return _without_command(arguments)
    command, rest = arguments[0], arguments[1:]
    if command != "serve":
        return _run(command, rest)
    from handler import ahead

    ahead.begin(rest)
    try:
        return _run(command, rest)
    finally:
        ahead.end()


def _run(command: str, rest: list[str]) -> int:
    module: Any = importlib.import_module(f"handler.commands.{command}")
    parser = argparse.ArgumentParser(
        prog=f"firstlight {command}",
        usage=f"firstlight {command} {module.USAGE}",
        description=module.DESCRIPTION,
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    module.configure(parser)
    known, unknown = parser.parse_known_args([_dashes(argument) for argument in rest])
    if unknown:
        names = [option.lstrip("-") for action in parser._actions for option in action.option_strings]
        print(f"firstlight {command}: {explain(unknown[0], names)}", file=sys.stderr)
        return 2
    try:
        status: int = module.run(vars(known))
        return status
    except FirstlightError as error:
        print(f"firstlight {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read the output has enough, as `head` soon does. Python would flush the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _without_command(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="firstlight",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    if parser.parse_args(arguments).version:
        from handler.version import release

        print(release() or "unknown: firstlight runs from its source folder without being installed")
        return 0
    parser.print_help()
    return 2


def _dashes(argument: str) -> str:
    """--max_model_len is --max-model-len, as in vLLM."""
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value
