"""Several models in one server: which of them may be awake, and who makes room for whom."""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from handler.openai.errors import ApiError
from handler.service import Service
from runtime.client import EngineUnavailable


class Fleet:
    """The models of one server; the first is the default. Others load when they are first asked for.

    At most `max_awake_models` of them compute, and at most `max_loaded_models` have an engine process.
    Whoever comes for another waits until the least recently used one has finished what it is doing, and
    sleeps, or has left.
    """

    def __init__(self, services: Sequence[Service]) -> None:
        self.services = list(services)
        self._by_name = {name: s for s in reversed(self.services) for name in s.settings.served_model_names}
        settings = self.default.settings
        self._max_awake = settings.max_awake_models
        self._max_loaded = max(settings.max_awake_models, settings.max_loaded_models)
        self._changing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._guests = {service.model: _Guests() for service in self.services}
        # The least recently used first. Those that are awake, or may become so at any time:
        self._awake: OrderedDict[str, Service] = OrderedDict({self.default.model: self.default})
        self._used: OrderedDict[str, Service] = OrderedDict((s.model, s) for s in self.services)
        for service in self.services:
            service.fleet = self

    @property
    def default(self) -> Service:
        """The model of requests that name none."""
        return self.services[0]

    @property
    def names(self) -> list[str]:
        """Every name that requests may use."""
        return [name for service in self.services for name in service.settings.served_model_names]

    def find(self, name: str | None) -> Service:
        """The model of this name. Raises `ApiError` 404, naming those that there are."""
        service = self.default if name is None else self._by_name.get(name)
        if service is None:
            message = f"The model '{str(name)[:200]}' does not exist here; this server has "
            raise ApiError(404, f"{message}{', '.join(self.names)}.", param="model", code="model_not_found")
        return service

    @asynccontextmanager
    async def place(self, service: Service) -> AsyncIterator[None]:
        """A place for a request at its model, which may be awake for as long as that is held."""
        guests = self._guests[service.model]
        is_fine = service.client.state != "failed" or service is self.default
        if service.model in self._awake and is_fine and not guests.asked_to_leave:
            guests.enter()
        else:
            await self._wait_turn(service, guests)
        self._awake.move_to_end(service.model)
        self._used.move_to_end(service.model)
        try:
            yield
        finally:
            guests.leave()

    async def _wait_turn(self, service: Service, guests: _Guests) -> None:
        """All who wait for a model enter together when its turn comes, so that models change seldom."""
        if not guests.waiting:
            self._keep(self._bring(service, guests))
        turn = asyncio.get_running_loop().create_future()
        guests.waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                guests.leave()  # it had just been let in
            raise

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work beside everything else."""
        self._tasks.add(task := asyncio.create_task(work))
        task.add_done_callback(self._tasks.discard)

    async def _bring(self, service: Service, guests: _Guests) -> None:
        async with self._changing:
            await self._make_room(service)
            self._awake[service.model] = service
            waiting, guests.waiting = guests.waiting, []
            for turn in waiting:
                if not turn.done():
                    turn.set_result(None)
                    guests.enter()

    async def _make_room(self, service: Service) -> None:
        while service.model not in self._awake and len(self._awake) >= self._max_awake:
            await self._send_to_sleep(self._awakes_least_needed())
        if service.client.state == "failed" and service is not self.default and not service.client.pids:
            # What was wrong then may have been put right; the server itself goes by its default model.
            service.client.forgive()
            self._keep(service.client.run(at_once=False))
        if service.client.state == "cold":
            loaded = [s for s in self._used.values() if s.client.state not in ("cold", "failed")]
            asleep = [s for s in loaded if s.model not in self._awake]
            for other in asleep[: max(0, len(loaded) + 1 - self._max_loaded)]:
                other.client.leave()

    def _awakes_least_needed(self) -> Service:
        asleep = (s for s in self._awake.values() if s.client.state in ("asleep", "cold", "failed"))
        return next(asleep, next(iter(self._awake.values())))

    async def _send_to_sleep(self, service: Service) -> None:
        """Wait until nobody is there any more; those who come meanwhile wait for their turn."""
        guests = self._guests[service.model]
        guests.asked_to_leave = True
        try:
            await guests.gone.wait()
            with contextlib.suppress(EngineUnavailable):  # then it holds nothing, or fails on its own account
                await service.client.sleep(1)
            del self._awake[service.model]
        finally:
            guests.asked_to_leave = False


@dataclass
class _Guests:
    """The requests that are at one model now, and those that wait for its turn."""

    count: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    asked_to_leave: bool = False
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gone.set()

    def enter(self) -> None:
        self.count += 1
        self.gone.clear()

    def leave(self) -> None:
        self.count -= 1
        if self.count == 0:
            self.gone.set()
