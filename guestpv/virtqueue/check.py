"""Invariants of a virtqueue that can be left on in tests: each operation is followed by a look at the rings.

The checker keeps its own copy of what each outstanding buffer has to look like in ring memory. A
difference that only the device can have made raises ``DeviceViolation``; one that the driver made raises
``InvariantBroken`` with the name of the invariant.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from guestpv.errors import DeviceViolation, GuestpvError
from guestpv.memory import DmaBuffer
from guestpv.spec import features as f
from guestpv.spec.ring import DESC_F_WRITE, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED

from .layout import PackedRings, SplitRings
from .queue import DESC_BYTES, Virtqueue


class InvariantBroken(GuestpvError):
    """The driver half itself is wrong; the message begins with the invariant's name."""

    code = "invariant"


@dataclass(slots=True)
class _Placed:
    """An outstanding buffer: its number of descriptors, where they still stand, and what they say."""

    count: int
    head: int
    places: list[int]
    rows: list[tuple[int, ...]]
    table: bytes

    def give_way(self, places: list[int]) -> None:
        """Forget the descriptors at these places."""
        left = [
            (place, row) for place, row in zip(self.places, self.rows, strict=True) if place not in places
        ]
        self.places, self.rows = [place for place, _ in left], [row for _, row in left]


class CheckedVirtqueue(Virtqueue):
    """A virtqueue that checks itself and its device after each operation. Slow: for tests.

    Invariants, by name:

    - ``disjoint``: no descriptor belongs to two outstanding buffers (DRV-SPLIT-50). In a packed ring a place
      is free once a used element was taken from it, even while the buffer that stood there is outstanding.
    - ``counted``: free descriptors and those of outstanding buffers add up to the queue size.
    - ``shape``: a buffer in the ring has the elements it was added with, readable ones first.
    - ``index``: available idx is the number of published buffers modulo 65536 (DRV-SPLIT-47, -49).
    - ``suppression``: the driver's own suppression fields hold defined values (DRV-SPLIT-17, DRV-PACKED-41).

    Raises:
        InvariantBroken: one of these does not hold.
        DeviceViolation: the device wrote where only the driver may, or wrote an undefined value.
    """

    def _build(self, size: int) -> None:
        super()._build(size)
        self._placed: dict[int, _Placed] = {}
        self._at = 0
        """Packed: where the next descriptor goes."""

    # Driver operations, each between two looks.

    def add(
        self, readable: Sequence[DmaBuffer] = (), writable: Sequence[DmaBuffer] = (), cookie: object = None
    ) -> int:
        self.check()
        token = super().add(readable, writable, cookie)
        read = [(part.address, part.length) for buffer in readable for part in buffer.segments]
        write = [(part.address, part.length) for buffer in writable for part in buffer.segments]
        self._place(token & 0xFFFF, read, write)
        self.check()
        return token

    def add_burst(
        self, addresses: NDArray[np.uint64], lengths: NDArray[np.uint32], writable_from: int
    ) -> NDArray[np.uint32]:
        self.check()
        slots = super().add_burst(addresses, lengths, writable_from)
        for row, slot in enumerate(slots.tolist()):
            elements = list(zip(addresses[row].tolist(), lengths[row].tolist(), strict=True))
            self._place(slot, elements[:writable_from], elements[writable_from:])
        self.check()
        return slots

    def publish(self) -> bool:
        self.check()
        kicked = super().publish()
        self.check()
        return kicked

    def completions(self) -> Iterator[tuple[int, int]]:
        self.check()
        for token, length in super().completions():
            self._placed.pop(token & 0xFFFF, None)
            self.check()
            yield token, length
            self.check()

    def reap_burst(self) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        self.check()
        ids, lengths = super().reap_burst()
        for slot in ids.tolist():
            self._placed.pop(slot, None)
        self.check()
        return ids, lengths

    def disable_interrupts(self) -> None:
        super().disable_interrupts()
        self.check()

    def enable_interrupts(self) -> bool:
        pending = super().enable_interrupts()
        self.check()
        return pending

    def drain(self) -> list[int]:
        tokens = super().drain()
        self._placed.clear()
        self._at = 0
        self.check()
        return tokens

    # The looks.

    def check(self) -> None:
        """Look at the rings now."""
        taken = [place for placed in self._placed.values() for place in placed.places]
        if len(set(taken)) != len(taken):
            twice = sorted(place for place in set(taken) if taken.count(place) > 1)
            raise InvariantBroken(f"disjoint: descriptors {twice} belong to two buffers", where=self.name)
        counted = sum(placed.count for placed in self._placed.values())
        if self.free_slots + counted != self.size:
            raise InvariantBroken(
                f"counted: {self.free_slots} free and {counted} taken descriptors of {self.size}",
                where=self.name,
            )
        if isinstance(self.rings, SplitRings):
            self._check_split(self.rings)
        else:
            self._check_packed(self.rings)
        for slot, placed in self._placed.items():
            if placed.table and self._table(slot, len(placed.table)) != placed.table:
                self._intruded(f"the indirect table of buffer {slot}", "2.7.5.3", "DEV-SPLIT-26")

    def _check_split(self, rings: SplitRings) -> None:
        published = self.core_lib.gpv_turns(self.handle) % 0x10000
        idx, flags = int(rings.avail["idx"]), int(rings.avail["flags"])
        if idx != published:
            raise InvariantBroken(
                f"index: available idx {idx:#06x}, published {published:#06x}", where=self.name
            )
        if flags > (0 if self._has(f.F_EVENT_IDX) else 1):
            raise InvariantBroken(f"suppression: available flags {flags:#x}", where=self.name)
        for slot, placed in self._placed.items():
            for place, row in zip(placed.places, placed.rows, strict=True):
                if rings.desc[place].tolist() != row:
                    self._intruded(f"descriptor {place} of buffer {slot}", "2.7.5.2", "DEV-SPLIT-06")
        if self._has(f.F_EVENT_IDX) and int(rings.used["flags"]):
            raise self._violation(f"used flags are {int(rings.used['flags']):#x}", "2.7.10.2", "DEV-SPLIT-20")

    def _check_packed(self, rings: PackedRings) -> None:
        mode = int(rings.driver["flags"])
        if mode > (2 if self._has(f.F_EVENT_IDX) else 1):
            raise InvariantBroken(f"suppression: driver event flags {mode:#x}", where=self.name)
        for slot, placed in self._placed.items():
            for place, row in zip(placed.places, placed.rows, strict=True):
                now = rings.desc[place].tolist()
                # A used descriptor may stand anywhere in the outstanding part; the core judges those.
                used = bool(now[3] & PACKED_DESC_F_AVAIL) == bool(now[3] & PACKED_DESC_F_USED)
                # The flags of a head wait for publish.
                same = now[:3] == row[:3] if place == placed.head else now == row
                if not used and not same:
                    self._intruded(f"descriptor {place} of buffer {slot}", "2.8.16", "DEV-PACKED-07")

    def _has(self, bit: int) -> bool:
        return bool(self.features >> bit & 1)

    def _violation(self, message: str, section: str, requirement: str) -> DeviceViolation:
        return DeviceViolation(message, section=section, requirement=requirement, where=self.name)

    def _intruded(self, what: str, section: str, requirement: str) -> None:
        raise self._violation(f"the device rewrote {what}", section, requirement)

    # What was added, as it has to stand in the ring.

    def _table(self, slot: int, length: int) -> bytes:
        start = self._table_start(slot)
        return self._buffers[1].array[start : start + length].tobytes()

    def _table_start(self, slot: int) -> int:
        return slot * min(self.size, self._indirect_entries) * DESC_BYTES

    def _place(self, slot: int, read: list[tuple[int, int]], write: list[tuple[int, int]]) -> None:
        """Record a buffer just added, and look whether it stands in the ring as it was added."""
        desc = self.rings.desc
        elements = [(*part, 0) for part in read] + [(*part, DESC_F_WRITE) for part in write]
        places = [self._at if self.packed else slot]
        table = b""
        if len(self._buffers) > 1 and desc[places[0]]["addr"] == self._buffers[1].address + self._table_start(
            slot
        ):
            table = self._table(slot, int(desc[places[0]]["len"]))
            found = [row.tolist() for row in np.frombuffer(table, desc.dtype)]
        else:
            for _ in elements[1:]:
                places.append((places[-1] + 1) % self.size if self.packed else int(desc[places[-1]]["next"]))
            found = [desc[place].tolist() for place in places]
        got = [(row[0], row[1], row[3 if self.packed else 2] & DESC_F_WRITE) for row in found]
        if self.packed and not table:
            got[0] = (*got[0][:2], elements[0][2])  # its flags wait for publish
        if got != elements:
            raise InvariantBroken(f"shape: buffer {slot} is {elements} and stands as {got}", where=self.name)
        if self.packed:
            for placed in self._placed.values():
                placed.give_way(places)
        rows = [desc[place].tolist() for place in places]
        self._placed[slot] = _Placed(len(places), places[0], places, rows, table)
        self._at = (self._at + len(places)) % self.size
