"""An engine that computes nothing: one token at once for each new sequence, then one a step.

    python -m scripts.bench.harness.stub_engine FD FOLDER STEP_MS

It speaks the protocol of `runtime.engine`, so that what a served token still costs is the handler's.
Tokens are drawn from the model's vocabulary with a fixed seed.
"""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from runtime.engine.channel import Channel
from runtime.protocol import Abort, Drain, EngineStats, Progress, Ready, StepOutput, Submit, TokenDelta

# Ids from here on are ordinary tokens in every tokenizer that the benchmarks use.
_FIRST_ID = 300
_MAX_MODEL_LEN = 1 << 17


class StubEngine:
    """The sequences that are running, with the number of tokens that each is still to get."""

    def __init__(self, vocab_size: int) -> None:
        draw = random.Random(0)
        self._ids = [draw.randrange(_FIRST_ID, vocab_size) for _ in range(4093)]
        self._made = 0
        self.left: dict[str, int] = {}

    def step(self, request_ids: Iterable[str]) -> StepOutput:
        """One token for each of these sequences; those that have got all of theirs end."""
        deltas = []
        for request_id in request_ids:
            self._made += 1
            delta = TokenDelta(request_id=request_id, token_ids=[self._ids[self._made % len(self._ids)]])
            self.left[request_id] -= 1
            if not self.left[request_id]:
                delta.finish_reason = "length"
                del self.left[request_id]
            deltas.append(delta)
        return StepOutput(deltas=deltas, stats=EngineStats(running=len(self.left)))


def serve(engine: StubEngine, connection: socket.socket, channel: Channel, step_seconds: float) -> None:
    """Step after step, until the handler wants an end or is gone (`EOFError`, `OSError`)."""
    due = 0.0
    while True:
        wait = max(0.0, due - time.monotonic()) if engine.left else None
        if select.select([connection], [], [], wait)[0]:
            new = []
            for command in channel.receive(patience=0.0):
                match command:
                    case Submit():
                        engine.left[command.request_id] = command.sampling.max_tokens
                        new.append(command.request_id)
                    case Abort():
                        for request_id in command.request_ids:
                            engine.left.pop(request_id, None)
                    case Drain():
                        return
            channel.send(engine.step(request_id for request_id in new if request_id in engine.left))
        elif engine.left:
            channel.send(engine.step(list(engine.left)))
            due = max(time.monotonic(), due + step_seconds)


def main() -> None:
    fd, folder, step_ms = sys.argv[1:]
    vocab_size = json.loads((Path(folder) / "config.json").read_text())["vocab_size"]
    with socket.socket(fileno=int(fd)) as connection, contextlib.suppress(EOFError, OSError):
        channel = Channel(connection)
        channel.send(Progress(phase="load", directory=folder))
        channel.send(
            Ready(
                device="none",
                dtype="none",
                max_model_len=_MAX_MODEL_LEN,
                vocab_size=vocab_size,
                block_size=16,
                num_blocks=1,
                weight_bytes=0,
                marks={},
                counters={},
            )
        )
        serve(StubEngine(vocab_size), connection, channel, float(step_ms) / 1e3)


if __name__ == "__main__":
    main()
