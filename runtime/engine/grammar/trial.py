"""Whether a grammar can be compiled at all: found out in a process of its own, which may come to grief.

A few lines can ask for a compiler's whole memory, for hours of its time, or for more of its stack than
there is. `python -m runtime.engine.grammar.trial` compiles what it reads, a JSON string a line, and answers
each with a line: what is wrong with it, or null. Its first line says how many tokens there are and which
are special: grammars may name those, and no others.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

from runtime.errors import FirstlightError

if TYPE_CHECKING:
    from llguidance import LLParserLimits

_CPU_SECONDS = 3.0
_MEMORY_BYTES = 1 << 30
# Less than any thread of an engine has.
_STACK_BYTES = 1 << 20
# What one sequence may take: its lexer's states up to 2 kB each, and in all some 4 ms for a mask, of which
# schemas that people write need less than one.
_MAX_LEXER_STATES = 50_000
_STEP_LEXER_FUEL = 50_000
_STEP_MAX_ITEMS = 10_000


def limits() -> LLParserLimits:
    """The bounds that llguidance itself keeps to."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        max_lexer_states=_MAX_LEXER_STATES,
        step_lexer_fuel=_STEP_LEXER_FUEL,
        step_max_items=_STEP_MAX_ITEMS,
        verbose_errors=False,
    )


class Trial:
    """Tries grammars, one after the other. The process is started when one comes and there is none."""

    def __init__(self, vocab_size: int, special: dict[int, str]) -> None:
        """`special` are texts of special tokens by their ids."""
        self._vocabulary = {"size": vocab_size, "special": list(special.items())}
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self, source: str) -> str | None:
        """Why a grammar is not to be compiled, if there is a reason.

        Raises `FirstlightError` if that cannot be found out.
        """
        lines: list[object] = [source]
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "runtime.engine.grammar.trial"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
            lines = [self._vocabulary, source]
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("".join(f"{json.dumps(line)}\n" for line in lines).encode())
        process.stdin.flush()
        answer = process.stdout.readline()
        if answer:
            problem: str | None = json.loads(answer)
            return problem
        status = process.wait()
        if status >= 0:
            raise FirstlightError(f"the process that tries grammars ended with status {status}; see stderr")
        if status == -signal.SIGPROF:
            return f"it takes more than {_CPU_SECONDS:g} s to compile"
        return "it takes too much memory to compile, or is nested too deeply"


class _Bytes:
    """A vocabulary of nothing but bytes and special tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, size: int, special: list[tuple[int, str]]) -> None:
        names = dict(special)
        plain = iter([bytes([byte]) for byte in range(256)])
        self.tokens = [names[n].encode() if n in names else next(plain, b"") for n in range(size)]
        self.tokens += [*plain, b""]
        self.eos_token_id = len(self.tokens) - 1
        self.special_token_ids = list(names)

    def __call__(self, text: str) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text.encode()]


def _serve() -> None:
    from llguidance import LLMatcher, LLTokenizer

    vocabulary = LLTokenizer(_Bytes(**json.loads(sys.stdin.buffer.readline())))  # type: ignore[arg-type]
    for line in sys.stdin.buffer:
        # Unless it is taken back, it ends the process.
        signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS)
        matcher = LLMatcher(vocabulary, json.loads(line), log_level=0, limits=limits())
        if not matcher.is_error():
            matcher.compute_bitmask()
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(matcher.get_error() or None), flush=True)


def main() -> None:
    """Answer until the other end is gone."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = _MEMORY_BYTES if most == resource.RLIM_INFINITY else min(_MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(_STACK_BYTES)
    serving = threading.Thread(target=_serve)
    serving.start()
    serving.join()


if __name__ == "__main__":
    main()
