"""What a live virtqueue holds at this moment: ring memory together with the driver's private half of it.

Ring memory alone does not tell which descriptors are free and which are the device's; the driver's shadow
does. Nothing here writes to the queue.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from ..spec import features as ft
from ..spec.ring import (
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    PACKED_DESC_F_AVAIL,
    PACKED_DESC_F_USED,
)
from ..virtqueue.layout import PackedRings, SplitRings
from ..virtqueue.queue import DESC_BYTES, Virtqueue


class State(Enum):
    """Whose turn it is with an entry of a ring."""

    FREE = "free"
    PLACED = "placed"
    DEVICE = "device"
    USED = "used"
    SKIPPED = "skipped"
    READ = "read"

    @property
    def text(self) -> str:
        """In words."""
        return {
            State.FREE: "free",
            State.PLACED: "placed, not published",
            State.DEVICE: "with the device",
            State.USED: "used, not taken back",
            State.SKIPPED: "skipped by the device",
            State.READ: "read before, kept for a used descriptor",
        }[self]


@dataclass(slots=True)
class Row:
    """A descriptor.

    Attributes:
        address: bus address.
        length: bytes.
        flags: as in the ring.
        link: ``next`` of a split descriptor, ``id`` of a packed one.
        state: whose turn it is.
        following: the descriptor that a chain, or the free list, goes on with; None: the last one.
        owner: id of the buffer in flight that it belongs to, or that it returns.
    """

    address: int
    length: int
    flags: int
    link: int
    state: State = State.FREE
    following: int | None = None
    owner: int | None = None


@dataclass(slots=True)
class Entry:
    """An entry of the available or used ring.

    Attributes:
        id: head of the buffer.
        length: used length in bytes; None in the available ring.
        state: FREE: nothing, or what an earlier lap left.
        written: whether it was written since the rings were new.
    """

    id: int
    length: int | None
    state: State = State.FREE
    written: bool = False


@dataclass(slots=True)
class Buffer:
    """A buffer in flight.

    Attributes:
        id: its number.
        count: ring descriptors it takes.
        writable: bytes that the device may write.
        turn: buffers added before it.
        state: whose turn it is.
        table: entries of its indirect table; empty without one.
        table_address: bus address of that table.
    """

    id: int
    count: int
    writable: int
    turn: int
    state: State
    table: list[Row] = field(default_factory=list)
    table_address: int = 0


@dataclass(slots=True)
class RingState:
    """Everything a picture of a queue needs.

    Attributes:
        size, packed, features: of the queue.
        rows: the descriptor table or ring.
        avail, used: entries of the two rings of a split queue; empty for a packed one.
        fields: named words of the driver and device area, as in ``spec.ring``.
        buffers: in flight, oldest first.
        free: ids of the free list, first one first.
        free_rows: free descriptors; a packed ring's free ids are more, where buffers take several.
        added, published, reaped: buffers since the start.
        next_avail, next_used: packed: the driver's positions, (offset, wrap counter).
    """

    size: int
    packed: bool
    features: int
    rows: list[Row]
    avail: list[Entry]
    used: list[Entry]
    fields: dict[str, int]
    buffers: list[Buffer]
    free: list[int]
    free_rows: int
    added: int
    published: int
    reaped: int
    next_avail: tuple[int, int] = (0, 1)
    next_used: tuple[int, int] = (0, 1)


def ring_state(queue: Virtqueue) -> RingState:
    """Look at a queue.

    Raises:
        UsageError: the queue is closed.
    """
    ffi, lib = queue.core_ffi, queue.core_lib
    shadow = ffi.new("struct gpv_shadow *")
    slots = ffi.new("struct gpv_shadow_slot[]", queue.size)
    code = lib.gpv_shadow_get(queue.handle, shadow, slots)
    if code < 0:
        queue._fail(code)
    rows = [Row(*desc) for desc in queue.desc.tolist()]
    if queue.packed:
        for row in rows:
            row.link, row.flags = row.flags, row.link
    state = RingState(
        size=queue.size,
        packed=queue.packed,
        features=queue.features,
        rows=rows,
        avail=[],
        used=[],
        fields={},
        buffers=[
            Buffer(id, slot.count, slot.writable, slot.turn, State.DEVICE)
            for id, slot in enumerate(slots)
            if slot.count
        ],
        free=[],
        free_rows=queue.free_slots,
        added=shadow.added,
        published=shadow.published,
        reaped=shadow.reaped,
    )
    state.buffers.sort(key=lambda buffer: buffer.turn)
    following = [slot.next for slot in slots]
    for number, buffer in enumerate(state.buffers):
        if buffer.turn >= state.published:
            buffer.state = State.PLACED
        elif number < shadow.batch_left:
            buffer.state = State.USED
    if isinstance(queue.rings, SplitRings):
        _split(state, queue.rings, following, shadow.batch_left)
    else:
        _packed(state, queue.rings, shadow)
    _free_list(state, shadow.free_head, following)
    _tables(state, queue)
    return state


def _by_id(state: RingState) -> dict[int, Buffer]:
    return {buffer.id: buffer for buffer in state.buffers}


def _batch(state: RingState, last: Buffer) -> list[Buffer]:
    """The buffers that a used element with this id returns (2.7.9, 2.8.8)."""
    if state.features >> ft.F_IN_ORDER & 1:
        return [b for b in state.buffers if b.state is State.DEVICE and b.turn <= last.turn]
    return [last]


def _split(state: RingState, rings: SplitRings, following: list[int], batch_left: int) -> None:
    size, buffers = state.size, _by_id(state)
    state.fields = {
        "avail.flags": int(rings.avail["flags"]),
        "avail.idx": int(rings.avail["idx"]),
        "used_event": int(rings.avail["used_event"]),
        "used.flags": int(rings.used["flags"]),
        "used.idx": int(rings.used["idx"]),
        "avail_event": int(rings.used["avail_event"]),
    }
    state.avail = [Entry(int(head), None) for head in rings.avail["ring"]]
    state.used = [Entry(int(e["id"]), int(e["len"])) for e in rings.used["ring"]]
    pending = min((state.fields["used.idx"] - state.reaped) & 0xFFFF, size)
    for turn in range(max(0, state.reaped + pending - size), state.reaped + pending):
        state.used[turn % size].written = True
    for turn in range(state.reaped, state.reaped + batch_left):
        state.used[turn % size].state = State.SKIPPED
    turn = state.reaped + batch_left
    while turn < state.reaped + pending:
        entry = state.used[turn % size]
        entry.state = State.USED
        batch = _batch(state, buffers[entry.id]) if entry.id in buffers else []
        turn += max(1, len(batch))
        for skipped, buffer in enumerate(batch):
            if buffer.state is State.DEVICE:
                buffer.state = State.USED
            if skipped and turn - len(batch) + skipped < state.reaped + pending:
                state.used[(turn - len(batch) + skipped) % size].state = State.SKIPPED
    for turn in range(max(0, state.added - size), state.added):
        entry = state.avail[turn % size]
        entry.written = True
        owner = buffers.get(entry.id)
        if owner is not None and owner.turn == turn:
            entry.state = owner.state
    for buffer in state.buffers:
        place = buffer.id
        for number in range(buffer.count):
            state.rows[place].state = buffer.state
            state.rows[place].owner = buffer.id
            state.rows[place].following = following[place] if number + 1 < buffer.count else None
            place = following[place]


def _packed(state: RingState, rings: PackedRings, shadow: Any) -> None:
    size = state.size
    state.fields = {
        "driver.desc": int(rings.driver["desc"]),
        "driver.flags": int(rings.driver["flags"]),
        "device.desc": int(rings.device["desc"]),
        "device.flags": int(rings.device["flags"]),
    }
    state.next_avail = shadow.next_avail & 0x7FFF, shadow.next_avail >> 15
    state.next_used = shadow.next_used & 0x7FFF, shadow.next_used >> 15
    start, wrap = state.next_used
    taken = size - state.free_rows
    states = [State.DEVICE] * (taken - shadow.unpublished) + [State.PLACED] * shadow.unpublished
    buffers = _by_id(state)
    at = sum(buffer.count for buffer in state.buffers if buffer.state is State.USED)
    states[:at] = [State.SKIPPED] * at
    while at < taken - shadow.unpublished:
        row = state.rows[(start + at) % size]
        lap = wrap ^ (start + at >= size)
        marks = bool(row.flags & PACKED_DESC_F_AVAIL), bool(row.flags & PACKED_DESC_F_USED)
        last = buffers.get(row.link)
        if marks != (bool(lap), bool(lap)) or last is None:
            break
        step = 0
        for buffer in _batch(state, last):
            if buffer.state is State.DEVICE:
                buffer.state = State.USED
            step += buffer.count
        step = min(max(1, step), taken - shadow.unpublished - at)
        states[at : at + step] = [State.USED] + [State.SKIPPED] * (step - 1)
        at += step
    owners = _owners(state, taken)
    for number, entry in enumerate(states):
        row = state.rows[(start + number) % size]
        row.state, row.owner = entry, owners[number]
        if entry is State.USED:
            row.owner = row.link
        elif entry is State.DEVICE and (row.owner is None or buffers[row.owner].state is not State.DEVICE):
            row.state = State.READ
        elif entry in (State.DEVICE, State.PLACED) and row.flags & DESC_F_NEXT:
            row.following = (start + number + 1) % size


def _owners(state: RingState, taken: int) -> list[int | None]:
    """Ids of the buffers behind the taken places of a packed ring, from next_used on.

    The newest buffers stand last, in the order in which they were added. Before one that came back the places
    are no longer anybody's: the device has read all of them, and keeps them for used descriptors.
    """
    owners: list[int | None] = [None] * taken
    turn, at = state.added - 1, taken
    for buffer in reversed(state.buffers):
        if buffer.turn != turn or buffer.count > at:
            break
        owners[at - buffer.count : at] = [buffer.id] * buffer.count
        turn, at = turn - 1, at - buffer.count
    return owners


def _free_list(state: RingState, head: int, following: list[int]) -> None:
    """The ids that can be given out, in that order; with IN_ORDER simply the next positions."""
    busy = {buffer.id for buffer in state.buffers}
    if state.features >> ft.F_IN_ORDER & 1:
        state.free = [(head + number) % state.size for number in range(state.free_rows)]
    else:
        count = state.size - len(busy) if state.packed else state.free_rows
        while len(state.free) < count:
            state.free.append(head)
            head = following[head]
    if not state.packed:
        for place, after in zip(state.free, state.free[1:], strict=False):
            state.rows[place].following = after


def _tables(state: RingState, queue: Virtqueue) -> None:
    """Entries of the indirect tables of buffers in flight, from the memory that the driver keeps for them."""
    if len(queue._buffers) < 2:
        return
    memory = queue._buffers[1]
    entries = min(queue.size, queue._indirect_entries)
    for buffer, place in _indirect_places(state):
        row = state.rows[place]
        start = buffer.id * entries * DESC_BYTES
        if row.address != memory.address + start or row.length > entries * DESC_BYTES:
            continue
        buffer.table_address = row.address
        table = np.frombuffer(memory.array[start : start + row.length].tobytes(), queue.desc.dtype)
        for number, (address, length, third, fourth) in enumerate(table.tolist()):
            flags, link = (fourth, third) if queue.packed else (third, fourth)
            more = number + 1 < len(table)
            buffer.table.append(Row(address, length, flags, link, buffer.state, number + 1 if more else None))


def _indirect_places(state: RingState) -> Iterator[tuple[Buffer, int]]:
    """Each buffer whose descriptor refers to a table, and where that descriptor is."""
    buffers = _by_id(state)
    for place, row in enumerate(state.rows):
        if row.flags & DESC_F_INDIRECT and row.owner is not None and row.state is not State.USED:
            yield buffers[row.owner], place


def flag_names(flags: int) -> str:
    """NEXT, WRITE and INDIRECT, as far as they are set."""
    names = ((DESC_F_NEXT, "NEXT"), (DESC_F_WRITE, "WRITE"), (DESC_F_INDIRECT, "INDIRECT"))
    return " ".join(name for bit, name in names if flags & bit)
