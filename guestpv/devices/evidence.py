"""What a device saw, and what it holds against the driver.

Every register access, kick, chain and interrupt becomes one small ``Event`` in a bounded log. Observers
see each event at the moment it happens, may look at anything, and may add a ``Finding``.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

LOG_LENGTH = 4096
EVIDENCE_LENGTH = 24
FINDINGS_KEPT = 1000


class Event(NamedTuple):
    """One observation.

    Attributes:
        kind: ``read``, ``write`` (a register of a BAR), ``config-read``, ``config-write`` (PCI
            configuration space), ``enable``, ``kick``, ``pop``, ``push``, ``publish``, ``interrupt``,
            ``reset``.
        name: the standard's name of the register, or what the kind acts on.
        offset: bytes from the start of the register's structure.
        width: bytes of the access.
        value: what was read or written; a buffer id for ``pop`` and ``push``.
        queue: queue index, or -1.
        extra: byte count of a ``push``, free-running ring position of a ``pop`` or ``publish``.
    """

    kind: str
    name: str
    offset: int = 0
    width: int = 0
    value: int = 0
    queue: int = -1
    extra: int = 0

    def __str__(self) -> str:
        place = f" queue {self.queue}" if self.queue >= 0 else ""
        if self.width:
            return f"{self.kind} {self.name} +{self.offset:#x}/{self.width} = {self.value:#x}{place}"
        return f"{self.kind} {self.name} {self.value:#x} {self.extra}{place}"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something the driver did that the standard does not allow.

    Attributes:
        requirement: id in the catalogue (``DRV-SPLIT-48``), empty where none fits.
        message: what was wrong, in the field's own terms.
        where: device, queue or register.
        fatal: whether it broke the device (DEVICE_NEEDS_RESET).
        evidence: the last events before it, oldest first.
    """

    requirement: str
    message: str
    where: str = ""
    fatal: bool = False
    evidence: tuple[Event, ...] = ()

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.requirement, self.message) if part)


class DriverFault(Exception):
    """The driver made something that a device cannot work with. Never leaves this package."""

    def __init__(self, requirement: str, message: str) -> None:
        super().__init__(message)
        self.requirement = requirement
        self.message = message


Observer = Callable[[Event, object], None]
"""Called with each event and what it is about (a chain for pop and push, else None)."""


class Journal:
    """The log of one device, its findings and its observers."""

    def __init__(self, name: str, length: int = LOG_LENGTH) -> None:
        self.name = name
        self.events: deque[Event] = deque(maxlen=length)
        self.findings: list[Finding] = []
        self.findings_dropped = 0
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> Callable[[], None]:
        """Let ``observer`` see every event from now on; returns what ends it."""
        self._observers.append(observer)
        return lambda: self._observers.remove(observer)

    def record(self, event: Event, subject: object = None) -> None:
        """Log an event and show it to the observers."""
        self.events.append(event)
        for observer in self._observers:
            observer(event, subject)

    def find(self, requirement: str, message: str, where: str = "", fatal: bool = False) -> Finding:
        """Add a finding with the last events as its evidence. The first thousand are kept."""
        evidence = tuple(self.events)[-EVIDENCE_LENGTH:]
        place = f"{self.name} {where}" if where else self.name
        finding = Finding(requirement, message, place, fatal, evidence)
        if len(self.findings) < FINDINGS_KEPT:
            self.findings.append(finding)
        else:
            self.findings_dropped += 1
        return finding

    def clear(self) -> None:
        """Forget events and findings."""
        self.events.clear()
        self.findings.clear()
        self.findings_dropped = 0
