"""The split virtqueue seen from the device (2.7)."""

from __future__ import annotations

import struct

from ..spec import ring as spec
from .dma import BusMemory
from .evidence import DriverFault
from .ring import Areas, Chain, Element, Ring, Used, fence

_DESC = struct.Struct("<QIHH")
FLAGS, INDEX, RING = 0, 1, 2


class SplitRing(Ring):
    """Pops heads from the available ring, pushes elements to the used ring.

    Positions are free-running; the 16-bit index of the standard is their low half.

    Args:
        size: queue size, a power of two.
        features: negotiated features.
        memory: where bus addresses lead.
        areas: memory of the descriptor table, available ring and used ring.
    """

    requirement_order = "DRV-SPLIT-04"

    def __init__(
        self,
        size: int,
        features: int,
        memory: BusMemory,
        areas: Areas,
    ) -> None:
        super().__init__(size, features, memory, areas)
        desc, avail, used = areas
        self._desc = desc
        self._avail = avail[: 6 + 2 * size].cast("H")
        self._used = used[: 6 + 8 * size].cast("H")
        self._elements = used[4 : 4 + 8 * size].cast("I")
        self._used_event = RING + size
        self._avail_event = RING + 4 * size
        self._claimed = bytearray(size)
        self._next_slot = 0
        self.available = 0
        self.used = 0

    def _pending(self) -> int:
        """Entries between our position and the driver's index."""
        count = (self._avail[INDEX] - self.popped) & 0xFFFF
        if count > self.size:
            if count >= 0x8000:
                raise DriverFault("DRV-SPLIT-14", f"available idx went back by {0x10000 - count}")
            raise DriverFault(
                "DRV-SPLIT-50", f"available idx is {count} ahead of a queue of size {self.size}"
            )
        return count

    def exposed(self) -> int:
        """Position of the available idx."""
        return self.popped + ((self._avail[INDEX] - self.popped) & 0xFFFF)

    def pop(self) -> Chain | None:
        """The next available chain, or None (2.7.6, 2.7.13)."""
        if self.popped >= self.available:
            count = self._pending()
            if not count:
                return None
            if count + len(self.outstanding) > self.size:
                raise DriverFault(
                    "DRV-SPLIT-50",
                    f"{count} new and {len(self.outstanding)} outstanding chains, queue size {self.size}",
                )
            self.available = self.popped + count
            fence()  # pairs with the driver's barrier before its idx update (2.7.13.3.1)
        head = self._avail[RING + self.popped % self.size]
        if head >= self.size:
            raise DriverFault("DRV-SPLIT-48", f"head {head} is not below the queue size {self.size}")
        return self._took(self._walk(head))

    def _walk(self, head: int) -> Chain:
        table, entries, index = self._desc, self.size, head
        elements: list[Element] = []
        slots: list[int] = []
        seen: set[int] | None = None
        total = 0
        if self.in_order and head != self._next_slot:
            raise DriverFault(
                "DRV-SPLIT-42", f"head {head} where descriptor {self._next_slot} is next in order"
            )
        while True:
            address, length, flags, following = _DESC.unpack_from(table, 16 * index)
            if seen is None:
                self._claim(index, slots, head)
            elif index in seen:
                raise DriverFault("DRV-SPLIT-07", f"chain {head}: loop in the indirect table")
            else:
                seen.add(index)
            if flags & spec.DESC_F_INDIRECT:
                self._check_indirect(flags, head, inside=seen is not None)
                table = self._table(address, length, "DRV-SPLIT-43")
                entries, index, seen = length // 16, 0, set()
                continue
            elements.append(Element(address, length, bool(flags & spec.DESC_F_WRITE)))
            total += length
            if len(elements) > self.max_chain:
                raise DriverFault("DRV-SPLIT-11", f"chain {head} is longer than {self.max_chain}")
            if total > 1 << 32:
                raise DriverFault("DRV-SPLIT-06", f"chain {head} is longer than 2^32 bytes")
            if not flags & spec.DESC_F_NEXT:
                break
            if following >= entries:
                rule = "DRV-SPLIT-41" if seen is None else "DRV-SPLIT-44"
                raise DriverFault(rule, f"chain {head}: next {following} in a table of {entries}")
            if self.in_order and following != (index + 1) % entries:
                rule = "DRV-SPLIT-08" if seen is None else "DRV-SPLIT-13"
                raise DriverFault(
                    rule, f"chain {head}: next of descriptor {index} is {following} with IN_ORDER"
                )
            index = following
        chain = self._chain(head, len(slots), elements, slots)
        self._next_slot = (slots[-1] + 1) % self.size
        return chain

    def _claim(self, index: int, slots: list[int], head: int) -> None:
        """A descriptor belongs to one outstanding chain, once."""
        if self._claimed[index]:
            if index in slots:
                raise DriverFault("DRV-SPLIT-07", f"chain {head}: loop at descriptor {index}")
            raise DriverFault(
                "DRV-SPLIT-50", f"chain {head}: descriptor {index} belongs to an outstanding chain"
            )
        self._claimed[index] = 1
        slots.append(index)

    def _check_indirect(self, flags: int, head: int, inside: bool) -> None:
        if not self.indirect:
            raise DriverFault("DRV-SPLIT-09", f"chain {head}: INDIRECT without VIRTIO_F_INDIRECT_DESC")
        if inside:
            raise DriverFault("DRV-SPLIT-10", f"chain {head}: INDIRECT inside an indirect table")
        if flags & spec.DESC_F_NEXT:
            raise DriverFault("DRV-SPLIT-12", f"chain {head}: INDIRECT and NEXT in one descriptor")

    def _write(self, staged: list[Used]) -> bool:
        old = self.used
        for chains, length in staged:
            slot = self.used % self.size
            self._elements[2 * slot] = chains[-1].id
            self._elements[2 * slot + 1] = length
            self.used += len(chains)
            for chain in chains:
                for index in chain.slots:
                    self._claimed[index] = 0
        fence()  # elements before idx: pairs with the driver's read of idx before the elements (2.7.8.2)
        self._used[INDEX] = self.used & 0xFFFF
        self._wrote()
        fence()  # idx before the suppression word: pairs with the driver's re-check after enabling (2.7.14)
        return self._wants_interrupt(old)

    def _wants_interrupt(self, old: int) -> bool:
        flags = self._avail[FLAGS]
        if self.event_idx:
            if flags:
                self.remarks.append(("DRV-SPLIT-17", f"available flags {flags:#x} with EVENT_IDX"))
            event = self._avail[self._used_event]
            return (event - old) & 0xFFFF < self.used - old
        if flags > 1:
            self.remarks.append(("DRV-SPLIT-15", f"available flags {flags:#x}"))
        return not flags & spec.AVAIL_F_NO_INTERRUPT

    def suppress_kicks(self) -> None:
        """2.7.10: flags 1; with EVENT_IDX the old avail_event stays behind, which asks for nothing."""
        if not self.event_idx:
            self._used[FLAGS] = spec.USED_F_NO_NOTIFY
            self._wrote()

    def enable_kicks(self) -> bool:
        """2.7.10: flags 0, or avail_event at the next entry; then look again."""
        if self.event_idx:
            self._used[self._avail_event] = self.popped & 0xFFFF
        elif self._used[FLAGS]:
            self._used[FLAGS] = 0
        self._wrote()
        fence()  # suppression word before idx: pairs with the driver's barrier of 2.7.13.4.1
        self.told = self.exposed()
        return self._pending() > 0

    def check_notification(self, next_off: int, next_wrap: int, exact: bool) -> None:
        """2.9: the available index in 16 bits."""
        told = next_off | next_wrap << 15
        ahead = (told - self.popped) & 0xFFFF
        pending = self._pending()
        if ahead > pending if not exact else ahead != pending:
            raise DriverFault(
                "DRV-SPLIT-58", f"notification data says idx {told}, the ring {self._avail[INDEX]}"
            )
