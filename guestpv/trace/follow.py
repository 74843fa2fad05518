"""From single accesses to ring memory to what they are for: a buffer is placed, made available, comes back.

One follower stands behind each queue and is shown every access of the core, in order: stores just before they
are done, loads with what they loaded. It only tells; the queue does not depend on it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from ..spec import features as feat
from ..spec.ring import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    EVENT_FLAGS_DESC,
    PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED,
)
from ..virtqueue.layout import SplitRings
from ..virtqueue.observed import Access, ObservedVirtqueue
from .meaning import Buffer, Element, Meanings, elements_json
from .record import DeviceTrace

USED_AND_AVAIL: Final = PACKED_DESC_F_AVAIL | PACKED_DESC_F_USED
EVENT_FLAGS: Final = {0: "ENABLE", 1: "DISABLE", 2: "DESC"}
Row = list[int]
"""Address, length and two more: flags and next (split), or id and flags (packed)."""


@dataclass(slots=True)
class Chain:
    """A buffer with the device.

    Attributes:
        buffer: its elements.
        slots: places in the descriptor table or ring that it has.
    """

    buffer: Buffer
    slots: list[int]


class Follower:
    """What both formats have in common."""

    def __init__(self, trace: DeviceTrace, queue: ObservedVirtqueue, meanings: Meanings) -> None:
        self.trace = trace
        self.queue = queue
        self.index = queue.index
        self.size = queue.size
        self.event_idx = bool(queue.features >> feat.F_EVENT_IDX & 1)
        self.in_order = bool(queue.features >> feat.F_IN_ORDER & 1)
        self._meanings = meanings
        self._chains: dict[int, Chain] = {}
        self._order: deque[int] = deque()
        self._rows: dict[int, Row] = {}
        self._table: dict[int, Row] = {}
        self._looks = 0

    def access(self, access: Access) -> None:
        """One access of the core."""
        if access.area == "table":
            self._collect(self._table, access)
        elif access.kind.startswith("load"):
            self._loaded(access)
        elif access.kind == "fence":
            text, section = self._fence_words()
            self._tell("fence", f"full fence{text}", section)
        else:
            self._stored(access)

    def _loaded(self, access: Access) -> None:
        raise NotImplementedError

    def _stored(self, access: Access) -> None:
        raise NotImplementedError

    def _fence_words(self) -> tuple[str, str]:
        raise NotImplementedError

    def _tell(self, kind: str, text: str, section: str, **facts: Any) -> None:
        self.flush()
        self.trace.tell(kind, text, section, queue=self.index, **facts)

    def _look(self) -> None:
        """The driver looked and found nothing new."""
        self._looks += 1

    def flush(self) -> None:
        """Tell about looks that found nothing, which are counted and not told one by one."""
        if self._looks:
            looks, self._looks = self._looks, 0
            text = "looks: nothing used" if looks == 1 else f"looks {looks} times: nothing used"
            self.trace.tell("poll", text, self._sections()[0], queue=self.index, count=looks)

    def _sections(self) -> tuple[str, str]:
        """Of taking used buffers, and of placing them."""
        raise NotImplementedError

    @staticmethod
    def _collect(rows: dict[int, Row], access: Access) -> None:
        place, part = divmod(access.offset, 16)
        row = rows.setdefault(place, [0, 0, 0, 0])
        if part == 0:
            row[0] = access.value
        elif part == 8:
            value = access.value
            row[1:] = [value & 0xFFFFFFFF, value >> 32 & 0xFFFF, value >> 48]

    def _place(self, number: int, rows: list[tuple[int, Row]], flags: int, **facts: Any) -> None:
        """A buffer is complete. ``flags`` is where flags stand in a row."""
        table = [row for _, row in sorted(self._table.items())]
        self._table.clear()
        indirect = bool(rows[0][1][flags] & DESC_F_INDIRECT)
        found = table if indirect else [row for _, row in rows]
        elements = [Element(row[0], row[1], bool(row[flags] & DESC_F_WRITE)) for row in found]
        buffer = self._meanings.buffer(elements)
        self._chains[number] = Chain(buffer, [slot for slot, _ in rows])
        self._order.append(number)
        words = self._meanings.added(self.index, self.trace.features, buffer)
        extra: dict[str, Any] = {"table": table} if indirect else {}
        section = self._sections()[1]
        if indirect:
            section += ", 2.8.7" if self.queue.packed else ", 2.7.5.3"
        if words and self._meanings.section:
            section += f", {self._meanings.section}"
        self._tell(
            "add",
            f"places buffer {number}: {words or _shape(elements)}",
            section,
            id=number,
            desc=[[slot, *row] for slot, row in rows],
            elements=elements_json(elements),
            meaning=words,
            data=self._data(elements, write=False),
            **extra,
            **facts,
        )

    def _data(self, elements: Sequence[Element], *, write: bool, length: int = 0) -> list[str]:
        return self._meanings.data(elements, write=write, most=self.trace.recorder.data, length=length)

    def _take(self, number: int, length: int, **facts: Any) -> int:
        """A used entry was read; descriptors that it gives back."""
        skipped: list[int] = []
        if self.in_order and number in self._order:
            while (oldest := self._order.popleft()) != number:
                skipped.append(oldest)
        elif number in self._order:
            self._order.remove(number)
        freed = 0
        for id in [*skipped, number]:
            chain = self._chains.pop(id, None)
            if chain is None:
                self._tell("reap", f"takes back buffer {id}, which the device never had", "", id=id, **facts)
                continue
            freed += len(chain.slots)
            used = chain.buffer.writable_bytes if id in skipped else length
            words = self._meanings.taken(self.index, self.trace.features, chain.buffer, used)
            text = f"takes back buffer {id}, {used} bytes written"
            if id in skipped:
                text += " (used together with a later one)"
            section = self._sections()[0]
            if words and self._meanings.section:
                section += f", {self._meanings.section}"
            self._tell(
                "reap",
                text + (f": {words}" if words else ""),
                section,
                id=id,
                length=used,
                meaning=words,
                slots=chain.slots,
                data=self._data(chain.buffer.elements, write=True, length=used),
                **(facts if id == number else {}),
            )
        return freed


class SplitFollower(Follower):
    """Split virtqueues (2.7)."""

    def __init__(self, trace: DeviceTrace, queue: ObservedVirtqueue, meanings: Meanings) -> None:
        super().__init__(trace, queue, meanings)
        assert isinstance(queue.rings, SplitRings)
        self._avail_idx = self._used_idx = self._taken_idx = 0
        self._before = 0
        self._entry = 0
        self._last_store = ""

    def _sections(self) -> tuple[str, str]:
        return "2.7.14", "2.7.13.1"

    def _fence_words(self) -> tuple[str, str]:
        if self._last_store == "idx":
            return ": idx is visible before the device's wish for a kick is read", "2.7.13.4.1"
        return ": the wish for an interrupt is visible before used idx is read again", "2.7.14"

    def _stored(self, access: Access) -> None:
        value, offset = access.value, access.offset
        if access.area == "desc":
            self._collect(self._rows, access)
        elif access.area != "driver":
            return
        elif offset == 2:
            self._last_store = "idx"
            old, self._avail_idx = self._avail_idx, value
            self._before = old
            self._tell("publish", f"avail idx {old} to {value}", "2.7.13.3", old=old, new=value)
        elif offset == 0:
            self._last_store = "flags"
            wanted = "no interrupts" if value & 1 else "interrupts"
            self._tell("want", f"avail flags {value}: wants {wanted}", "2.7.7", flags=value)
        elif offset == 4 + 2 * self.size:
            self._last_store = "event"
            away = (value - self._used_idx) & 0xFFFF
            past = "used idx is past it, so no interrupt before a lap"
            text = f"interrupt when used idx moves past {value}" if away < 0x8000 else past
            self._tell("want", f"used_event {value}: {text}", "2.7.7", used_event=value)
        else:
            self._made_available((offset - 4) // 2, value)

    def _made_available(self, position: int, head: int) -> None:
        rows, at = [], head
        while at in self._rows:
            row = self._rows.pop(at)
            rows.append((at, row))
            if not row[2] & DESC_F_NEXT:
                break
            at = row[3]
        self._rows.clear()
        if rows:
            self._place(head, rows, 2, avail=[position, head])

    def _loaded(self, access: Access) -> None:
        value, offset = access.value, access.offset
        if access.area != "device":
            return
        if offset == 2:
            if value == self._used_idx:
                if value == self._taken_idx:
                    self._look()
                return
            old, self._used_idx = self._used_idx, value
            self._tell("used", f"used idx {old} to {value}", "2.7.8, 2.7.14", old=old, new=value)
        elif offset == 0:
            kick = not value & 1
            self._decided(kick, f"used flags {value}", "2.7.10, 2.7.13.4", flags=value)
        elif offset == 4 + 8 * self.size:
            old, new = self._before, self._avail_idx
            kick = (new - value - 1) & 0xFFFF < (new - old) & 0xFFFF
            why = f"avail_event {value}, moved {old} to {new}"
            self._decided(kick, why, "2.7.10, 2.7.13.4", avail_event=value, old=old, new=new)
        elif (offset - 4) % 8 == 0:
            self._entry = value
        else:
            taken = len(self._chains)
            self._take(self._entry, value, used=[(offset - 8) // 8, self._entry, value])
            self._taken_idx = (self._taken_idx + max(1, taken - len(self._chains))) & 0xFFFF

    def _decided(self, kick: bool, why: str, section: str, **facts: Any) -> None:
        word = "needed" if kick else "suppressed"
        self._tell("decision", f"kick {word}: {why}", section, kick=kick, **facts)


class PackedFollower(Follower):
    """Packed virtqueues (2.8)."""

    def __init__(self, trace: DeviceTrace, queue: ObservedVirtqueue, meanings: Meanings) -> None:
        super().__init__(trace, queue, meanings)
        self._next, self._wrap = 0, 1
        self._next_used, self._used_wrap = 0, 1
        self._added = 0
        self._announced = False
        self._flags = self._entry = 0
        self._last_store = ""

    def _sections(self) -> tuple[str, str]:
        return "2.8.22", "2.8.21.1"

    def _fence_words(self) -> tuple[str, str]:
        if self._last_store == "flags":
            return ": flags are visible before the device's wish for a kick is read", "2.8.21.3.1"
        return ": the wish for an interrupt is visible before the ring is read again", "2.8.22"

    def _stored(self, access: Access) -> None:
        value = access.value
        place, part = divmod(access.offset, 16)
        if access.area == "desc" and access.width == 2:
            self._last_store = "flags"
            self._tell(
                "publish",
                f"flags of descriptor {place} {value:#06x}: {self._added} descriptors are available",
                "2.8.21.1.1",
                slot=place,
                flags=value,
                position=self._next,
                wrap=self._wrap,
            )
        elif access.area == "desc":
            self._collect(self._rows, access)
            if part == 8 and place == self._next:
                self._complete()
        elif access.area == "driver" and access.offset == 0:
            self._last_store = "event"
            text = f"driver event offset {value & 0x7FFF}, wrap {value >> 15}"
            self._tell("want", f"{text}: interrupt when that one is used", "2.8.10, 2.8.14", event=value)
        elif access.area == "driver":
            self._last_store = "event"
            wanted = {0: "interrupts", 1: "no interrupts", 2: "an interrupt at that place"}.get(value, "?")
            name = EVENT_FLAGS.get(value, "?")
            self._tell("want", f"driver event flags {name}: wants {wanted}", "2.8.10", flags=value)

    def _complete(self) -> None:
        """The head was stored, which is done last."""
        rows, place = [], self._next
        while place in self._rows:
            row = self._rows.pop(place)
            rows.append((place, row))
            place = (place + 1) % self.size
            if not row[3] & DESC_F_NEXT:
                break
        self._rows.clear()
        self._added += len(rows)
        self._wrap ^= self._next + len(rows) >= self.size
        self._next = place
        self._place(rows[0][1][2], rows, 3, position=self._next, wrap=self._wrap)

    def _loaded(self, access: Access) -> None:
        value = access.value
        place, part = divmod(access.offset, 16)
        if access.area == "device":
            if access.offset == 2:
                if value != EVENT_FLAGS_DESC or not self.event_idx:
                    name = EVENT_FLAGS.get(value, str(value))
                    self._decided(value == 0, f"device event flags {name}", flags=value)
            else:
                self._compare(value)
        elif access.area != "desc":
            return
        elif part == 14:
            self._flags = value
            expected = USED_AND_AVAIL if self._used_wrap else 0
            if value & USED_AND_AVAIL != expected or not self._chains:
                self._look()
            elif not self._announced:
                self._announced = True
                text = f"descriptor {place} is used: flags {value:#06x}"
                self._tell("used", text, "2.8.1, 2.8.22", slot=place, flags=value)
        elif part == 12:
            self._entry = value
        elif part == 8:
            self._back(place, value)

    def _back(self, place: int, length: int) -> None:
        chain = self._chains.get(self._entry)
        # Without WRITE len is reserved (2.8.4); one that cannot be meant counts as nothing written.
        if chain and not self._flags & DESC_F_WRITE and length > chain.buffer.writable_bytes:
            length = 0
        entry = [place, self._entry, length, self._flags]
        step = self._take(self._entry, length, used=entry)
        self._announced = False
        self._used_wrap ^= self._next_used + step >= self.size
        self._next_used = (self._next_used + step) % self.size

    def _compare(self, event: int) -> None:
        back = self._next - (event & 0x7FFF) + (self.size if event >> 15 != self._wrap else 0)
        why = (
            f"device event offset {event & 0x7FFF} wrap {event >> 15}, "
            f"{self._added} descriptors up to offset {self._next} wrap {self._wrap}"
        )
        self._decided(0 < back <= self._added, why, flags=EVENT_FLAGS_DESC, event=event)

    def _decided(self, kick: bool, why: str, **facts: Any) -> None:
        self._added = 0
        word = "needed" if kick else "suppressed"
        self._tell("decision", f"kick {word}: {why}", "2.8.10, 2.8.21.2", kick=kick, **facts)


def _shape(elements: Sequence[Element]) -> str:
    """``16 bytes to the device, 4097 from it``."""
    readable = sum(element.length for element in elements if not element.write)
    writable = sum(element.length for element in elements if element.write)
    parts = [f"{readable} bytes to the device"] if readable else []
    return ", ".join(parts + ([f"{writable} bytes from it"] if writable else []))


def follow(trace: DeviceTrace, queue: ObservedVirtqueue, meanings: Meanings) -> Follower:
    """The follower for the queue's format."""
    return (PackedFollower if queue.packed else SplitFollower)(trace, queue, meanings)
