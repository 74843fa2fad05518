"""The record of a trace: events in the order in which they were seen, and whoever wants each of them at once.

A record is for one run. Every device that is opened in it gets a number and a ``DeviceTrace``, through which
its wrappers tell what happens; threads may tell at the same time.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final

SCHEMA: Final = "guestpv.trace/1"
STANDARD: Final = "VIRTIO 1.4"
DEFAULT_LIMIT: Final = 100_000
DATA_KEPT: Final = 2048
"""Bytes of each element of a buffer that an event keeps: an ordinary frame, and most requests."""

EXITS: Final = frozenset({"read", "write", "config-read", "config-write", "doorbell"})
"""Kinds of events that trap to the hypervisor under KVM: accesses to registers of a PCI function (4.1)."""

LANES: Final = {
    "open": ("driver", "device"),
    "read": ("device", "driver"),
    "write": ("driver", "device"),
    "config-read": ("device", "driver"),
    "config-write": ("driver", "device"),
    "doorbell": ("driver", "device"),
    "kick": ("driver", "device"),
    "status": ("driver", "device"),
    "message": ("driver", "device"),
    "answer": ("device", "driver"),
    "vectors": ("driver", "device"),
    "function-reset": ("driver", "device"),
    "interrupt": ("device", "driver"),
    "queue": ("driver", "ring"),
    "add": ("driver", "ring"),
    "publish": ("driver", "ring"),
    "want": ("driver", "ring"),
    "fence": ("driver", "driver"),
    "decision": ("ring", "driver"),
    "poll": ("ring", "driver"),
    "used": ("device", "ring"),
    "reap": ("ring", "driver"),
    "queue-gone": ("driver", "driver"),
    "close": ("driver", "device"),
}
"""Kind of event -> from where to where it goes, of driver, ring and device."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        number: from 0, without gaps.
        nanoseconds: since the record began, monotonic.
        device: number of the device.
        kind: a key of ``LANES``.
        text: in words.
        section: of VIRTIO 1.4; several are separated by commas.
        facts: what the kind has more, as JSON has it.
    """

    number: int
    nanoseconds: int
    device: int
    kind: str
    text: str
    section: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def exits(self) -> bool:
        """Whether it would be an exit to the hypervisor."""
        return self.kind in EXITS

    def to_json(self) -> dict[str, Any]:
        """As one line of a record."""
        return {
            "n": self.number,
            "t": self.nanoseconds,
            "device": self.device,
            "kind": self.kind,
            "text": self.text,
            "section": self.section,
            **self.facts,
        }

    @classmethod
    def from_json(cls, line: dict[str, Any]) -> Event:
        """Raises KeyError where a member is missing."""
        facts = dict(line)
        n, t, device, kind, text, section = (
            facts.pop(name) for name in ("n", "t", "device", "kind", "text", "section")
        )
        return cls(n, t, device, kind, text, section, facts)


class Recorder:
    """Takes events from every device of a run.

    Args:
        limit: events that are kept; later ones are only counted.
        data: bytes of each element of a buffer that are kept.

    Attributes:
        events: what is kept.
        dropped: how many came after the limit.
        began: when, in nanoseconds since the epoch.
        devices: each device that was opened.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT, *, data: int = DATA_KEPT) -> None:
        self.limit = limit
        self.data = data
        self.events: list[Event] = []
        self.dropped = 0
        self.began = time.time_ns()
        self.devices: list[DeviceTrace] = []
        self._start = time.monotonic_ns()
        self._lock = threading.RLock()
        self._sinks: list[Callable[[Event], None]] = []

    def watch(self, sink: Callable[[Event], None]) -> None:
        """Show every event that is kept to ``sink``, in order, one at a time."""
        self._sinks.append(sink)

    def device(self, name: str, device_type: int | None) -> DeviceTrace:
        """A device was opened.

        Args:
            name: how messages call it.
            device_type: virtio device id, None where nobody knows.
        """
        with self._lock:
            trace = DeviceTrace(self, len(self.devices), name, device_type)
            self.devices.append(trace)
        return trace

    def add(self, device: int, kind: str, text: str, section: str, facts: dict[str, Any]) -> None:
        """Something happened now."""
        with self._lock:
            if len(self.events) >= self.limit:
                self.dropped += 1
                return
            now = time.monotonic_ns() - self._start
            event = Event(len(self.events), now, device, kind, text, section, facts)
            self.events.append(event)
            for sink in self._sinks:
                sink(event)

    def told(self, *beginnings: str) -> list[str]:
        """Texts, with their sections, of all events or of those whose text begins so."""
        return [
            f"{event.text}  [{event.section}]"
            for event in self.events
            if not beginnings or event.text.startswith(beginnings)
        ]

    def head(self) -> dict[str, Any]:
        """The first line of a record."""
        return {"schema": SCHEMA, "standard": STANDARD, "began": self.began}

    def summary(self) -> dict[str, int]:
        """How many events of each kind there are, ``exits`` and ``events`` in all."""
        counts: dict[str, int] = {}
        for event in self.events:
            counts[event.kind] = counts.get(event.kind, 0) + 1
        return counts | {
            "exits": sum(event.exits for event in self.events),
            "events": len(self.events),
            "dropped": self.dropped,
        }


class DeviceTrace:
    """What the wrappers of one device tell.

    Attributes:
        name, device_type: of the device.
        features: what was negotiated so far.
    """

    def __init__(self, recorder: Recorder, number: int, name: str, device_type: int | None) -> None:
        self.recorder = recorder
        self.number = number
        self.name = name
        self.device_type = device_type
        self.features = 0

    def tell(self, kind: str, text: str, section: str = "", **facts: Any) -> None:
        """Something happened now."""
        self.recorder.add(self.number, kind, text, section, facts)


class BadRecord(ValueError):
    """A file that is no record; says which line and why."""


def read(lines: Iterator[str]) -> tuple[dict[str, Any], list[Event]]:
    """Head and events of a record, one JSON object a line.

    Raises:
        BadRecord: it is none.
    """
    head: dict[str, Any] = {}
    events: list[Event] = []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
            if number == 1:
                head = found
                if head["schema"] != SCHEMA:
                    raise BadRecord(f"line 1: the schema is {head['schema']!r}, not {SCHEMA!r}")
            elif "kind" in found:
                events.append(Event.from_json(found))
        except BadRecord:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadRecord(f"line {number} is no line of a record: {error!r}") from None
    if not head:
        raise BadRecord("the file is empty")
    return head, events
