"""The GPU, found and entered in a thread: that takes longer than whatever else comes before it."""

from __future__ import annotations

import threading
from typing import Literal

from runtime.weights.cuda_driver import CudaError, Driver


class FindingDevice(threading.Thread):
    """Loads the driver and makes the context of a GPU, if there is one."""

    def __init__(self) -> None:
        super().__init__(name="device", daemon=True)
        self._driver: Driver | None = None
        self._error: CudaError | None = None

    def begin(self) -> None:
        """Start the thread unless it was started before."""
        if self.ident is None:
            self.start()

    def run(self) -> None:
        """The thread's work."""
        try:
            self._driver = Driver()
        except CudaError as error:
            self._error = error

    def found(self) -> bool:
        """Whether there is a GPU."""
        self.join()
        return self._driver is not None

    def driver(self, wanted: Literal["auto", "cuda"]) -> Driver | None:
        """The GPU's driver, entered; without a GPU None, or the error if one is required."""
        self.join()
        if self._error is not None and wanted == "cuda":
            raise self._error
        if self._driver is not None:
            self._driver.enter()
        return self._driver
