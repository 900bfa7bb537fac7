"""The output items of a response as they grow, and the events that tell of it."""

from __future__ import annotations

import uuid
from typing import Any

from handler.openai.conversation import Call

Event = dict[str, Any]


class Output:
    """Items in the order in which the model made them; at most one is being written.

    Every method returns the events of what it did, without their sequence numbers.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: str | None = None
        self._call_id: str | None = None

    def reasoning(self, text: str) -> list[Event]:
        """More reasoning."""
        events = self._begin("reasoning", {"summary": [], "content": []}, _part("reasoning_text"))
        self._part["text"] += text
        return [*events, self._event("response.reasoning_text.delta", content_index=0, delta=text)]

    def text(self, text: str, logprobs: list[dict[str, Any]]) -> list[Event]:
        """More text, with the log-probabilities of its tokens where they were asked for."""
        head = {"role": "assistant", "content": []}
        events = self._begin("message", head, {**_part("output_text"), "annotations": [], "logprobs": []})
        self._part["text"] += text
        self._part["logprobs"] = self._part["logprobs"] + logprobs
        delta = self._event("response.output_text.delta", content_index=0, delta=text, logprobs=logprobs)
        return [*events, delta]

    def call(self, call: Call, arguments: str) -> list[Event]:
        """More of a call's arguments; the call begins if it is not the one that is being written."""
        events = []
        if self._call_id != call.id:
            events = self.close("completed")
            self._call_id = call.id
            head = {"call_id": call.id, "name": call.name, "arguments": ""}
            events += self._begin("function_call", head, None)
        if arguments:
            self.items[-1]["arguments"] += arguments
            events.append(self._event("response.function_call_arguments.delta", delta=arguments))
        return events

    def close(self, status: str) -> list[Event]:
        """The item that is being written ends here."""
        if self._open is None:
            return []
        item = self.items[-1]
        item["status"] = status
        kind, self._open, self._call_id = self._open, None, None
        if kind == "function_call":
            told = {"arguments": item["arguments"], "name": item["name"]}
            events = [self._event("response.function_call_arguments.done", **told)]
        else:
            part = dict(self._part)
            name = "reasoning_text" if kind == "reasoning" else "output_text"
            told = {key: value for key, value in part.items() if key in ("text", "logprobs")}
            events = [
                self._event(f"response.{name}.done", content_index=0, **told),
                self._event("response.content_part.done", content_index=0, part=part),
            ]
        return [*events, self._item_event("response.output_item.done")]

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self.items[-1]["content"][0]
        return part

    def _begin(self, kind: str, head: dict[str, Any], part: dict[str, Any] | None) -> list[Event]:
        if self._open == kind and kind != "function_call":
            return []
        events = self.close("completed")
        self._open = kind
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item = {"type": kind, "id": f"{prefix}_{uuid.uuid4().hex}", "status": "in_progress", **head}
        self.items.append(item)
        events.append(self._item_event("response.output_item.added"))
        if part is not None:
            events.append(self._event("response.content_part.added", content_index=0, part=dict(part)))
            item["content"] = [part]
        return events

    def _event(self, kind: str, **fields: Any) -> Event:
        place = len(self.items) - 1
        return {"type": kind, "item_id": self.items[-1]["id"], "output_index": place, **fields}

    def _item_event(self, kind: str) -> Event:
        return {"type": kind, "output_index": len(self.items) - 1, "item": dict(self.items[-1])}


def _part(kind: str) -> dict[str, Any]:
    return {"type": kind, "text": ""}
