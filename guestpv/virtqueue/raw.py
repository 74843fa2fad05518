"""Rings written by hand: any field to any value, for malformed rings that the safe queue would never make.

A raw ring works on the memory of a ``Virtqueue`` that the transport made and enabled. Whoever writes by
hand does not use the safe queue's ``add`` and ``completions`` any more until the queue was reset.
Stores reach the device in program order on x86 only; ``fence`` orders them anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from guestpv.errors import UsageError
from guestpv.spec.ring import DESC_F_NEXT, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED

from .layout import PackedRings, SplitRings
from .queue import Virtqueue

Element = tuple[int, int, int]
"""Bus address, length in bytes, flags without NEXT, AVAIL and USED."""


class _Raw:
    def __init__(self, queue: Virtqueue) -> None:
        self.queue = queue
        self.size = queue.size

    def fence(self) -> None:
        """Everything written so far is visible to the device before anything written or read later."""
        self.queue.core_lib.gpv_fence()

    def notify(self, value: int | None = None) -> None:
        """Send an available buffer notification with this value (default: the queue's index), unasked for."""
        self.queue.core_lib.gpv_notify_value(self.queue.handle, self.queue.index if value is None else value)


class RawSplit(_Raw):
    """A split virtqueue, written by hand (2.7).

    Attributes:
        desc, avail, used: live views as in ``layout.SplitRings``; assign to any field of them.
        idx: available idx that ``offer`` counts from.
        seen: used idx up to which ``used_entries`` has reported.
    """

    def __init__(self, queue: Virtqueue) -> None:
        super().__init__(queue)
        if not isinstance(queue.rings, SplitRings):
            raise UsageError("the queue is packed: take RawPacked", where=queue.name)
        self.desc, self.avail, self.used = queue.rings.desc, queue.rings.avail, queue.rings.used
        self.idx = int(self.avail["idx"])
        self.seen = int(self.used["idx"])

    def descriptor(self, index: int, address: int, length: int, flags: int = 0, next: int = 0) -> None:
        """Write one descriptor; nothing is checked."""
        self.desc[index] = (address, length, flags, next)

    def chain(self, elements: Sequence[Element], first: int = 0) -> int:
        """Write a well-formed chain to consecutive descriptors, modulo the size. Returns its head."""
        for number, (address, length, flags) in enumerate(elements):
            more = DESC_F_NEXT if number + 1 < len(elements) else 0
            self.descriptor(
                (first + number) % self.size, address, length, flags | more, (first + number + 1) % self.size
            )
        return first % self.size

    def offer(self, *heads: int, advance: int | None = None) -> None:
        """Write heads to the available ring and move idx, by their number or by ``advance``."""
        for number, head in enumerate(heads):
            self.avail["ring"][(self.idx + number) % self.size] = head
        self.idx = (self.idx + (len(heads) if advance is None else advance)) % 0x10000
        self.fence()
        self.avail["idx"] = self.idx
        self.fence()

    def used_entries(self) -> list[tuple[int, int]]:
        """Used entries (id, length) since the last call, at most the queue size, unchecked."""
        idx = int(self.used["idx"])
        self.fence()
        count = min((idx - self.seen) % 0x10000, self.size)
        ring = self.used["ring"]
        entries = [ring[(self.seen + number) % self.size] for number in range(count)]
        self.seen = idx
        return [(int(entry["id"]), int(entry["len"])) for entry in entries]


class RawPacked(_Raw):
    """A packed virtqueue, written by hand (2.8).

    Attributes:
        desc, driver, device: live views as in ``layout.PackedRings``; assign to any field of them.
        offset, wrap: where ``offer`` writes next.
        used_offset, used_wrap: where ``used_entry`` looks next.
    """

    def __init__(self, queue: Virtqueue) -> None:
        super().__init__(queue)
        if not isinstance(queue.rings, PackedRings):
            raise UsageError("the queue is split: take RawSplit", where=queue.name)
        self.desc, self.driver, self.device = queue.rings.desc, queue.rings.driver, queue.rings.device
        self.offset = self.used_offset = 0
        self.wrap = self.used_wrap = 1

    def available(self, wrap: int | None = None) -> int:
        """The flag bits of an available descriptor under a wrap counter (2.8.1)."""
        return PACKED_DESC_F_AVAIL if (self.wrap if wrap is None else wrap) else PACKED_DESC_F_USED

    def descriptor(self, index: int, address: int, length: int, id: int, flags: int) -> None:
        """Write one descriptor, its flags last; nothing is checked."""
        entry = self.desc[index]
        entry["addr"], entry["len"], entry["id"] = address, length, id
        self.fence()
        entry["flags"] = flags
        self.fence()

    def offer(self, elements: Sequence[Element], id: int) -> None:
        """Write a well-formed list at the next place, its head's flags last, and step on."""
        rows = []
        for number, (address, length, flags) in enumerate(elements):
            more = DESC_F_NEXT if number + 1 < len(elements) else 0
            rows.append((self.offset, address, length, id, flags | more | self.available()))
            self.offset += 1
            if self.offset == self.size:
                self.offset, self.wrap = 0, 1 - self.wrap
        for row in reversed(rows):
            self.descriptor(*row)

    def used_entry(self, count: int) -> tuple[int, int, int] | None:
        """The used descriptor (id, length, flags) at the next place, unchecked, or None.

        Args:
            count: descriptors of the buffer that is expected, to step on by.
        """
        entry = self.desc[self.used_offset]
        flags = int(entry["flags"])
        self.fence()
        bits = PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED
        if flags & bits != (bits if self.used_wrap else 0):
            return None
        result = int(entry["id"]), int(entry["len"]), flags
        self.used_offset += count
        if self.used_offset >= self.size:
            self.used_offset, self.used_wrap = self.used_offset - self.size, 1 - self.used_wrap
        return result
