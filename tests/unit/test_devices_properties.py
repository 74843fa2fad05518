"""Whatever the options, sizes and completion order: each buffer comes back once, and no notification is lost.

The driver here is a few lines of its own: it keeps its books in Python, kicks only when the device's
suppression fields ask for it, and learns of used buffers only by interrupts it asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.model import Model
from guestpv.devices.queue import DeviceQueue
from guestpv.devices.ring import Chain
from guestpv.devices.scripted import RawQueue, ScriptedDriver
from guestpv.spec import features as ft
from guestpv.spec import ring as rs

V1 = ft.mask((ft.F_VERSION_1, ft.F_ACCESS_PLATFORM))
OPTIONS = (
    ft.F_RING_PACKED,
    ft.F_INDIRECT_DESC,
    ft.F_EVENT_IDX,
    ft.F_IN_ORDER,
    ft.F_NOTIFICATION_DATA,
)


class Sums(Model):
    """Answers with as many bytes as it was given, each the sum of those."""

    device_type = ft.RNG

    def handle(self, queue: DeviceQueue, chain: Chain) -> None:
        data = chain.read()
        queue.complete(chain, chain.write(bytes([sum(data) & 0xFF]) * len(data)))


@dataclass
class Outstanding:
    slots: list[int]
    parts: int
    length: int
    answer: bytes
    into: list
    full: int


class Driver:
    """Books of one queue."""

    def __init__(self, features: int, size: int) -> None:
        self.function = SoftwareFunction(Sums(depth=size), name="test")
        self.function.device.offered |= ft.mask(OPTIONS)
        self.features = features
        self.packed = bool(features >> ft.F_RING_PACKED & 1)
        self.event_idx = bool(features >> ft.F_EVENT_IDX & 1)
        self.in_order = bool(features >> ft.F_IN_ORDER & 1)
        self.queue: RawQueue = ScriptedDriver(self.function).start(V1 | features, {0: size})[0]
        self.device = self.function.device.queues[0]
        self.out: dict[int, Outstanding] = {}
        self.busy: set[int] = set()
        self.seen = 0
        self.returned = 0
        self.kicked_at = 0
        self.interrupts = 0
        self.arm()

    def add(self, readable: list[int], writable: list[int], indirect: bool, fill: int) -> None:
        queue, size = self.queue, self.queue.size
        indirect = indirect and bool(self.features >> ft.F_INDIRECT_DESC & 1)
        parts = 1 if indirect else len(readable) + len(writable)
        if len(readable) + len(writable) > size:
            return
        slots = [(queue.position + place) % size for place in range(parts)]
        if self.packed and queue.position + parts - self.seen > size:
            return
        if not self.packed and (self.busy & set(slots) or len(self.out) >= size):
            return
        id = next(number for number in range(size + 1) if number not in self.out)
        data = bytes([fill]) * sum(readable)
        out = [queue.buffer(length, bytes([fill]) * length) for length in readable]
        into = [queue.buffer(length) for length in writable]
        id = queue.add(out, into, indirect=indirect, id=id)
        full = sum(writable)
        length = min(len(data), full)
        answer = bytes([sum(data) & 0xFF]) * length
        self.out[id] = Outstanding(slots, parts, length, answer, into, full)
        self.busy |= set(slots)

    def kick(self) -> None:
        """Notify if the device asks for it, by the arithmetic of 2.7.10 and 2.8.10."""
        queue = self.queue
        new, old = (queue.position if self.packed else queue.heads), self.kicked_at
        self.kicked_at = new
        if new != old and self.wanted(old, new):
            queue.kick()

    def wanted(self, old: int, new: int) -> bool:
        rings, size = self.queue.rings, self.queue.size
        if not self.packed:
            if self.event_idx:
                event = int(rings.used["avail_event"])
                return any(position & 0xFFFF == event for position in range(old, new))
            return not int(rings.used["flags"])
        flags, where = int(rings.device["flags"]), int(rings.device["desc"])
        if flags != rs.EVENT_FLAGS_DESC:
            return flags == rs.EVENT_FLAGS_ENABLE
        event = (where & 0x7FFF, where >> 15)
        return any((position % size, 1 - position // size % 2) == event for position in range(old, new))

    def arm(self) -> None:
        """Ask for an interrupt at the next used buffer."""
        rings, size = self.queue.rings, self.queue.size
        self.interrupts = self.device.interrupts
        if self.packed:
            if self.event_idx:
                rings.driver["desc"] = self.seen % size | (1 - self.seen // size % 2) << 15
            rings.driver["flags"] = rs.EVENT_FLAGS_DESC if self.event_idx else rs.EVENT_FLAGS_ENABLE
        elif self.event_idx:
            rings.avail["used_event"] = self.seen & 0xFFFF
        else:
            rings.avail["flags"] = 0

    def disarm(self) -> None:
        rings = self.queue.rings
        if self.packed:
            rings.driver["flags"] = rs.EVENT_FLAGS_DISABLE
        elif not self.event_idx:
            rings.avail["flags"] = 1

    def pending(self) -> bool:
        rings, size = self.queue.rings, self.queue.size
        if not self.packed:
            return int(rings.used["idx"]) != self.seen & 0xFFFF
        both = rs.PACKED_DESC_F_AVAIL | rs.PACKED_DESC_F_USED
        flags = int(rings.desc[self.seen % size]["flags"]) & both
        return bool(self.out) and flags == (0 if self.seen // size % 2 else both)

    def sleep_and_reap(self) -> None:
        """What a driver does that waits for an interrupt: armed and nothing pending, it must be woken."""
        if self.pending():
            self.reap()
        self.arm()
        self.release()
        assert not self.pending() or self.device.interrupts > self.interrupts
        self.disarm()
        self.reap()

    def release(self, order: int = 1) -> None:
        self.function.device.release(order=lambda place: place * order)

    def reap(self) -> None:
        while self.pending():
            slot = self.seen % self.queue.size
            record = self.queue.rings.desc[slot] if self.packed else self.queue.rings.used["ring"][slot]
            id, length = int(record["id"]), int(record["len"])
            assert id in self.out
            skipped = list(self.out)[: list(self.out).index(id)] if self.in_order else []
            for other in skipped:
                self.take(other, self.out[other].full)
            self.take(id, length)

    def take(self, id: int, length: int) -> None:
        entry = self.out.pop(id)
        assert length == entry.length
        got = b"".join(part.array.tobytes() for part in entry.into)
        assert got[:length] == entry.answer
        self.busy -= set(entry.slots)
        self.seen += entry.parts if self.packed else 1
        self.returned += 1


lengths = st.lists(st.integers(1, 5), max_size=3)
steps = st.one_of(
    st.tuples(st.just("add"), lengths, lengths, st.booleans(), st.integers(0, 255)),
    st.tuples(st.just("add"), lengths, lengths, st.booleans(), st.integers(0, 255)),
    st.sampled_from(["kick", "release", "reverse", "sleep", "hold", "poll", "quiet"]).map(
        lambda name: (name,)
    ),
)


@pytest.mark.requirement(
    *("DEV-SPLIT-11", "DEV-SPLIT-13", "DEV-SPLIT-37", "DEV-SPLIT-39", "DEV-SPLIT-40", "DEV-SPLIT-41"),
    *("DEV-PACKED-19", "DEV-PACKED-20", "DEV-PACKED-24", "DEV-PACKED-31", "DEV-FEAT-10"),
)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    options=st.sets(st.sampled_from(OPTIONS)),
    size=st.integers(1, 9),
    script=st.lists(steps, min_size=20, max_size=120),
)
def test_every_buffer_comes_back_once(options: set[int], size: int, script: list[tuple]) -> None:
    features = ft.mask(options)
    if not features >> ft.F_RING_PACKED & 1:
        size = 1 << size.bit_length() - 1
    driver = Driver(features, size)
    try:
        added = 0
        for name, *args in script:
            match name:
                case "add":
                    readable, writable, indirect, fill = args
                    if readable or writable:
                        before = len(driver.out)
                        driver.add(readable, writable, indirect, fill)
                        added += len(driver.out) - before
                case "kick":
                    driver.kick()
                case "release":
                    driver.release()
                case "reverse":
                    driver.release(-1)
                case "sleep":
                    driver.kick()
                    driver.sleep_and_reap()
                case "hold":
                    driver.function.device.hold = not driver.function.device.hold
                case "poll":
                    driver.function.device.poll()
                case "quiet":
                    driver.device.ask_for_kicks = False
                    driver.kick()
                    driver.function.device.poll()
                    driver.device.ask_for_kicks = True
                    driver.function.device.poll()
        driver.function.device.hold = False
        driver.kick()
        driver.sleep_and_reap()
        assert driver.out == {}
        assert driver.returned == added
        assert [str(finding) for finding in driver.function.findings] == []
    finally:
        driver.function.close()
