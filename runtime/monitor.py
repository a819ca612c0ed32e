"""The monitor: a Ray actor that ranks send events to, and that the driver polls.

Owns the actor and the sink that feeds it. It keeps nothing once the driver has fetched it, decides nothing, and asks
for no CPU. Ranks do not wait for it in a step; `flush` and failures do wait, so that a rank's last words are not lost.
"""

import time
from typing import Any

from .events import Event, Failure, MemoryHeld, Rows

__all__ = ["Monitor", "MonitorSink"]


class Monitor:
    """The actor's class; made remote by `cluster.py`. Calls on it run one at a time."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._actors: dict[int, Any] = {}
        self._cancelled = False

    def put(self, events: list[Event]) -> None:
        """Events of one rank, in order."""
        self._events += events

    def drain(self) -> list[Event]:
        """All events since the last call, in order of arrival."""
        events, self._events = self._events, []
        return events

    def register(self, rank: int, actor: Any) -> bool:
        """A rank's own actor handle, so that the driver can end it; False: the run is cancelled already."""
        self._actors[rank] = actor
        return not self._cancelled

    def cancel(self) -> list[Any]:
        """No rank may start any more; returns the handles of those that did."""
        self._cancelled = True
        return list(self._actors.values())


class MonitorSink:
    """Sends a rank's events in bundles, at most one every `interval_s`. One thread at a time."""

    def __init__(self, monitor: Any, interval_s: float = 0.25) -> None:
        self._monitor, self._interval_s = monitor, interval_s
        self._rows: list[dict[str, Any]] = []
        self._held: MemoryHeld | None = None
        self._others: list[Event] = []
        self._sent_s = time.monotonic()

    def send(self, event: Event) -> None:
        if isinstance(event, Rows):
            self._rows += event.rows
        elif isinstance(event, MemoryHeld):
            self._held = event
        else:
            self._others.append(event)
        if isinstance(event, Failure):
            self.flush()
        elif time.monotonic() - self._sent_s >= self._interval_s or not isinstance(event, Rows | MemoryHeld):
            self._post()

    def flush(self) -> None:
        import ray

        ray.get(self._post())

    def _post(self) -> Any:
        events: list[Event] = [self._held] if self._held is not None else []
        if self._rows:
            events.append(Rows(tuple(self._rows)))
        events += self._others
        self._rows, self._held, self._others = [], None, []
        self._sent_s = time.monotonic()
        return self._monitor.put.remote(events)
