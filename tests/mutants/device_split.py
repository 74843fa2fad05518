"""Broken devices: the split virtqueue."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.devices.evidence import DriverFault
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.ring import Chain
from guestpv.spec import ring as rs

from .device import mutant, replace
from .device_ring import (
    after_write,
    interrupts,
    on_enable,
    on_pop,
    on_push,
    writable_area,
)

SPLIT = "loopback:blk"
DESC = struct.Struct("<QIHH")
FLAGS, INDEX, RING = 0, 1, 2


def refuse(text: str) -> None:
    raise DriverFault("", text)


def entry(ring: Any, index: int) -> tuple[int, int, int, int]:
    """(addr, len, flags, next) of a descriptor of the table."""
    found: tuple[int, int, int, int] = DESC.unpack_from(ring._desc, 16 * index)
    return found


@mutant("DEV-SPLIT-01", spec=SPLIT)
def three_descriptors_are_enough(function: SoftwareFunction) -> None:
    """What comes after the third descriptor is forgotten, but for the last."""

    def look(_: Any, chain: Chain) -> None:
        if len(chain.elements) > 4:
            del chain.readable[1:]

    on_pop(function, look)


@mutant("DEV-SPLIT-27", spec=SPLIT)
def next_is_the_neighbour(function: SoftwareFunction) -> None:
    """next is taken to be the descriptor behind."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def walk(head: int) -> Chain:
                _, _, flags, following = entry(ring, head)
                if flags & rs.DESC_F_NEXT and following != (head + 1) % ring.size:
                    refuse("next leads elsewhere")
                chain: Chain = inner(head)
                return chain

            return walk

        replace(ring, "_walk", make)

    on_enable(function, change)


@mutant("DEV-SPLIT-03", spec=SPLIT)
def scribbles_on_readable_buffers(function: SoftwareFunction) -> None:
    """The first byte of a readable buffer is turned over when it is given back."""

    def scribble(ring: Any, chain: Chain, told: int) -> int:
        for address, _, write in chain.elements:
            if not write:
                ring.memory.view(address, 1, write=True)[0] ^= 0xFF
                break
        return told

    on_push(function, scribble)


@mutant("DEV-SPLIT-06", "DEV-SPLIT-26", spec=SPLIT)
def clears_descriptors(function: SoftwareFunction) -> None:
    """The descriptor table is cleared when a buffer was used."""
    after_write(function, lambda ring, queue: writable_area(queue, queue.desc, 16).__setitem__(0, 0xA5))


@mutant("DEV-SPLIT-26", spec=SPLIT)
def clears_available_entries(function: SoftwareFunction) -> None:
    """The available ring's unused entries are written to."""

    def scribble(ring: Any, queue: Any) -> None:
        area = writable_area(queue, queue.driver, 4 + 2 * ring.size)
        area[4 + 2 * (ring.popped % ring.size)] ^= 0x80

    after_write(function, scribble)


def refuse_heads(function: SoftwareFunction, wrong: Any) -> None:
    """Refuse chains whose descriptors, as (flags, next) along the table, are ``wrong``."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def walk(head: int) -> Chain:
                index, rows = head, []
                while True:
                    _, length, flags, following = entry(ring, index)
                    rows.append((flags, following, length))
                    if not flags & rs.DESC_F_NEXT or len(rows) > ring.size:
                        break
                    index = following
                if wrong(ring, rows):
                    refuse("not to its taste")
                chain: Chain = inner(head)
                return chain

            return walk

        replace(ring, "_walk", make)

    on_enable(function, change)


@mutant("DEV-SPLIT-07", spec=SPLIT)
def write_flag_of_a_table_counts(function: SoftwareFunction) -> None:
    """An indirect descriptor with WRITE is refused."""
    refuse_heads(
        function,
        lambda _, rows: any(flags & 6 == rs.DESC_F_INDIRECT | rs.DESC_F_WRITE for flags, _, _ in rows),
    )


@mutant("DEV-SPLIT-08", spec=SPLIT)
def tables_come_first_or_not_at_all(function: SoftwareFunction) -> None:
    """An indirect descriptor behind direct ones is refused."""
    refuse_heads(function, lambda _, rows: any(flags & rs.DESC_F_INDIRECT for flags, _, _ in rows[1:]))


@mutant("DEV-SPLIT-28", spec=SPLIT)
def next_always_counts(function: SoftwareFunction) -> None:
    """next has to be a descriptor also where NEXT is not set."""
    refuse_heads(function, lambda ring, rows: rows[-1][1] >= ring.size)


def read_tables(function: SoftwareFunction, change_table: Any) -> None:
    """Let ``change_table(bytes)`` say what an indirect table holds."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def table(address: int, length: int, rule: str) -> memoryview:
                return memoryview(change_table(bytes(inner(address, length, rule))))

            return table

        replace(ring, "_table", make)

    on_enable(function, change)


@mutant("DEV-SPLIT-29", spec=SPLIT)
def tables_are_lists(function: SoftwareFunction) -> None:
    """The entries of an indirect table are taken one after the other."""

    def straight(data: bytes) -> bytes:
        rows = [list(row) for row in DESC.iter_unpack(data)]
        for number, row in enumerate(rows):
            more = number + 1 < len(rows)
            row[2] = row[2] & rs.DESC_F_WRITE | (rs.DESC_F_NEXT if more else 0)
            row[3] = number + 1 if more else 0
        return b"".join(DESC.pack(*row) for row in rows)

    read_tables(function, straight)


@mutant("DEV-SPLIT-30", spec=SPLIT)
def tables_go_one_way(function: SoftwareFunction) -> None:
    """A table with readable and writable entries is refused."""

    def one_way(data: bytes) -> bytes:
        if len({row[2] & rs.DESC_F_WRITE for row in DESC.iter_unpack(data)}) > 1:
            refuse("mixed table")
        return data

    read_tables(function, one_way)


def take_slot(function: SoftwareFunction, slot: Any) -> None:
    """Take heads from ``ring[slot(ring)]``."""

    def change(ring: Any, _: Any) -> None:
        replace(ring, "_walk", lambda inner: lambda _: inner(ring._avail[RING + slot(ring)]))

    on_enable(function, change)


@mutant("DEV-SPLIT-31", "DEV-SPLIT-34", spec=SPLIT)
def slots_end_early(function: SoftwareFunction) -> None:
    """The last entry of the available ring is never looked at."""
    take_slot(function, lambda ring: ring.popped % (ring.size - 1))


@mutant("DEV-SPLIT-32", spec=SPLIT)
def starts_in_slot_1(function: SoftwareFunction) -> None:
    """The first head is taken from ring[1]."""
    take_slot(function, lambda ring: (ring.popped + 1) % ring.size)


@mutant("DEV-SPLIT-33", spec=SPLIT)
def stops_at_65535(function: SoftwareFunction) -> None:
    """The available index is followed no further than 65535."""

    def change(ring: Any, _: Any) -> None:
        replace(ring, "_pending", lambda inner: lambda: 0 if ring.popped >= 0xFFFF else inner())

    on_enable(function, change)


@mutant("DEV-SPLIT-36", spec=SPLIT)
def used_idx_leaves_out_0(function: SoftwareFunction) -> None:
    """After 65535 the used idx goes on with 1."""

    def late(ring: Any, _: Any) -> None:
        if ring.used > 0xFFFF:
            ring._used[INDEX] = (ring.used + 1) & 0xFFFF

    after_write(function, late)


@mutant("DEV-SPLIT-35", spec=SPLIT)
def length_before_id(function: SoftwareFunction) -> None:
    """id and len change places in used elements."""

    def swap(ring: Any, _: Any) -> None:
        at = 2 * ((ring.used - 1) % ring.size)
        ring._elements[at], ring._elements[at + 1] = ring._elements[at + 1], ring._elements[at]

    after_write(function, swap)


@mutant("DEV-SPLIT-37", spec=SPLIT)
def gives_back_the_neighbour(function: SoftwareFunction) -> None:
    """The used id is that of another descriptor."""

    def other(ring: Any, _: Any) -> None:
        at = 2 * ((ring.used - 1) % ring.size)
        ring._elements[at] = (ring._elements[at] + 1) % ring.size

    after_write(function, other)


@mutant("DEV-SPLIT-38", spec=SPLIT)
def counts_what_it_read(function: SoftwareFunction) -> None:
    """The used length is that of the whole chain."""
    on_push(function, lambda ring, chain, told: chain.readable_bytes + chain.writable_bytes)


@mutant("DEV-SPLIT-15", spec=SPLIT)
def idx_before_the_entry(function: SoftwareFunction) -> None:
    """Used elements are written after the idx that covers them: at the next notification."""

    def late(ring: Any, queue: Any) -> None:
        at = 2 * ((ring.used - 1) % ring.size)
        ring._elements[at] = ring._elements[at + 1] = 0xFFFFFFFF

    after_write(function, late)


@mutant("DEV-SPLIT-16", spec=SPLIT)
def idx_before_the_data(function: SoftwareFunction) -> None:
    """The last byte of the data is not there yet when the idx says so."""

    def late(ring: Any, chain: Chain, told: int) -> int:
        if chain.writable:
            chain.writable[-1][-1] = 0xEE
        return told

    on_push(function, late)


@mutant("DEV-SPLIT-18", spec=SPLIT)
def unknown_used_flag(function: SoftwareFunction) -> None:
    """Used flags have bit 1."""
    after_write(function, lambda ring, _: ring._used.__setitem__(FLAGS, 2))
    keep_kicks(function)


@mutant("DEV-SPLIT-20", spec=SPLIT)
def used_flag_with_event_idx(function: SoftwareFunction) -> None:
    """Used flags are 1 with EVENT_IDX, too."""
    after_write(function, lambda ring, _: ring._used.__setitem__(FLAGS, int(ring.event_idx)))
    keep_kicks(function)


def keep_kicks(function: SoftwareFunction) -> None:
    """Leave the used flags as they are when notifications are wanted again."""

    def change(ring: Any, _: Any) -> None:
        ring.enable_kicks = lambda: bool(ring._pending())

    on_enable(function, change)


@mutant("DEV-SPLIT-22", spec=SPLIT)
def dies_of_nothing(function: SoftwareFunction) -> None:
    """A notification without a new buffer breaks the device."""
    device = function.device

    def make(inner: Any) -> Any:
        def kick(index: int, data: int | None = None) -> None:
            ring = device.queues[index].ring
            if ring is not None and not ring._pending():
                device.need_reset()
            inner(index, data)

        return kick

    replace(device, "kick", make)


@mutant("DEV-SPLIT-42", spec=f"{SPLIT}?notification_data=on")
def dies_of_repetition(function: SoftwareFunction) -> None:
    """The same notification twice breaks the device."""
    device = function.device
    last: list[int | None] = [None]

    def make(inner: Any) -> Any:
        def kick(index: int, data: int | None = None) -> None:
            if data is not None and data == last[0]:
                device.need_reset()
            last[0] = data
            inner(index, data)

        return kick

    replace(device, "kick", make)


@mutant("DEV-SPLIT-25", spec=SPLIT)
def odd_sizes(function: SoftwareFunction) -> None:
    """Queues are offered with 100 entries."""
    replace(
        function.model, "queue_size", lambda inner: lambda index, features: min(100, inner(index, features))
    )


@mutant("DEV-SPLIT-09", spec=SPLIT)
def used_event_always_counts(function: SoftwareFunction) -> None:
    """used_event decides about interrupts without EVENT_IDX, too."""
    interrupts(function, lambda ring, old: (ring._avail[RING + ring.size] - old) & 0xFFFF < ring.used - old)


@mutant("DEV-SPLIT-11", spec=SPLIT)
def never_interrupts(function: SoftwareFunction) -> None:
    """No used buffer notification is ever sent without EVENT_IDX."""
    interrupts(function, lambda ring, old: ring.event_idx)


@mutant("DEV-SPLIT-12", spec=SPLIT)
def flags_always_count(function: SoftwareFunction) -> None:
    """Bit 0 of the available flags suppresses interrupts with EVENT_IDX, too."""
    interrupts(function, lambda ring, old: not ring._avail[FLAGS] & 1)


@mutant("DEV-SPLIT-13", "DEV-SPLIT-39", spec=SPLIT)
def one_too_late(function: SoftwareFunction) -> None:
    """The notification comes when used_event was passed by one."""
    interrupts(
        function, lambda ring, old: (ring._avail[RING + ring.size] + 1 - old) & 0xFFFF < ring.used - old
    )


@mutant("DEV-SPLIT-40", spec=SPLIT)
def asks_one_too_late(function: SoftwareFunction) -> None:
    """avail_event is one further than the entry that is looked for."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def enable() -> bool:
                found: bool = inner()
                if ring.event_idx:
                    ring._used[ring._avail_event] = (ring._used[ring._avail_event] + 1) & 0xFFFF
                return found

            return enable

        replace(ring, "enable_kicks", make)

    on_enable(function, change)


@mutant("DEV-SPLIT-41", spec=f"{SPLIT}?in_order=on")
def batches_name_nobody(function: SoftwareFunction) -> None:
    """The used element of a batch names the descriptor in front of the last buffer's head."""

    def other(ring: Any, _: Any) -> None:
        at = 2 * ((ring.used - 1) % ring.size)
        ring._elements[at] = (ring._elements[at] - 1) % ring.size

    after_write(function, other)
