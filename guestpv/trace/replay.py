"""A record done again: the same register accesses and ring operations, against another device.

Register accesses keep their structure, field, width and value; what the new device places elsewhere (its
structures, its doorbells, its bus addresses) is translated. Where the record waited for a used buffer, the
replay waits for it, too. Nothing is decided anew but one thing: a device that asks for a kick where the
recorded one did not gets it, or it would wait for ever.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from guestpv.core._core import lib

from ..errors import Refused
from ..memory import DmaPool
from ..pci.capabilities import first, require_virtio, type_name, virtio_capabilities
from ..pci.function import PciFunction
from ..spec import features as feat
from ..spec import pci
from ..spec.status import Status
from .record import Event
from .replay_ring import LateDevice, ReplayRing
from .words import STRUCTURES

TIME_LIMIT: Final = 10.0
SETTLES: Final = ("device_status", "queue_reset")
"""Registers that may take the device a while."""
OWN: Final = ("queue_notify_off", "config_generation", "isr")
"""Registers whose value is the device's own affair."""
ADDRESSES: Final = ("queue_desc", "queue_driver", "queue_device")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where the device answered differently.

    Attributes:
        number: of the event in the record.
        what: the event in words.
        recorded, now: both answers in words.
    """

    number: int
    what: str
    recorded: str
    now: str

    def __str__(self) -> str:
        return f"event {self.number}: {self.what}: {self.recorded} then, {self.now} now"


@dataclass(slots=True)
class Outcome:
    """What came of a replay.

    Attributes:
        accesses: register accesses that were repeated.
        buffers: buffers that came back.
        interrupts: how many there were then, and now; devices may batch them as they like.
        differences: in order.
        decisions: kicks that are needed now and were not then, or the other way round: it depends on how busy
            the device is at that moment.
        stopped: why the rest could not be repeated, empty where all of it was.
    """

    accesses: int = 0
    buffers: int = 0
    interrupts: tuple[int, int] = (0, 0)
    differences: list[Difference] = field(default_factory=list)
    decisions: list[Difference] = field(default_factory=list)
    stopped: str = ""


class _Stop(Exception):
    """The rest cannot be repeated."""


def check(events: Iterable[Event], device: int = 0) -> Event:
    """The event that opened the device, if its record can be replayed.

    Raises:
        Refused: it is no record of a PCI function.
    """
    for event in events:
        if event.kind == "open" and event.device == device:
            if event.facts.get("bus") != "pci":
                raise Refused(
                    "a record of a vhost-user back end has no register accesses to repeat",
                    where=str(event.facts.get("name")),
                    hint="record the same device over another scheme, such as loopback: or qtest:",
                )
            return event
    raise Refused(f"the record has no device {device}")


class Replay:
    """Repeats the events of one device on a function, which stays the caller's.

    Args:
        function: the function, not yet looked at.
        timeout: seconds the device has for each buffer.
    """

    def __init__(self, function: PciFunction, *, timeout: float = TIME_LIMIT) -> None:
        self.function = function
        self.outcome = Outcome()
        self._timeout = timeout
        self._pool = DmaPool(function.dma)
        found = virtio_capabilities(function.config_read)
        self._structures = {
            name: cap for kind, name in STRUCTURES.items() if (cap := first(found, kind)) is not None
        }
        self._rings: dict[int, ReplayRing] = {}
        self._notify_offsets: dict[int, int] = {}
        self._queue = 0
        self._device_type = 0
        self._vectors: list[int] = []
        self._told = self._heard = 0
        self._selected = 0

    def run(self, events: Sequence[Event], device: int = 0) -> Outcome:
        """Repeat everything, then reset the device and take its memory away.

        Raises:
            Refused: as for ``check``, or the function is of another type.
        """
        opened = check(events, device)
        self._device_type = int(opened.facts["device_type"] or 0)
        here = require_virtio(self.function.name, self.function.config_read)
        if here != self._device_type:
            raise Refused(
                f"the record is of a {type_name(self._device_type)} device, this is {type_name(here)}",
                where=self.function.name,
            )
        # Structures and queues are reached as the driver reached them: memory accesses and DMA on.
        command = self.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
        self.function.config_write(
            pci.PCI_CONFIG_COMMAND, 2, command | pci.COMMAND_MEMORY | pci.COMMAND_BUS_MASTER
        )
        try:
            for event in events:
                if event.device == device:
                    self._repeat(event)
        except _Stop as reason:
            self.outcome.stopped = str(reason)
        except LateDevice as late:
            self.outcome.stopped = f"{late} within {self._timeout:g} s"
        finally:
            self._end()
        return self.outcome

    def _repeat(self, event: Event) -> None:
        facts, kind = event.facts, event.kind
        ring = self._rings.get(facts.get("queue", -1))
        if kind == "read":
            self._read(event)
        elif kind == "write":
            self._write(event)
        elif kind == "vectors":
            self._interrupts(event)
        elif kind == "interrupt":
            self._told += 1
        elif kind == "function-reset":
            self.function.reset()
        elif kind == "queue":
            self._rings[facts["queue"]] = ReplayRing(self._pool, facts, self._timeout)
        elif kind == "fence":
            lib.gpv_fence()
        elif kind == "doorbell":
            self._ring(facts["queue"], facts["value"])
        elif ring is None:
            return
        elif kind == "add":
            ring.add(facts)
        elif kind == "publish":
            ring.publish(facts)
        elif kind == "want":
            ring.want(facts)
        elif kind == "decision":
            self._decide(event, ring)
        elif kind == "reap" and "length" in facts:
            self._reap(event, ring)
        elif kind == "queue-gone":
            self._rings.pop(facts["queue"]).close()

    # Registers.

    def _place(self, event: Event) -> tuple[int, int] | None:
        """BAR and offset in it of a register of the record, None where the device has no such register."""
        facts = event.facts
        found = self._structures.get(facts["structure"])
        if found is None or facts["offset"] + facts["width"] > found.length:
            self._differs(event, "there", f"the {facts['structure']} structure has no such register")
            return None
        return found.bar, found.offset + facts["offset"]

    def _read(self, event: Event) -> None:
        facts = event.facts
        if (place := self._place(event)) is None:
            return
        bar, offset = self.function.bar(place[0]), place[1]
        self.outcome.accesses += 1
        value, name = bar.read(offset, facts["width"]), facts["register"]
        deadline = time.monotonic() + self._timeout
        while name in SETTLES and value != facts["value"] and time.monotonic() < deadline:
            if name == "device_status" and value & ~facts["value"] & Status.NEEDS_RESET:
                break
            if name == "device_status" and facts["value"]:
                break
            time.sleep(0.001)
            value = bar.read(offset, facts["width"])
        if name == "queue_notify_off":
            self._notify_offsets[self._queue] = value
        if name not in OWN:
            self._same(event, facts["value"], value)
        if name == "device_status" and facts["value"] & ~value & Status.FEATURES_OK:
            raise _Stop("the device did not keep FEATURES_OK for the features of the record")

    def _same(self, event: Event, recorded: int, now: int) -> None:
        if recorded == now:
            return
        name = event.facts.get("register", "")
        self._differs(event, self._value(event, recorded, now, name), self._value(event, now, recorded, name))

    def _value(self, event: Event, value: int, other: int, name: str) -> str:
        """A value, with the features that it has more than the other one."""
        text = f"{value:#0{2 + 2 * event.facts['width']}x}"
        if name == "device_feature":
            more = feat.feature_names(self._device_type, (value & ~other) << 32 * self._selected)
            text += f" (more: {' '.join(more)})" if more else ""
        return text

    def _write(self, event: Event) -> None:
        facts = event.facts
        if (place := self._place(event)) is None:
            return
        value, name = facts["value"], facts["register"]
        if name == "queue_select":
            self._queue = value
        elif name == "device_feature_select":
            self._selected = value
        register, _, half = name.partition(" (")
        if register in ADDRESSES:
            if self._queue not in self._rings:
                raise _Stop(f"event {event.number} names rings that the record does not show being made")
            address = self._rings[self._queue].addresses[register.removeprefix("queue_")]
            value = address & 0xFFFFFFFF if half.startswith("low") else address >> 32
        self.outcome.accesses += 1
        self.function.bar(place[0]).write(place[1], facts["width"], value)

    def _ring(self, queue: int, value: int) -> None:
        notify = self._structures["notify"]
        offset = notify.offset + self._notify_offsets.get(queue, 0) * notify.extra
        ring = self._rings.get(queue)
        width = 4 if ring is not None and ring.features >> feat.F_NOTIFICATION_DATA & 1 else 2
        self.outcome.accesses += 1
        self.function.bar(notify.bar).write(offset, width, value)

    # Notifications.

    def _interrupts(self, event: Event) -> None:
        count = event.facts["count"]
        self._hear()
        self._vectors.clear()
        if count < 0:
            self.function.disable_interrupts()
        elif count and self.function.msix_vectors >= count:
            self._vectors = self.function.enable_msix(count)
        elif count:
            self._differs(event, f"{count} vectors", f"the function has {self.function.msix_vectors}")
            raise _Stop("the function has too few MSI-X vectors")
        else:
            self._vectors = [self.function.enable_intx()]

    def _hear(self) -> None:
        for fd in self._vectors:
            with contextlib.suppress(BlockingIOError, OSError):
                os.set_blocking(fd, False)
                self._heard += os.eventfd_read(fd)

    def _decide(self, event: Event, ring: ReplayRing) -> None:
        kick = ring.wants_kick()
        if kick == event.facts["kick"]:
            return
        words = {True: "a kick is needed", False: "it is not"}
        self._differs(event, words[event.facts["kick"]], words[kick], self.outcome.decisions)
        if kick:
            self._ring(ring.index, ring.index)

    def _reap(self, event: Event, ring: ReplayRing) -> None:
        facts = event.facts
        length, data = ring.take(facts["id"], facts["data"])
        self.outcome.buffers += 1
        if length != facts["length"]:
            self._differs(event, f"{facts['length']} bytes written", f"{length}")
        elif data != facts["data"] and self._device_type != feat.RNG:
            number = next(
                n for n, (one, other) in enumerate(zip(facts["data"], data, strict=True)) if one != other
            )
            one, other = bytes.fromhex(facts["data"][number]), bytes.fromhex(data[number])
            at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
            self._differs(
                event,
                f"byte {at} of writable element {number} is {one[at : at + 1].hex() or 'missing'}",
                other[at : at + 1].hex() or "missing",
            )

    def _differs(self, event: Event, recorded: str, now: str, where: list[Difference] | None = None) -> None:
        found = Difference(event.number, event.text.partition(" = ")[0], recorded, now)
        (self.outcome.differences if where is None else where).append(found)

    # The end.

    def _end(self) -> None:
        self._hear()
        self.outcome.interrupts = (self._told, self._heard)
        common = self._structures.get("common")
        try:
            if common is not None:
                bar, at = (
                    self.function.bar(common.bar),
                    common.offset + pci.COMMON_CFG["device_status"].offset,
                )
                bar.write(at, 1, 0)
                deadline = time.monotonic() + self._timeout
                while bar.read(at, 1) and time.monotonic() < deadline:
                    time.sleep(0.001)
                if bar.read(at, 1):
                    # What does not come out of reset must not go on with memory that is taken away.
                    command = self.function.config_read(pci.PCI_CONFIG_COMMAND, 2)
                    self.function.config_write(pci.PCI_CONFIG_COMMAND, 2, command & ~pci.COMMAND_BUS_MASTER)
        finally:
            self.function.disable_interrupts()
            self._rings.clear()
            self._pool.close()
