"""A picture of a live virtqueue: its rings, whose turn it is with each entry, and the driver's own half."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Final

from ..spec import features as ft
from ..spec.ring import EVENT_FLAGS_DESC, PACKED_DESC_F_AVAIL, PACKED_DESC_F_USED
from ..virtqueue.queue import DESC_BYTES, Virtqueue
from .rings import Buffer, RingState, Row, State, flag_names, ring_state
from .svg import Drawing

WIDTH: Final = 1040
MARGIN: Final = 16
HIGH: Final = 24
"""Height of a row."""
TOP: Final = 76
LIMIT: Final = 40
"""Rows drawn of a large ring: those in use and their neighbours, up to this many."""
IDS: Final = 90
"""Characters of the free list that are written down."""
NAME: Final = 10
"""Characters of a buffer's name that fit into a row."""
TABLES: Final = 4
"""Indirect tables drawn."""

FILL: Final = {
    State.FREE: "free",
    State.PLACED: "placed",
    State.DEVICE: "with",
    State.USED: "used",
    State.SKIPPED: "used",
    State.READ: "with",
}
SHORT: Final = {
    State.FREE: "free",
    State.PLACED: "placed",
    State.DEVICE: "device",
    State.USED: "used",
    State.SKIPPED: "skipped",
    State.READ: "read before",
}
SUPPRESSION: Final = {0: "ENABLE", 1: "DISABLE", 2: "DESC"}


def ring_picture(
    queue: Virtqueue,
    *,
    title: str = "",
    names: Mapping[int, str] | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Draw a virtqueue as it is now.

    Ring memory is read once and nothing is written. A large ring is drawn around the entries in use.

    Args:
        queue: any open virtqueue, of the calling thread or one that rests.
        title: heading; by default the queue's name.
        names: buffer id -> what to call the buffer; by default its number.
        notes: lines of text below the picture.

    Returns:
        An SVG document, readable in light and dark mode, with a description in words.

    Raises:
        UsageError: the queue is closed.
    """
    state = ring_state(queue)
    return _Picture(state, title or queue.name, names or {}, notes).draw()


class _Picture:
    def __init__(self, state: RingState, title: str, names: Mapping[int, str], notes: Sequence[str]) -> None:
        self.state = state
        self.title = title
        self.names = names
        self.notes = notes
        self.page = Drawing(WIDTH)
        self.shown = _shown(state)

    def draw(self) -> str:
        state, page = self.state, self.page
        page.text(MARGIN, 32, self.title, size=18, bold=True, sans=True)
        page.text(MARGIN, 53, self._subtitle(), size=12.5, sans=True, colour="quiet")
        bottom = self._packed() if state.packed else self._split()
        bottom = self._indirect_tables(bottom)
        bottom = self._private(bottom + 14)
        bottom = self._notes(bottom)
        bottom = self._legend(bottom)
        return page.svg(bottom, self.title, self._description())

    def _subtitle(self) -> str:
        state = self.state
        options = [
            ft.feature_name(None, bit).removeprefix("VIRTIO_F_")
            for bit in (
                ft.F_INDIRECT_DESC,
                ft.F_EVENT_IDX,
                ft.F_IN_ORDER,
                ft.F_NOTIFICATION_DATA,
                ft.F_ORDER_PLATFORM,
            )
            if state.features >> bit & 1
        ]
        kind = "packed virtqueue (2.8)" if state.packed else "split virtqueue (2.7)"
        return " · ".join([kind, _many(state.size, "entry", "entries"), *options])

    def _name(self, id: int) -> str:
        return self.names.get(id, f"buffer {id}")

    # Split: the available ring, the descriptor table and the used ring, side by side.

    def _split(self) -> float:
        state, page = self.state, self.page
        event = bool(state.features >> ft.F_EVENT_IDX & 1)
        left, middle, right = MARGIN, 262, 824
        wide, table, narrow = 186, 474, WIDTH - MARGIN - 824
        self._heading(left, "Available ring", "driver area: the driver writes", "driver")
        self._heading(middle, "Descriptor table", "descriptor area: the driver writes", "driver")
        self._heading(right, "Used ring", "device area: the device writes", "device")
        first = TOP + 26
        fields = state.fields
        for x, w, side, where in ((left, wide, "driver", "avail"), (right, narrow, "device", "used")):
            self._field(x, first, w, "flags", str(fields[f"{where}.flags"]), side)
            self._field(x, first + HIGH, w, "idx", f"0x{fields[f'{where}.idx']:04x}", side, bold=True)
        columns = ((0, "#"), (40, "addr"), (148, "len"), (194, "flags"), (286, "next"), (328, "buffer"))
        for offset, name in columns:
            page.text(middle + offset + 8, first + HIGH + 16, name, colour="quiet", size=11.5)
        y = first + 2 * HIGH
        middles: dict[int, float] = {}
        for number in self.shown:
            if number is None:
                for x, w in ((left, wide), (middle, table), (right, narrow)):
                    page.text(x + w / 2, y + 16, "⋮", colour="quiet", anchor="middle")
            else:
                middles[number] = y + HIGH / 2
                self._split_row(number, y, (left, wide), (middle, table), (right, narrow))
            y += HIGH
        absent = "not used"
        for x, w, side, name in (
            (left, wide, "driver", "used_event"),
            (right, narrow, "device", "avail_event"),
        ):
            self._field(x, y, w, name, f"0x{fields[name]:04x}" if event else absent, side, bold=event)
        for slot, entry in enumerate(state.avail):
            if entry.state is not State.FREE and slot in middles and entry.id in middles:
                a, b = middles[slot], middles[entry.id]
                page.arrow(_flow(left + wide, a, middle - 2, b), "driver")
        for slot, entry in enumerate(state.used):
            if entry.state is State.USED and slot in middles and entry.id in middles:
                page.arrow(_flow(right, middles[slot], middle + table + 3, middles[entry.id]), "device")
        self._links(middle + table, middles)
        return y + HIGH

    def _split_row(
        self, number: int, y: float, left: tuple[int, int], middle: tuple[int, int], right: tuple[int, int]
    ) -> None:
        state, page = self.state, self.page
        entry, element = state.avail[number], state.used[number]
        label = f"ring[{number}]" if state.size <= 16 else f"[{number}]"
        page.box(left[0], y, left[1], HIGH, fill=FILL[entry.state], stroke="driver")
        page.text(left[0] + 8, y + 16, label, colour="quiet")
        colour = "ink" if entry.state is not State.FREE else "quiet"
        page.text(left[0] + 104, y + 16, str(entry.id) if entry.written else "·", colour=colour)
        if entry.written and entry.state is State.FREE:
            page.text(left[0] + 136, y + 16, "past", colour="quiet", size=11)
        page.box(right[0], y, right[1], HIGH, fill=FILL[element.state], stroke="device")
        page.text(right[0] + 8, y + 16, label, colour="quiet")
        if element.state is State.SKIPPED:
            page.text(right[0] + 70, y + 16, "not written", colour="quiet", size=11)
        elif element.written:
            colour = "ink" if element.state is State.USED else "quiet"
            page.text(right[0] + 70, y + 16, f"id {element.id}", colour=colour)
            page.text(right[0] + 130, y + 16, f"len {element.length}", colour=colour)
        row = state.rows[number]
        x = middle[0]
        page.box(x, y, middle[1], HIGH, fill=FILL[row.state], stroke="driver")
        colour = "ink" if row.state is not State.FREE else "quiet"
        page.text(x + 8, y + 16, str(number), colour="quiet")
        if row.length or row.state is not State.FREE:
            page.text(x + 48, y + 16, f"{row.address:#x}", colour=colour)
            page.text(x + 156, y + 16, str(row.length), colour=colour)
            page.text(x + 202, y + 16, flag_names(row.flags), colour=colour, size=11.5)
            page.text(x + 294, y + 16, str(row.link) if row.flags & 1 else "·", colour=colour)
        page.text(x + 336, y + 16, self._whose(row), colour=colour, size=11.5)

    def _whose(self, row: Row) -> str:
        if row.owner is None or row.state in (State.SKIPPED, State.READ):
            return SHORT[row.state]
        name = self._name(row.owner)
        return f"{name if len(name) <= NAME else name[: NAME - 1] + '…'}: {SHORT[row.state]}"

    # Packed: one ring, two event suppression structures, and the driver's two positions.

    def _packed(self) -> float:
        page = self.page
        left, table, right = 188, 572, 834
        narrow = WIDTH - MARGIN - right
        self._heading(left, "Descriptor ring", "descriptor area: both sides write", "ink")
        first = TOP + 26
        columns = (
            (0, "#"),
            (40, "addr"),
            (146, "len"),
            (198, "id"),
            (234, "AVAIL"),
            (284, "USED"),
            (328, "flags"),
            (440, "buffer"),
        )
        for offset, name in columns:
            page.text(left + offset + 8, first + 16, name, colour="quiet", size=11.5)
        y: float = first + HIGH
        middles: dict[int, float] = {}
        for number in self.shown:
            if number is None:
                page.text(left + table / 2, y + 16, "⋮", colour="quiet", anchor="middle")
            else:
                middles[number] = y + HIGH / 2
                self._packed_row(number, y, left, table)
            y += HIGH
        self._positions(left, middles)
        self._links(left + table, middles)
        self._event(right, first, narrow, "Driver event suppression", "driver")
        below = self._event(right, first + 5 * HIGH, narrow, "Device event suppression", "device")
        return max(y, below)

    def _packed_row(self, number: int, y: float, x: int, width: int) -> None:
        state, page = self.state, self.page
        row = state.rows[number]
        marks = bool(row.flags & PACKED_DESC_F_AVAIL), bool(row.flags & PACKED_DESC_F_USED)
        written = bool(row.flags or row.address)
        by_device = marks[0] == marks[1]
        page.box(x, y, width, HIGH, fill=FILL[row.state], stroke="line")
        if written:
            page.bar(x, y, 4, HIGH, "device" if by_device else "driver")
        colour = "ink" if row.state in (State.PLACED, State.DEVICE, State.USED) else "quiet"
        page.text(x + 10, y + 16, str(number), colour="quiet")
        if written:
            page.text(x + 48, y + 16, f"{row.address:#x}", colour="quiet" if by_device else colour)
            page.text(x + 154, y + 16, str(row.length), colour=colour)
            page.text(x + 206, y + 16, str(row.link), colour=colour)
            page.text(x + 256, y + 16, str(int(marks[0])), colour=colour, bold=True)
            page.text(x + 302, y + 16, str(int(marks[1])), colour=colour, bold=True)
            page.text(x + 336, y + 16, flag_names(row.flags), colour=colour, size=11.5)
        page.text(x + 448, y + 16, self._whose(row), colour=colour, size=11.5)

    def _positions(self, x: float, middles: Mapping[int, float]) -> None:
        """The driver's places in the ring, each with its wrap counter; it cannot know the device's."""
        places = {"next_used": self.state.next_used, "next_avail": self.state.next_avail}
        same = places["next_used"][0] == places["next_avail"][0]
        for name, (offset, wrap) in places.items():
            if offset not in middles:
                continue
            y = middles[offset] + (0 if not same else -7 if name == "next_used" else 7)
            self.page.text(MARGIN, y + 4, f"{name}, wrap {wrap}", colour="driver", size=11.5)
            self.page.arrow(f"M{MARGIN + 136} {y:g}H{x - 2}", "driver")

    def _event(self, x: float, y: float, width: float, title: str, side: str) -> float:
        fields = self.state.fields
        place, flags = fields[f"{side}.desc"], fields[f"{side}.flags"]
        self.page.text(x, y - 14, title, sans=True, bold=True, size=13, colour=side)
        self.page.text(x, y + 2, f"{side} area: the {side} writes", sans=True, size=11.5, colour="quiet")
        y += 10
        where = f"{place & 0x7FFF}, wrap {place >> 15}" if flags == EVENT_FLAGS_DESC else "·"
        self._field(x, y, width, "position", where, side, bold=flags == EVENT_FLAGS_DESC)
        self._field(x, y + HIGH, width, "flags", f"{flags} {SUPPRESSION.get(flags, '?')}", side)
        return y + 2 * HIGH

    # What both formats have.

    def _heading(self, x: float, title: str, area: str, colour: str) -> None:
        self.page.text(x, TOP + 4, title, sans=True, bold=True, size=13, colour=colour)
        self.page.text(x, TOP + 20, area, sans=True, size=11.5, colour="quiet")

    def _field(
        self, x: float, y: float, width: float, name: str, value: str, side: str, *, bold: bool = False
    ) -> None:
        self.page.box(x, y, width, HIGH, fill="paper", stroke=side)
        self.page.text(x + 8, y + 16, name, colour="quiet")
        words = value.startswith("not")
        self.page.text(
            x + 104, y + 16, value, bold=bold, size=11 if words else 12.5, colour="quiet" if words else "ink"
        )

    def _links(self, x: float, middles: Mapping[int, float]) -> None:
        """Chains, and the free list, on the right of the descriptors."""
        for number, row in enumerate(self.state.rows):
            if row.following is None or number not in middles or row.following not in middles:
                continue
            a, b = middles[number] + 3, middles[row.following] - 3
            if b < a:
                a, b = a - 6, b + 6
            bulge = 14 + 5 * min(abs(row.following - number), 9)
            free = row.state is State.FREE
            path = f"M{x:g} {a:g}C{x + bulge:g} {a:g} {x + bulge:g} {b:g} {x + 2:g} {b:g}"
            self.page.arrow(path, "quiet" if free else "driver", dashed=free)

    def _indirect_tables(self, y: float) -> float:
        page = self.page
        tables = [buffer for buffer in self.state.buffers if buffer.table]
        high = 0.0
        for number, buffer in enumerate(tables[:TABLES]):
            if number % 2 == 0:
                y += high
            x = MARGIN + number % 2 * 520
            self._indirect_table(x, y + 34, buffer)
            high = 46 + HIGH * (1 + len(buffer.table))
        if len(tables) > TABLES:
            page.text(
                MARGIN,
                y + high + 10,
                f"{len(tables) - TABLES} more indirect tables are not drawn.",
                sans=True,
                colour="quiet",
            )
            high += 20
        return y + high

    def _indirect_table(self, x: float, y: float, buffer: Buffer) -> None:
        page, packed = self.page, self.state.packed
        size = DESC_BYTES * len(buffer.table)
        page.text(
            x, y, f"Indirect table of {self._name(buffer.id)}", sans=True, bold=True, size=13, colour="driver"
        )
        page.text(
            x + 250, y, f"{size} bytes at {buffer.table_address:#x}", sans=True, size=11.5, colour="quiet"
        )
        columns = (
            (0, "#"),
            (34, "addr"),
            (146, "len"),
            (210, "flags"),
            *(() if packed else ((310, "next"),)),
        )
        for offset, name in columns:
            page.text(x + offset + 8, y + 22, name, colour="quiet", size=11.5)
        for number, row in enumerate(buffer.table):
            top = y + 30 + HIGH * number
            page.box(x, top, 400, HIGH, fill=FILL[row.state], stroke="driver")
            page.text(x + 8, top + 16, str(number), colour="quiet")
            page.text(x + 42, top + 16, f"{row.address:#x}")
            page.text(x + 154, top + 16, str(row.length))
            page.text(x + 218, top + 16, flag_names(row.flags), size=11.5)
            if not packed:
                page.text(x + 318, top + 16, str(row.link) if row.flags & 1 else "·")

    def _private(self, y: float) -> float:
        """The driver's own memory, which decides."""
        page = self.page
        lines = self._private_lines()
        page.box(
            MARGIN,
            y,
            WIDTH - 2 * MARGIN,
            32 + 18 * len(lines),
            fill="paper",
            stroke="driver",
            radius=6,
            dashed=True,
        )
        page.text(
            MARGIN + 12,
            y + 20,
            "The driver's own memory, which the device cannot reach",
            sans=True,
            bold=True,
            size=13,
        )
        for number, line in enumerate(lines):
            page.text(MARGIN + 12, y + 41 + 18 * number, line, size=12)
        return y + 32 + 18 * len(lines)

    def _private_lines(self) -> list[str]:
        state = self.state
        lines = [
            f"buffers so far: {state.added} added, {state.published} published, {state.reaped} taken back"
        ]
        for buffer in state.buffers[:8]:
            parts = _many(buffer.count, "descriptor", "descriptors")
            lines.append(
                f"id {buffer.id}  {self._name(buffer.id)}: {parts},"
                f" the device may write {_many(buffer.writable, 'byte', 'bytes')}; {buffer.state.text}"
            )
        if len(state.buffers) > 8:
            lines.append(f"and {len(state.buffers) - 8} more in flight")
        ids = textwrap.shorten(" → ".join(map(str, state.free)), IDS, placeholder=" …")
        if state.packed:
            free = f"{_many(state.free_rows, 'descriptor', 'descriptors')} free; free ids: {ids or 'none'}"
        else:
            free = f"free list: {ids or 'empty'}   ({_many(state.free_rows, 'descriptor', 'descriptors')})"
        return [*lines, free]

    def _notes(self, y: float) -> float:
        for note in self.notes:
            for line in textwrap.wrap(note, 150):
                y += 19
                self.page.text(MARGIN, y + 6, line, sans=True, size=13)
            y += 3
        return y

    def _legend(self, y: float) -> float:
        y += 24
        x: float = MARGIN
        for state in (State.FREE, State.PLACED, State.DEVICE, State.USED):
            self.page.box(x, y, 18, 14, fill=FILL[state], stroke="quiet")
            self.page.text(x + 25, y + 12, state.text, sans=True, size=12, colour="quiet")
            x += 52 + 6.6 * len(state.text)
        for side in ("driver", "device"):
            self.page.bar(x, y, 4, 14, side)
            text = f"written by the {side}"
            self.page.text(x + 11, y + 12, text, sans=True, size=12, colour="quiet")
            x += 30 + 6.6 * len(text)
        return y + 30

    def _description(self) -> str:
        parts = [f"A {self._subtitle()}.", *(f"{line}." for line in self._private_lines())]
        for name, value in self.state.fields.items():
            parts.append(f"{name} is {value:#06x}.")
        return " ".join([*parts, *self.notes])


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}"


def _flow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A curve that leaves and arrives level."""
    bend = (x1 + x2) / 2
    return f"M{x1:g} {y1:g}C{bend:g} {y1:g} {bend:g} {y2:g} {x2:g} {y2:g}"


def _shown(state: RingState) -> list[int | None]:
    """The rows to draw; None where some are left out."""
    if state.size <= 16:
        return list(range(state.size))
    wanted = [number for number, row in enumerate(state.rows) if row.state is not State.FREE]
    wanted += [
        slot
        for ring in (state.avail, state.used)
        for slot, entry in enumerate(ring)
        if entry.state is not State.FREE
    ]
    wanted += [state.next_used[0], state.next_avail[0]] if state.packed else state.free[:2]
    near = sorted(
        {number + step for number in wanted for step in (-1, 0, 1) if 0 <= number + step < state.size}
    )
    rows: list[int | None] = []
    for number in near[:LIMIT]:
        if number and (not rows or rows[-1] != number - 1):
            rows.append(None)
        rows.append(number)
    return rows if rows and rows[-1] == state.size - 1 else [*rows, None]
