"""The engine's process of `serve`, started before its flags are understood: its interpreter takes as long."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from runtime.spawn import Spawned, spawn

_HELP = {"-h", "--help"}
_waiting: Spawned | None = None


def begin(arguments: Sequence[str], environ: Mapping[str, str] = os.environ) -> None:
    """Start a process for these arguments of `serve`."""
    global _waiting
    if not _HELP.intersection(arguments):
        _waiting = spawn("auto" if _is_alone_on_a_gpu(arguments, environ) else "cpu")


def taken() -> Spawned | None:
    """The process, which is the caller's from now on; None if none was started."""
    global _waiting
    spawned, _waiting = _waiting, None
    return spawned


def end() -> None:
    """End the process, unless somebody has taken it."""
    if (spawned := taken()) is not None:
        spawned.socket.close()
        spawned.process.kill()
        spawned.process.wait()


def _is_alone_on_a_gpu(arguments: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether the process may well be asked for a GPU, as far as a glance can tell.

    Of several ranks each gets a process of its own later.
    """
    words = [word.replace("_", "-") for argument in arguments for word in argument.split("=", 1)]
    on_cpu = "cpu" in words or environ.get("FIRSTLIGHT_DEVICE") == "cpu"
    shared = {"--tensor-parallel-size", "-tp"}.intersection(words)
    return not (on_cpu or shared or "FIRSTLIGHT_TENSOR_PARALLEL_SIZE" in environ)
