"""Weights on their way back to the device, and what is launched meanwhile to be computed with them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch

from runtime.weights.cuda_driver import Driver
from runtime.weights.host_copy import Filled
from runtime.weights.upload import DeviceWeights


class Arriving:
    """Lets torch's current stream wait for each part of a model's weights just before it is used.

    That part of a step whose weights have come is computed while the others are still on the link.
    """

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._filled: Sequence[Filled] = ()
        self._ends: dict[str, int] = {}

    def begin(self, filled: Sequence[Filled], weights: DeviceWeights | None) -> None:
        """The weights begin to come to their arena, `filled` up to which address when, in order."""
        self._filled = filled
        self._ends = {}
        if weights is None:
            return
        for parameter in weights.plan.parameters:
            end = weights.address + parameter.offset + sum(piece.num_bytes for piece in parameter.pieces)
            name = _group(parameter.name)
            self._ends[name] = max(self._ends.get(name, 0), end)

    def wait_for(self, name: str) -> None:
        """What is launched from here on is computed when the parameters of this name have come.

        Those of a layer have one name, `layers.0`. Any other name stands for all there are.
        """
        if not self._filled:
            return
        last = len(self._filled) - 1
        at = last
        if (end := self._ends.get(name)) is not None:
            at = min(last, bisect_left(self._filled, end, key=lambda point: point.address))
        self._driver.hold(torch.cuda.current_stream().cuda_stream, self._filled[at].event)
        if at == last:
            self._filled = ()


def _group(parameter: str) -> str:
    first, _, rest = parameter.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first == "layers" else first
