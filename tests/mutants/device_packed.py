"""Broken devices: the packed virtqueue."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.ring import Chain
from guestpv.spec import ring as rs

from .device import mutant, replace
from .device_ring import after_write, interrupts, on_enable, on_pop, on_push
from .device_split import read_tables, refuse

PACKED = "loopback:blk?packed=on"
DESC = struct.Struct("<QIHH")
AVAIL, USED = rs.PACKED_DESC_F_AVAIL, rs.PACKED_DESC_F_USED
ID, FLAGS = 6, 7


def edit_used(function: SoftwareFunction, edit: Any) -> None:
    """Let ``edit(ring, slot)`` change the first used descriptor of each write."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def write(staged: Any) -> bool:
                slot = ring.used % ring.size
                wanted: bool = inner(staged)
                edit(ring, slot)
                return wanted

            return write

        replace(ring, "_write", make)

    on_enable(function, change)


@mutant("DEV-PACKED-08", spec=PACKED)
def lists_backwards(function: SoftwareFunction) -> None:
    """The writable descriptors of a list of more than four are taken in reverse."""

    def look(_: Any, chain: Chain) -> None:
        if len(chain.elements) > 4:
            chain.writable.reverse()

    on_pop(function, look)


@mutant("DEV-PACKED-01", "DEV-PACKED-17", spec=PACKED)
def begins_with_the_second(function: SoftwareFunction) -> None:
    """A buffer is taken only once another one is available behind it."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def pop() -> Chain | None:
                later = range(ring.available + 1, ring.available + ring.size - 1)
                heads = [place for place in later if ring._is_available(place)]
                return inner() if len(heads) > 3 else None

            return pop

        replace(ring, "pop", make)
        ring.enable_kicks = lambda: False

    on_enable(function, change)


@mutant("DEV-PACKED-02", "DEV-PACKED-19", spec=PACKED)
def used_ones_are_dense(function: SoftwareFunction) -> None:
    """Used descriptors lie one behind the other, however long their lists were."""

    def look(_: Any, chain: Chain) -> None:
        object.__setattr__(chain, "count", 1)

    on_pop(function, look)


@mutant("DEV-PACKED-04", spec=PACKED)
def scribbles_on_packed_readable_buffers(function: SoftwareFunction) -> None:
    """The first byte of a readable buffer is turned over when it is given back."""

    def scribble(ring: Any, chain: Chain, told: int) -> int:
        for address, _, write in chain.elements:
            if not write:
                ring.memory.view(address, 1, write=True)[0] ^= 0xFF
                break
        return told

    on_push(function, scribble)


@mutant("DEV-PACKED-06", "DEV-PACKED-17", spec=PACKED)
def takes_stale_descriptors(function: SoftwareFunction) -> None:
    """A descriptor counts as available by its USED bit alone."""

    def change(ring: Any, _: Any) -> None:
        def marks(flags: int, position: int) -> bool:
            return bool(flags & USED) != bool(ring._wrap(position))

        ring._marks = marks

    on_enable(function, change)


@mutant("DEV-PACKED-07", spec=PACKED)
def edits_the_past(function: SoftwareFunction) -> None:
    """The length of the descriptor that was used before the last one is cleared."""
    last: dict[int, list[int]] = {}

    def edit(ring: Any, slot: int) -> None:
        past = last.setdefault(id(ring), [])
        if past:
            ring._words[4 * past[-1] + 2] = 0xFFFF
        past.append(slot)

    edit_used(function, edit)


@mutant("DEV-PACKED-12", spec=PACKED)
def powers_of_two_only(function: SoftwareFunction) -> None:
    """A queue whose size is no power of 2 is never looked at."""

    def change(ring: Any, _: Any) -> None:
        if ring.size & (ring.size - 1):
            ring.pop = lambda: None
            ring.enable_kicks = lambda: False

    on_enable(function, change)


@mutant("DEV-PACKED-13", spec=PACKED)
def length_in_the_wrong_place(function: SoftwareFunction) -> None:
    """The length goes where the address was."""

    def edit(ring: Any, slot: int) -> None:
        ring._words[4 * slot], ring._words[4 * slot + 2] = ring._words[4 * slot + 2], ring._words[4 * slot]

    edit_used(function, edit)


@mutant("DEV-PACKED-20", spec=PACKED)
def forgets_the_id(function: SoftwareFunction) -> None:
    """The id of a used descriptor is the position of its list."""

    def edit(ring: Any, slot: int) -> None:
        ring._halves[8 * slot + ID] = slot

    edit_used(function, edit)


def use_marks(function: SoftwareFunction, marks: Any) -> None:
    """Let ``marks(right marks, pass)`` say what a used descriptor carries."""

    def edit(ring: Any, slot: int) -> None:
        flags = ring._halves[8 * slot + FLAGS]
        passed = (ring.used - 1) // ring.size
        ring._halves[8 * slot + FLAGS] = flags & ~(AVAIL | USED) | marks(flags & (AVAIL | USED), passed)

    edit_used(function, edit)


@mutant("DEV-PACKED-14", spec=PACKED)
def begins_with_counter_0(function: SoftwareFunction) -> None:
    """The device's wrap counter begins with 0."""
    use_marks(function, lambda right, passed: right ^ (AVAIL | USED) if not passed else right)


@mutant("DEV-PACKED-15", spec=PACKED)
def counter_does_not_flip(function: SoftwareFunction) -> None:
    """The device's wrap counter stays 1."""
    use_marks(function, lambda right, passed: AVAIL | USED)


@mutant("DEV-PACKED-16", spec=PACKED)
def used_without_avail(function: SoftwareFunction) -> None:
    """On later passes USED is set as it should be, and AVAIL is not."""
    use_marks(function, lambda right, passed: right & USED | ~right & AVAIL if passed else right)


@mutant("DEV-PACKED-18", spec=PACKED)
def looks_ahead(function: SoftwareFunction) -> None:
    """Descriptors that are not available are stepped over where a later one is."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def pop() -> Chain | None:
                place = ring.available
                for ahead in range(place, place + 8):
                    if ring._is_available(ahead):
                        ring.available = ring.used = ahead
                        break
                return inner()

            return pop

        replace(ring, "pop", make)

    on_enable(function, change)


@mutant("DEV-PACKED-21", spec=PACKED)
def never_says_write(function: SoftwareFunction) -> None:
    """WRITE is not set in used descriptors."""

    def edit(ring: Any, slot: int) -> None:
        ring._halves[8 * slot + FLAGS] &= ~rs.DESC_F_WRITE & 0xFFFF

    edit_used(function, edit)


@mutant("DEV-PACKED-22", spec=PACKED)
def flags_of_tables_count(function: SoftwareFunction) -> None:
    """A table whose entries have other flags than WRITE is refused."""

    def plain(data: bytes) -> bytes:
        if any(row[3] & ~rs.DESC_F_WRITE for row in DESC.iter_unpack(data)):
            refuse("flags in a table")
        return data

    read_tables(function, plain)


@mutant("DEV-PACKED-23", spec=PACKED)
def write_flag_of_a_packed_table_counts(function: SoftwareFunction) -> None:
    """An indirect descriptor with WRITE is refused."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def check(flags: int, slot: int, count: int) -> None:
                if flags & rs.DESC_F_WRITE:
                    refuse("WRITE and INDIRECT")
                inner(flags, slot, count)

            return check

        replace(ring, "_check_indirect", make)

    on_enable(function, change)


@mutant("DEV-PACKED-24", spec=f"{PACKED}&in_order=on")
def packed_batches_name_the_first(function: SoftwareFunction) -> None:
    """The used descriptor of a batch has an id that is not outstanding any more."""

    def edit(ring: Any, slot: int) -> None:
        ring._halves[8 * slot + ID] = (ring._halves[8 * slot + ID] - 1) % ring.size

    edit_used(function, edit)


@mutant("DEV-PACKED-26", spec=PACKED)
def event_offset_and_flags_change_places(function: SoftwareFunction) -> None:
    """The two words of the device event suppression are exchanged."""

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def enable() -> bool:
                found: bool = inner()
                ring._device[0], ring._device[1] = ring._device[1], ring._device[0]
                return found

            return enable

        if ring.event_idx:
            replace(ring, "enable_kicks", make)

    on_enable(function, change)


@mutant("DEV-PACKED-27", spec=PACKED)
def event_flags_without_event_idx(function: SoftwareFunction) -> None:
    """Device event flags are 2 without EVENT_IDX."""
    after_write(function, lambda ring, _: None)

    def change(ring: Any, _: Any) -> None:
        def make(inner: Any) -> Any:
            def enable() -> bool:
                found: bool = inner()
                ring._device[1] = rs.EVENT_FLAGS_DESC if not ring.event_idx else 3
                return found

            return enable

        replace(ring, "enable_kicks", make)

    on_enable(function, change)


@mutant("DEV-PACKED-28", spec=PACKED)
def answers_in_the_drivers_area(function: SoftwareFunction) -> None:
    """The driver event suppression is acknowledged in its place."""
    after_write(function, lambda ring, _: ring._driver.__setitem__(0, 0x1234))


@mutant("DEV-PACKED-29", spec=PACKED)
def never_interrupts_packed(function: SoftwareFunction) -> None:
    """No used buffer notification is ever sent."""
    interrupts(function, lambda ring, old: False)


@mutant("DEV-PACKED-30", spec=PACKED)
def always_interrupts(function: SoftwareFunction) -> None:
    """Every used buffer is notified, wanted or not."""
    interrupts(function, lambda ring, old: True)


@mutant("DEV-PACKED-31", spec=PACKED)
def looks_at_the_first_position_only(function: SoftwareFunction) -> None:
    """Positions inside a list that was used at once are not seen to be passed."""

    def wanted(ring: Any, old: int) -> bool:
        if ring._driver[1] & 3 != rs.EVENT_FLAGS_DESC:
            return True
        return bool(ring._driver[0] == (old % ring.size | ring._wrap(old) << 15))

    interrupts(function, wanted)
