"""A running server that is asked for answers, each of which is counted and, where it can be, checked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from harness import BenchError, client
from harness.answers import Reference, References
from harness.process import ServerProcess
from harness.servers import Server
from harness.sse import Answer

READY_SECONDS = 600.0


def require_complete(who: str, answer: Answer, prompt_tokens: int, max_tokens: int) -> None:
    """Raise BenchError unless an answer ended well and has exactly the tokens that were asked for."""
    if answer.error is not None:
        raise BenchError(f"{who}: {answer.error}")
    if (answer.prompt_tokens, answer.completion_tokens) != (prompt_tokens, max_tokens):
        raise BenchError(
            f"{who} was given {prompt_tokens} tokens and asked for {max_tokens}, "
            f"but counts {answer.prompt_tokens} and {answer.completion_tokens}"
        )


@dataclass(frozen=True)
class Contender:
    """A server that is ready, and what it must answer."""

    server: Server
    process: ServerProcess
    references: References

    @property
    def name(self) -> str:
        return self.server.name

    def ask(self, prompt: list[int], max_tokens: int) -> Answer:
        """A greedy answer of exactly `max_tokens` tokens. Raises BenchError if it is anything else."""
        answer = client.stream(self.process.port, self.server.greedy(prompt, max_tokens))
        require_complete(self.name, answer, len(prompt), max_tokens)
        return answer

    def ask_reference(self, reference: Reference, max_tokens: int) -> Answer:
        """The same for a prompt whose answer is known. Raises BenchError if it is wrong."""
        answer = self.ask(reference.prompt_token_ids, max_tokens)
        reference.check_text(self.name, answer.text, max_tokens, self.server.lossy)
        return answer


@contextmanager
def started(servers: list[Server], references: References) -> Iterator[list[Contender]]:
    """All servers, ready and running until the block is left."""
    with ExitStack() as stack:
        contenders = []
        for server in servers:
            process = stack.enter_context(server.start())
            process.wait_ready(server.ready_path, READY_SECONDS)
            contenders.append(Contender(server, process, references))
        yield contenders
