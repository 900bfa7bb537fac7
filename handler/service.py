"""What every endpoint works with: the engine, the model's text room, the queue and the counters."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from handler.activity import Activity
from handler.limits import Admission
from handler.metrics import Metrics
from handler.openai.errors import ApiError
from handler.settings import ServerSettings
from handler.textroom import TextRoom
from runtime.client import EngineClient

if TYPE_CHECKING:
    from handler.fleet import Fleet


@dataclass
class Service:
    """One served model, alone or as one of a fleet."""

    client: EngineClient
    settings: ServerSettings
    text: TextRoom = field(init=False)
    admission: Admission = field(init=False)
    metrics: Metrics = field(default_factory=Metrics)
    activity: Activity = field(default_factory=Activity)
    fleet: Fleet | None = None

    def __post_init__(self) -> None:
        self.text = TextRoom(self.client, self.settings)
        self.admission = Admission(self.settings.max_queue)

    @property
    def model(self) -> str:
        """The name that answers carry."""
        return self.settings.served_model_names[0]

    def place(self) -> AbstractAsyncContextManager[None]:
        """Where a request stays while it needs the engine; others of a fleet make room for it first."""
        return nullcontext() if self.fleet is None else self.fleet.place(self)

    def check_model(self, name: str | None) -> None:
        """Raise `ApiError` 404, naming the models that there are, if `name` is none of them."""
        known = self.settings.served_model_names
        if name is not None and name not in known:
            message = f"The model '{name[:200]}' does not exist here; this server has {', '.join(known)}."
            raise ApiError(404, message, param="model", code="model_not_found")
