"""The packed virtqueue seen from the device (2.8)."""

from __future__ import annotations

import struct

from ..spec import ring as spec
from .dma import BusMemory
from .evidence import DriverFault
from .ring import Areas, Chain, Element, Ring, Used, fence

_DESC = struct.Struct("<QIHH")
AVAIL, USED = spec.PACKED_DESC_F_AVAIL, spec.PACKED_DESC_F_USED


class PackedRing(Ring):
    """Reads descriptors at ``available``, writes used ones at ``used``.

    Both are free-running counts of descriptors: the ring position is the remainder modulo the queue size,
    the wrap counter 1 on even rounds.

    Args:
        size: queue size, 1 to 32768.
        features: negotiated features.
        memory: where bus addresses lead.
        areas: memory of the descriptor ring, driver and device event suppression.

    Attributes:
        used_flags: further flags for used descriptors, that a driver has to ignore (2.8.6).
    """

    requirement_order = "DRV-PACKED-10"

    def __init__(
        self,
        size: int,
        features: int,
        memory: BusMemory,
        areas: Areas,
    ) -> None:
        super().__init__(size, features, memory, areas)
        desc, driver, device = areas
        self._desc = desc
        self._halves = desc[: 16 * size].cast("H")
        self._words = desc[: 16 * size].cast("I")
        self._driver = driver[:4].cast("H")
        self._device = device[:4].cast("H")
        self.available = 0
        self.used = 0
        self.used_flags = 0

    def _wrap(self, position: int) -> int:
        return 1 - position // self.size % 2

    def _is_available(self, position: int) -> bool:
        return self._marks(self._halves[8 * (position % self.size) + 7], position)

    def _marks(self, flags: int, position: int) -> bool:
        """Whether flags say that the descriptor at this position is available in this round."""
        return flags & (AVAIL | USED) == (AVAIL if self._wrap(position) else USED)

    def exposed(self) -> int:
        """Position after the last descriptor that is available."""
        position = self.available
        while position - self.available < self.size and self._is_available(position):
            position += 1
        return position

    def pop(self) -> Chain | None:
        """The next available buffer, or None (2.8.1, 2.8.6, 2.8.7)."""
        if not self._is_available(self.available):
            return None
        fence()  # flags before the rest: pairs with the driver's barrier of 2.8.21.1.1
        elements: list[Element] = []
        position = self.available
        while True:
            slot = position % self.size
            address, length, id, flags = _DESC.unpack_from(self._desc, 16 * slot)
            if not self._marks(flags, position):
                self._incomplete(position, slot, flags)
            count = position - self.available + 1
            if position - self.used >= self.size:
                self._no_room(count)
            position += 1
            if flags & spec.DESC_F_INDIRECT:
                self._check_indirect(flags, slot, count)
                elements = self._indirect(address, length)
                break
            elements.append(Element(address, length, bool(flags & spec.DESC_F_WRITE)))
            if len(elements) > self.max_chain:
                raise DriverFault("DRV-PACKED-08", f"list at {slot} is longer than {self.max_chain}")
            if not flags & spec.DESC_F_NEXT:
                break
        if id in self.outstanding:
            raise DriverFault("DRV-PACKED-34", f"buffer id {id} is still outstanding")
        slots = [place % self.size for place in range(self.available, position)]
        chain = self._chain(id, count, elements, slots)
        self.available = position
        return self._took(chain)

    def _incomplete(self, position: int, slot: int, flags: int) -> None:
        if position - self.available >= self.size:
            self._no_room(position - self.available + 1)
        if position - self.used >= self.size:
            self.remarks.append(("DRV-PACKED-11", f"descriptor {slot} of a list is still to be used"))
            raise DriverFault("DRV-PACKED-12", "the list runs into descriptors that were not used yet")
        marks = flags & (AVAIL | USED)
        if self._wrap(position) != self._wrap(self.available) and marks in (AVAIL, USED):
            self.remarks.append(
                ("DRV-PACKED-33", f"descriptor {slot} has the wrap counter of before the end")
            )
        raise DriverFault(
            "DRV-PACKED-13",
            f"descriptor {slot} of a list whose first one is available is not (flags {flags:#06x})",
        )

    def _no_room(self, count: int) -> None:
        if count > self.size:
            raise DriverFault("DRV-PACKED-09", f"a list is longer than the queue size {self.size}")
        raise DriverFault("DRV-PACKED-12", "the list runs into descriptors that were not used yet")

    def _check_indirect(self, flags: int, slot: int, count: int) -> None:
        if not self.indirect:
            raise DriverFault("DRV-PACKED-14", f"descriptor {slot}: INDIRECT without VIRTIO_F_INDIRECT_DESC")
        if count > 1 or flags & spec.DESC_F_NEXT:
            raise DriverFault("DRV-PACKED-17", f"descriptor {slot}: INDIRECT in a list linked by NEXT")

    def _indirect(self, address: int, length: int) -> list[Element]:
        """All entries of the table, one after the other; only WRITE counts in their flags (2.8.7)."""
        table = self._table(address, length, "DRV-PACKED-38")
        if length // 16 > self.max_chain:
            raise DriverFault(
                "DRV-PACKED-16", f"indirect table of {length // 16} entries, at most {self.max_chain} allowed"
            )
        elements = []
        for start in range(0, length, 16):
            where, size, _, flags = _DESC.unpack_from(table, start)
            if flags & ~spec.DESC_F_WRITE:
                self.remarks.append(
                    ("DRV-PACKED-15", f"flags {flags:#06x} in entry {start // 16} of an indirect table")
                )
            elements.append(Element(where, size, bool(flags & spec.DESC_F_WRITE)))
        return elements

    def _write(self, staged: list[Used]) -> bool:
        old = self.used
        first_flags: tuple[int, int] | None = None
        for chains, length in staged:
            slot = self.used % self.size
            flags = self.used_flags | (AVAIL | USED if self._wrap(self.used) else 0)
            if length:
                flags |= spec.DESC_F_WRITE
            self._words[4 * slot + 2] = length
            self._halves[8 * slot + 6] = chains[-1].id
            if first_flags is None:
                first_flags = (slot, flags)
            else:
                fence()  # id and len before flags: pairs with the driver's read of flags first
                self._halves[8 * slot + 7] = flags
            self.used += sum(chain.count for chain in chains)
        if first_flags is not None:
            fence()  # the rest before the first one's flags, which make all of it visible (2.8.9)
            self._halves[8 * first_flags[0] + 7] = first_flags[1]
        fence()  # flags before event suppression: pairs with the driver's re-check after enabling (2.8.22)
        return self._wants_interrupt(old)

    def _wants_interrupt(self, old: int) -> bool:
        flags = self._driver[1]
        mode = flags & 3
        if flags > 3 or mode == 3:
            self.remarks.append(("DRV-PACKED-40", f"driver event suppression flags {flags:#06x}"))
        if mode == spec.EVENT_FLAGS_DISABLE:
            return False
        if mode != spec.EVENT_FLAGS_DESC:
            return True
        if not self.event_idx:
            self.remarks.append(("DRV-PACKED-41", "driver event flags 2 without EVENT_IDX"))
            return True
        offset, wrap = self._driver[0] & 0x7FFF, self._driver[0] >> 15
        if offset >= self.size:
            self.remarks.append(("DRV-PACKED-40", f"driver event offset {offset} in a ring of {self.size}"))
            return True
        position = old + (offset - old) % self.size
        return position < self.used and self._wrap(position) == wrap

    def suppress_kicks(self) -> None:
        """2.8.10: device event flags 1."""
        self._device[1] = spec.EVENT_FLAGS_DISABLE
        self._wrote()

    def enable_kicks(self) -> bool:
        """2.8.10: device event flags 0, or 2 with the next position; then look again."""
        if self.event_idx:
            self._device[0] = self.available % self.size | self._wrap(self.available) << 15
            fence()  # position before the flags that make it valid
            self._device[1] = spec.EVENT_FLAGS_DESC
        else:
            self._device[1] = spec.EVENT_FLAGS_ENABLE
        self._wrote()
        fence()  # event suppression before descriptor flags: pairs with the driver's barrier of 2.8.21.3.1
        if self.strict:
            self.told = self.exposed()
        return self._is_available(self.available)

    def check_notification(self, next_off: int, next_wrap: int, exact: bool) -> None:
        """2.9: ring position and wrap counter of the next descriptor to be made available."""
        told = f"notification data says position {next_off}, wrap {next_wrap}"
        if next_off >= self.size:
            raise DriverFault("DRV-PACKED-46", f"{told} in a ring of {self.size}")
        position = self.available + (next_off - self.available) % self.size
        if self._wrap(position) != next_wrap:
            position += self.size
        if position > self.used + self.size or (
            position > self.available and not self._is_available(position - 1)
        ):
            raise DriverFault("DRV-PACKED-06", f"{told}, which is not available yet")
        if exact and position < self.used + self.size and self._is_available(position):
            raise DriverFault("DRV-PACKED-06", f"{told}, which was made available already")
