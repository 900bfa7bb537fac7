"""Step after step: take commands, compute, send what came of it."""

from __future__ import annotations

from runtime import marks
from runtime.engine.channel import Channel
from runtime.engine.core import Engine
from runtime.engine.grammar.compiling import Compiling
from runtime.engine.idle_work import IdleWork
from runtime.engine.sleeper import Sleeper
from runtime.engine.turns import FollowingChannel, FollowingCompiling, LeadingChannel
from runtime.protocol import Abort, Command, Drain, Mark, Submit


def serve(engine: Engine, sleeper: Sleeper, channel: Channel | LeadingChannel | FollowingChannel) -> None:
    """Serve until the handler drains the engine (returns when all is done) or is gone (`EOFError`).

    Ranks keep step because all that is done here follows from what the channel returns, call by call, but for
    reading ahead, which nobody else notices.
    Raises `FirstlightError` when the engine cannot go on as it is.
    """
    draining = False
    first = True
    idle_work = IdleWork(engine, channel.send)
    compiling = channel.compiling(engine.grammars)
    while engine.has_work or compiling.busy or not draining:
        was_busy = engine.has_work
        patience = sleeper.due_in if sleeper.is_asleep else idle_work.due_in
        if engine.has_work or sleeper.is_falling_asleep:
            idle_work.put_off()
            patience = 0
        for command in channel.receive(patience):
            draining = draining or isinstance(command, Drain)
            _follow(command, sleeper, compiling)
        for request in compiling.finished() if compiling.busy else ():
            sleeper.take(request)
        output = engine.step() if engine.has_work or was_busy else None
        sleeper.finish_waking()
        if output is None:
            if sleeper.is_falling_asleep or sleeper.is_asleep:
                sleeper.advance()
            else:
                idle_work.advance()
            continue
        channel.check(engine.fingerprint)
        # The last step is told even if it produced nothing: it shows that all blocks are free again.
        if output.deltas or not engine.has_work:
            channel.send(output)
        if first and any(delta.token_ids for delta in output.deltas):
            first = False
            idle_work.begin()
            channel.send(Mark("first_token", marks.since_exec()))


def _follow(command: Command, sleeper: Sleeper, compiling: Compiling | FollowingCompiling) -> None:
    if isinstance(command, Submit) and command.sampling.grammar is not None:
        compiling.begin(command)
        return
    if isinstance(command, Abort):
        compiling.forget(command.request_ids)
    sleeper.take(command)
