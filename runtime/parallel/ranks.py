"""The ranks of one engine, as each of them sees the others."""

from __future__ import annotations

import socket
import threading

from runtime.parallel.control import Control, Line, Meeting, ParallelError, follow, lead, listen


class Ranks:
    """This rank and its way to the others, which is open once `meet` has returned.

    `listener` is what rank 0 waits for the others on; without one it opens what `meeting` says.
    """

    control: Control

    def __init__(
        self, rank: int, world_size: int, meeting: Meeting, listener: socket.socket | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.meeting = meeting
        self._listener = listener
        self.met = threading.Event()

    @property
    def lines(self) -> list[Line]:
        """The lines to the others; see `Control`."""
        return self.control.lines

    def meet(self, has_gpu: bool) -> None:
        """Wait for the others, and see that all compute on the same kind of device.

        Raises `ParallelError` otherwise.
        """
        if self.rank == 0:
            listener = self._listener or listen(self.meeting.address, self.meeting.port)
            with listener:
                self.control = lead(listener, self.meeting, self.world_size)
        else:
            self.control = follow(self.meeting, self.rank, self.world_size)
        gpus = sum(self.control.exchange(has_gpu))
        if 0 < gpus < self.world_size:
            raise ParallelError(
                f"--tensor-parallel-size {self.world_size} needs {self.world_size} GPUs, and there "
                f"{'is' if gpus == 1 else 'are'} {gpus}: choose at most {gpus}, or --device cpu."
            )
        self.met.set()
