"""Rings that start where another back end left off, and keep the record of what is in flight."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ..devices.evidence import Event
from ..devices.packed import PackedRing
from ..devices.queue import DeviceQueue
from ..devices.ring import Chain, Element
from ..devices.split import INDEX, SplitRing
from ..spec.ring import DESC_F_INDIRECT, DESC_F_WRITE, PACKED_DESC
from ..virtqueue.layout import ring_layout
from .inflight import Memory, PackedRecord, RawDescriptor, Record, SplitRecord

MASK = 0xFFFF


class ResumedSplit(SplitRing):
    """A split ring whose first chains may be ones that an earlier back end had taken.

    Attributes:
        again: their heads; they are popped first.
        raw: for packed rings only.
    """

    again: deque[int]
    raw: list[RawDescriptor]

    def resume(self, base: int, again: Sequence[int]) -> None:
        """Go on at available index ``base``; with ``again``, at the used index, behind those chains."""
        used = self._used[INDEX]
        self.again = deque(again)
        self.raw = []
        behind = len(again) if again else (base - used) & MASK
        # One lap ahead: positions are free-running and never negative.
        self.used = used + (MASK + 1)
        self.popped = self.used + behind
        self.available = self.popped
        self.popped -= len(again)

    def pop(self) -> Chain | None:
        if self.again:
            return self._took(self._walk(self.again.popleft()))
        return super().pop()

    @property
    def base(self) -> int:
        """What GET_VRING_BASE answers: the next available index that was not taken."""
        return (self.popped - len(self.outstanding)) & MASK


class ResumedPacked(PackedRing):
    """A packed ring whose first buffers may be ones that an earlier back end had taken.

    Attributes:
        again: their descriptors; they are popped first.
        raw: descriptors of the buffer popped last, as the driver wrote them.
    """

    again: deque[list[RawDescriptor]]
    raw: list[RawDescriptor]

    def resume(
        self, avail: tuple[int, int], used: tuple[int, int], again: Sequence[list[RawDescriptor]]
    ) -> None:
        """Go on at these ring positions with their wrap counters; with ``again``, behind those buffers."""
        self.again = deque(again)
        self.raw = []
        self.used = used[0] + (0 if used[1] else self.size)
        if again:
            self.available = self.used + sum(map(len, again))
        else:
            self.available = avail[0] + (0 if avail[1] else self.size)
            if self.available < self.used:
                self.available += 2 * self.size

    def pop(self) -> Chain | None:
        if self.again:
            self.raw = self.again.popleft()
            return self._took(self._rebuilt(self.raw))
        before = self.available
        chain = super().pop()
        if chain is not None:
            rows = np.frombuffer(self._desc, PACKED_DESC, self.size)
            places = [place % self.size for place in range(before, self.available)]
            self.raw = [tuple(rows[place].tolist()) for place in places]
        return chain

    def _rebuilt(self, raw: list[RawDescriptor]) -> Chain:
        elements: list[Element] = []
        for address, length, _id, flags in raw:
            if flags & DESC_F_INDIRECT:
                elements += self._indirect(address, length)
            else:
                elements.append(Element(address, length, bool(flags & DESC_F_WRITE)))
        return self._chain(raw[-1][2], len(raw), elements, [])

    @property
    def base(self) -> int:
        """What GET_VRING_BASE answers: both positions with their wrap counters."""
        taken = self.available - sum(chain.count for chain in self.outstanding.values())
        return self._place(taken) | self._place(self.used) << 16

    def _place(self, position: int) -> int:
        return position % self.size | self._wrap(position) << 15


AnyRing = ResumedSplit | ResumedPacked


def enable(queue: DeviceQueue, packed: bool, base: int, memory: Memory | None) -> Callable[[], None]:
    """Enable a queue at ``base`` (the protocol's number); keep a record of what is in flight in ``memory``.

    Returns:
        What ends the record, to be called when the ring stops.

    Raises:
        DriverFault: the driver's ring cannot be used.
    """
    queue.enable()
    layout, bus, features = ring_layout(queue.size, packed), queue.owner.memory, queue.owner.features
    desc = bus.view(queue.desc, layout.desc.size, write=packed)
    driver = bus.view(queue.driver, layout.driver.size)
    device = bus.view(queue.device, layout.device.size, write=True)
    ring: AnyRing
    record: Record | None = None
    if packed:
        ring = ResumedPacked(queue.size, features, bus, (desc, driver, device))
        avail, used = (base & 0x7FFF, base >> 15 & 1), (base >> 16 & 0x7FFF, base >> 31)
        if not base >> 16:
            used = avail  # DPDK's virtio-user says nothing of the used position, and nothing is in flight
        lists: Sequence[list[RawDescriptor]] = ()
        if memory is not None:
            flags = np.frombuffer(desc, PACKED_DESC, queue.size)["flags"]
            kept = PackedRecord(memory, queue.size, used, flags)
            record, used, lists = kept, kept.used, kept.again
        ring.resume(avail, used, lists)
    else:
        ring = ResumedSplit(queue.size, features, bus, (desc, driver, device))
        heads: Sequence[int] = ()
        if memory is not None:
            split = SplitRecord(memory, queue.size, int.from_bytes(device[2:4], "little"))
            record, heads = split, split.again
        ring.resume(base, heads)
    queue.ring = ring
    return _keep(record, queue, ring) if record else lambda: None


def _keep(record: Record, queue: DeviceQueue, ring: AnyRing) -> Callable[[], None]:
    def observe(event: Event, subject: object) -> None:
        if event.queue != queue.index:
            return
        if event.kind == "publish":
            record.shown()
        elif isinstance(subject, Chain):
            if event.kind == "pop":
                record.taken(subject, ring.raw)
            else:
                record.staged(subject)

    return queue.owner.journal.observe(observe)
