"""A queue for checks: buffers one way for both ring formats, every field within reach, everything noted."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from ..errors import GuestpvError
from ..memory import DmaBuffer
from ..spec import features as ft
from ..spec import ring as rs
from ..spec.status import Status
from ..virtqueue.queue import Virtqueue
from ..virtqueue.raw import Element, RawPacked, RawSplit

if TYPE_CHECKING:
    from .rig import Rig

BLINK: Final = 0.1
"""Seconds between two looks at the status of a device that should be working."""
MOST_SHOWN: Final = 8
"""Descriptors of a buffer that a line of evidence shows."""
PATIENCE: Final = 2.0
"""Seconds after which a device that is silent on something malformed counts as silent."""


class Queue:
    """One enabled virtqueue, filled by hand.

    Buffers take descriptors one after the other; nothing stops a check from overrunning the ring.

    Attributes:
        index, size, packed: of the queue.
        raw: ``RawSplit`` or ``RawPacked``: descriptors, suppression words, any field to any value.
        outstanding: ids made available and not yet seen used, oldest first, with their descriptors' number.
    """

    raw: Any

    def __init__(self, rig: Rig, ring: Virtqueue, features: int) -> None:
        self._rig = rig
        self.ring = ring
        self.index = ring.index
        self.size = ring.size
        self.features = features
        self.packed = ring.packed
        self.raw = RawPacked(ring) if ring.packed else RawSplit(ring)
        self.outstanding: dict[int, int] = {}
        self._next = 0
        self._ids = 0
        self._only_read: set[int] = set()
        self._table_written = True

    def buffer(self, size: int, fill: bytes = b"") -> DmaBuffer:
        """Memory that the device can reach."""
        return self._rig.buffer(size, fill)

    # Making buffers available.

    def elements(
        self, readable: Sequence[DmaBuffer] = (), writable: Sequence[DmaBuffer] = ()
    ) -> list[Element]:
        """The descriptors of a buffer as (bus address, length, flags), segment by segment."""
        return [
            (segment.address, segment.length, flag)
            for buffers, flag in ((readable, 0), (writable, rs.DESC_F_WRITE))
            for buffer in buffers
            for segment in buffer.segments
        ]

    def table(self, elements: Sequence[Element]) -> list[Element]:
        """An indirect table of these elements, as the one descriptor that refers to it."""
        memory = self._rig.buffer(16 * len(elements))
        rows = memory.array.view(rs.PACKED_DESC if self.packed else rs.SPLIT_DESC)
        for place, (address, length, flags) in enumerate(elements):
            if self.packed:
                rows[place] = (address, length, 0, flags)
            else:
                more = rs.DESC_F_NEXT if place + 1 < len(elements) else 0
                rows[place] = (address, length, flags | more, place + 1 if more else 0)
        self._rig.case.note(f"queue {self.index}: indirect table {_shown(elements)}")
        self._table_written = any(flags & rs.DESC_F_WRITE for _, _, flags in elements)
        return [(memory.address, 16 * len(elements), rs.DESC_F_INDIRECT)]

    def offer(self, elements: Sequence[Element], *, kick: bool = True) -> int:
        """Make one buffer of these elements available. Returns its head (split) or buffer id (packed)."""
        if self.packed:
            id = self._ids % self.size
            self._ids += 1
            self.raw.offer(elements, id)
        else:
            id = self.raw.chain(elements, self._next)
            self._next = (self._next + len(elements)) % self.size
            self.raw.offer(id)
        self.expect(id, elements)
        self._rig.case.note(f"queue {self.index}: offer id {id} {_shown(elements)}")
        if kick:
            self.kick()
        return id

    def expect(self, id: int, elements: Sequence[Element]) -> None:
        """Know of a buffer that ``raw`` made available; a table among its elements is the last one made."""
        self.outstanding[id] = len(elements)
        self._only_read.discard(id)
        if not any(
            self._table_written if flags & rs.DESC_F_INDIRECT else flags & rs.DESC_F_WRITE
            for _, _, flags in elements
        ):
            self._only_read.add(id)

    def add(
        self,
        readable: Sequence[DmaBuffer] = (),
        writable: Sequence[DmaBuffer] = (),
        *,
        indirect: bool = False,
        kick: bool = True,
    ) -> int:
        """Make one buffer available, by an indirect table if asked for. Returns its head or id."""
        elements = self.elements(readable, writable)
        return self.offer(self.table(elements) if indirect else elements, kick=kick)

    def kick(self) -> None:
        """Notify the device, asked for or not, with the data that the negotiated features want (2.9)."""
        value = self.index
        if self.ring._kick.value is not None:
            value = self.ring._kick.value
        if self.features >> ft.F_NOTIFICATION_DATA & 1:
            position = self.raw.offset | self.raw.wrap << 15 if self.packed else self.raw.idx
            value |= position << 16
        self._rig.case.note(f"queue {self.index}: notify {value:#x}")
        self.raw.notify(value)

    # Taking used ones.

    def used(self) -> list[tuple[int, int]]:
        """New used buffers as (id, length), unchecked.

        With IN_ORDER a device may show only the last of several used together; the others are given with
        length 0.
        """
        found = self._used_packed() if self.packed else self._used_split()
        for id, length in found:
            self._rig.case.note(f"queue {self.index}: used id {id}, {length} bytes")
        return found

    def _used_split(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = self.raw.used_entries()
        if self.features >> ft.F_IN_ORDER & 1 and len(found) > 1:
            ids = list(self.outstanding)[: len(found)]
            if {id for id, _ in found} != set(ids):
                # Some entries were not written: the batch tells how far the device is.
                lengths = dict(found)
                found = [(id, lengths.get(id, 0)) for id in ids]
        for id, _ in found:
            self.outstanding.pop(id, None)
        return found

    def _used_packed(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        while self.outstanding:
            first = next(iter(self.outstanding))
            entry = self.raw.used_entry(0)
            if entry is None:
                break
            id, length, flags = entry
            if id in self._only_read and not flags & rs.DESC_F_WRITE:
                # Reserved without the flag, and some devices leave the buffer's length there (2.8.4).
                length = 0
            group = [id]
            if self.features >> ft.F_IN_ORDER & 1 and id in self.outstanding and id != first:
                order = list(self.outstanding)
                group = order[: order.index(id) + 1]
            # An id that nobody gave out steps on by one, and the check sees it.
            self.raw.used_entry(sum(self.outstanding.pop(one, 1) for one in group))
            found += [(one, length if one == id else 0) for one in group]
        return found

    def wait(self, count: int = 1, limit: float | None = None) -> list[tuple[int, int]]:
        """Wait until ``count`` more buffers are used, and give them.

        Raises:
            AssertionError: they were not in time.
        """
        found: list[tuple[int, int]] = []
        rig = self._rig
        looked = rig.clock()

        def enough() -> bool:
            nonlocal looked
            found.extend(self.used())
            if len(found) < count and rig.clock() > looked + BLINK:
                looked = rig.clock()
                if rig.transport.status & Status.NEEDS_RESET:
                    found.extend(self.used())
                    assert len(found) >= count, (
                        f"{len(found)} of {count} buffers were used in queue {self.index} when the device set"
                        " DEVICE_NEEDS_RESET"
                    )
            return len(found) >= count

        self._rig.wait(enough, f"{count} used buffer(s) in queue {self.index}", limit)
        return found

    def run(
        self,
        readable: Sequence[DmaBuffer] = (),
        writable: Sequence[DmaBuffer] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """One buffer, all the way. Returns its used length.

        Raises:
            AssertionError: it was not used, or something else was.
        """
        id = self.add(readable, writable, indirect=indirect)
        ((used, length),) = self.wait()
        assert used == id, f"buffer {id} was made available, {used} came back"
        return length

    # Hostile use.

    def provoke(self, action: Callable[[], object] | None = None) -> str:
        """Do something malformed (default: kick) and see what the device makes of it.

        Returns:
            ``"used"``, ``"needs-reset"`` or ``"silent"``; the device being gone raises.
        """
        (action or self.kick)()
        end = self._rig.clock() + (0 if self._rig.synchronous else PATIENCE)
        while True:
            if self._rig.transport.status & Status.NEEDS_RESET:
                return "needs-reset"
            if self._moved():
                return "used"
            if self._rig.clock() >= end:
                return "silent"
            self._rig.pause()

    def _moved(self) -> bool:
        if self.packed:
            return self.raw.used_entry(0) is not None
        return bool(int(self.raw.used["idx"]) != self.raw.seen)

    # Interrupts.

    def interrupts(self) -> int:
        """Used buffer notifications since the last call, as far as the eventfd counts them."""
        fd = self.ring.interrupt_fd
        if fd is None:
            self._rig.case.not_observable("the queue has no interrupt here")
        if self._rig.interrupts_are_late:
            self._rig.settle()
        try:
            count = os.eventfd_read(fd)
        except BlockingIOError:
            return 0
        self._rig.case.note(f"queue {self.index}: {count} interrupt(s)")
        return count

    def wait_interrupt(self) -> int:
        """Wait for a used buffer notification.

        Raises:
            AssertionError: none came.
        """
        count = 0

        def came() -> bool:
            nonlocal count
            count += self.interrupts()
            return count > 0

        self._rig.wait(came, f"a used buffer notification of queue {self.index}")
        return count

    def suppress(self, off: bool = True) -> None:
        """Advise the device by flag to send no used buffer notifications, or to send them (2.7.7, 2.8.10)."""
        if self.packed:
            self.raw.driver["flags"] = rs.EVENT_FLAGS_DISABLE if off else rs.EVENT_FLAGS_ENABLE
        else:
            self.raw.avail["flags"] = rs.AVAIL_F_NO_INTERRUPT if off else 0
        self.raw.fence()

    def ask_at(self, position: int) -> None:
        """With EVENT_IDX: ask for a notification when the device uses the entry at ``position``.

        Args:
            position: free-running used idx (split), or offset | wrap << 15 (packed).
        """
        if not self.features >> ft.F_EVENT_IDX & 1:
            raise GuestpvError("EVENT_IDX was not negotiated")
        if self.packed:
            self.raw.driver["desc"] = position
            self.raw.fence()
            self.raw.driver["flags"] = rs.EVENT_FLAGS_DESC
        else:
            self.raw.avail["used_event"] = position & 0xFFFF
        self.raw.fence()


def _shown(elements: Sequence[Element]) -> str:
    names = ((rs.DESC_F_NEXT, "NEXT"), (rs.DESC_F_WRITE, "WRITE"), (rs.DESC_F_INDIRECT, "INDIRECT"))
    shown = [
        f"[{address:#x}/{length}{''.join(f' {name}' for bit, name in names if flags & bit)}]"
        for address, length, flags in elements
    ]
    if len(shown) > MOST_SHOWN:
        shown[MOST_SHOWN - 1 : -1] = [f"({len(shown) - MOST_SHOWN} more)"]
    return " ".join(shown)
