"""Step after step: take commands, compute, send what came of it."""

from __future__ import annotations

from runtime import marks
from runtime.engine.channel import Channel
from runtime.engine.core import Engine
from runtime.engine.turns import FollowingChannel, LeadingChannel
from runtime.protocol import Abort, Drain, Mark, Submit


def serve(engine: Engine, channel: Channel | LeadingChannel | FollowingChannel) -> None:
    """Serve until the handler drains the engine (returns when all is done) or is gone (`EOFError`).

    Ranks keep step because what is done here follows from what `channel.receive` returns, call by call.
    """
    draining = False
    first = True
    idle_work = False
    graphs: float | None = None
    while engine.has_work or not draining:
        was_busy = engine.has_work
        for command in channel.receive(wait=not (engine.has_work or idle_work)):
            match command:
                case Submit():
                    engine.submit(command)
                case Abort():
                    engine.abort(command.request_ids)
                case Drain():
                    draining = True
        if not (engine.has_work or was_busy):
            if idle_work and (idle_work := engine.runner.use_idle_time()):
                graphs = marks.since_exec()
            elif graphs is not None:
                channel.send(Mark("graphs", graphs))
                graphs = None
            continue
        output = engine.step()
        channel.check(engine.fingerprint)
        # The last step is told even if it produced nothing: it shows that all blocks are free again.
        if output.deltas or not engine.has_work:
            channel.send(output)
        if first and any(delta.token_ids for delta in output.deltas):
            first = False
            idle_work = True
            channel.send(Mark("first_token", marks.since_exec()))
