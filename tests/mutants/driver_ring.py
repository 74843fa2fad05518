"""Drivers with one mistake in their rings, split (2.7) and packed (2.8)."""

from __future__ import annotations

from typing import Any

from guestpv.devices.evidence import Event
from guestpv.devices.scripted import RawQueue
from guestpv.spec import features as ft
from guestpv.spec.pci import CfgType

from .driver_bench import Bench, healthy, mutant

NEXT, WRITE, INDIRECT, AVAIL, USED = 1, 2, 4, 1 << 7, 1 << 15
TABLES, ORDER, EVENT = 1 << ft.F_INDIRECT_DESC, 1 << ft.F_IN_ORDER, 1 << ft.F_EVENT_IDX
PACKED, DATA = 1 << ft.F_RING_PACKED, 1 << ft.F_NOTIFICATION_DATA
Row = tuple[int, int, int]
"""Split: length, flags, next. Packed: length, flags, id."""


def rows(b: Bench, queue: RawQueue, *table: Row, at: int = 0, address: int = 0) -> None:
    """Write descriptors from slot ``at`` on, that name one shared buffer."""
    where = address or queue.buffer(4096).address
    for place, (length, flags, other) in enumerate(table):
        pair = (other, flags) if queue.packed else (flags, other)
        queue.rings.desc[(at + place) % queue.size] = (where, length, *pair)


def offer(b: Bench, queue: RawQueue, head: int = 0, kick: bool = True) -> None:
    """Split: make a head available."""
    queue.rings.avail["ring"][queue.heads % queue.size] = head
    queue.heads += 1
    queue.rings.avail["idx"] = queue.heads & 0xFFFF
    if kick:
        queue.kick()


def split(b: Bench, *table: Row, features: int = 0, head: int = 0) -> RawQueue:
    """Start with a split ring, write descriptors, offer the first."""
    queue = b.start(features)[0]
    rows(b, queue, *table)
    offer(b, queue, head)
    return queue


def packed(b: Bench, *table: Row, features: int = 0) -> RawQueue:
    """Start with a packed ring, write descriptors from the first on, kick."""
    queue = b.start(PACKED | features)[0]
    rows(b, queue, *table)
    queue.kick()
    return queue


def table(b: Bench, queue: RawQueue, *entries: Row) -> int:
    """The address of an indirect table with these entries."""
    memory, target = queue.buffer(16 * len(entries)), queue.buffer(4096).address
    for place, (length, flags, other) in enumerate(entries):
        pair = (other, flags) if queue.packed else (flags, other)
        raw = target.to_bytes(8, "little") + length.to_bytes(4, "little")
        raw += b"".join(value.to_bytes(2, "little") for value in pair)
        memory.array[16 * place : 16 * place + 16] = list(raw)
    return memory.address


def indirect(b: Bench, *entries: Row, features: int = TABLES, length: int = 0, flags: int = 0) -> None:
    """Offer one buffer in an indirect table, in the format that the features say."""
    queue = b.start(features)[0]
    row = (length or 16 * len(entries), INDIRECT | flags | (AVAIL if queue.packed else 0), 0)
    rows(b, queue, row, address=table(b, queue, *entries))
    if queue.packed:
        queue.kick()
    else:
        offer(b, queue)


FEATURES = {"split": 0, "packed": PACKED}


def each_format(walk: Any, *breaks: str, **how: Any) -> None:
    """Register a walk for split and packed rings: ``SPLIT-12 PACKED-17`` breaks one each."""
    for number, (name, features) in enumerate(FEATURES.items()):

        def body(b: Bench, features: int = features) -> None:
            walk(b, features)

        body.__name__ = f"{walk.__name__}_{name}"
        mine = [rule.split()[number] for rule in breaks]
        mutant(*(f"DRV-{rule}" for rule in mine if rule != "-"), **how)(body)


# Without a mistake


def several_laps(b: Bench, features: int) -> None:
    for extra in (0, EVENT, DATA, ORDER):
        queue = b.start(features | extra, {0: 4})[0]
        for _ in range(6):
            queue.add([], [queue.buffer(8), queue.buffer(8)] if extra != ORDER else [queue.buffer(8)])
            queue.kick()


def in_tables(b: Bench, features: int) -> None:
    queue = b.start(features | TABLES)[0]
    queue.add([], [queue.buffer(4), queue.buffer(4)], indirect=True)
    queue.kick()


def of_both_kinds(b: Bench, features: int) -> None:
    queue = b.start(features)[0]
    queue.add([queue.buffer(16, (8).to_bytes(16, "little"))], [queue.buffer(20), queue.buffer(1)])
    queue.kick()


def a_list_over_the_end(b: Bench, features: int) -> None:
    queue = b.start(features, {0: 3 if features else 4})[0]
    for _ in range(4):
        queue.add([], [queue.buffer(4), queue.buffer(4)])
        queue.kick()


def stores_in_order(b: Bench, features: int) -> None:
    queue = b.start(features)[0]
    store(b, queue, "desc", 0, 8, queue.buffer(8).address)
    if features:
        store(b, queue, "desc", 8, 8, 8 | 0 << 32 | (WRITE | USED) << 48)
        see(b, queue, "store release", "desc", 14, 2)
        queue.rings.desc[0]["flags"] = WRITE | AVAIL
    else:
        store(b, queue, "desc", 8, 8, 8 | WRITE << 32)
        store(b, queue, "driver", 4, 2, 0)
        see(b, queue, "store release", "driver", 2, 2, 1)
        queue.rings.avail["idx"] = 1
    see(b, queue, "fence")
    see(b, queue, "load", "device", 2 if features else 0, 2)
    queue.kick()


each_format(several_laps)
each_format(in_tables)
each_format(of_both_kinds, spec="blk")
each_format(a_list_over_the_end)
each_format(stores_in_order)


@healthy()
def with_order_and_chains(b: Bench) -> None:
    queue = split(b, (8, NEXT | WRITE, 1), (8, WRITE, 0), features=ORDER | TABLES)
    address = table(b, queue, (8, NEXT | WRITE, 1), (8, WRITE, 0))
    rows(b, queue, (32, INDIRECT, 0), at=2, address=address)
    offer(b, queue, 2)


def wrong_wishes(b: Bench, features: int) -> RawQueue:
    """The device leaves something where a driver must not look with these features."""
    queue = b.start(features)[0]
    ring = b.device.queues[0].ring
    assert ring is not None
    area = ring.areas[2]
    area[0 if features & EVENT else len(area) - 2] = 1
    ring.shown = ring.own
    return queue


@healthy()
def ignores_avail_event(b: Bench) -> None:
    b.one(wrong_wishes(b, 0))


@healthy()
def ignores_used_flags(b: Bench) -> None:
    b.one(wrong_wishes(b, EVENT))


# Areas


def area(b: Bench, features: int, name: str, value: Any) -> None:
    b.device.offered |= features
    b.driver.negotiate(b.must | features)
    region = b.function.dma.map(8192)
    start = region.segments[0].address
    b.driver.write("queue_select", 0)
    b.driver.write("queue_size", min(8, b.driver.read("queue_size")))
    for number, other in enumerate(("desc", "driver", "device")):
        address = start + 1024 * number
        b.driver.write(f"queue_{other}", value(region.array, start, address) if other == name else address)
    b.driver.write("queue_enable", 1)


def misplaced(name: str, *breaks: str) -> None:
    def walk(b: Bench, features: int) -> None:
        area(b, features, name, lambda memory, start, address: address + 1)

    walk.__name__ = f"misaligned_{name}"
    each_format(walk, *breaks)


def cut_off(name: str, *breaks: str) -> None:
    def walk(b: Bench, features: int) -> None:
        area(b, features, name, lambda memory, start, address: start + 8192 - 16)

    walk.__name__ = f"{name}_area_ends_too_early"
    each_format(walk, *breaks)


misplaced("desc", "SPLIT-01 PACKED-01")
misplaced("driver", "SPLIT-02 PACKED-02")
misplaced("device", "SPLIT-03 PACKED-03")
cut_off("desc", "SPLIT-35 PACKED-23", "FEAT-18 FEAT-18")


@mutant("DRV-SPLIT-36", "DRV-FEAT-18")
def available_ring_ends_too_early(b: Bench) -> None:
    area(b, 0, "driver", lambda memory, start, address: start + 8192 - 4)


@mutant("DRV-SPLIT-37", "DRV-FEAT-18")
def used_ring_ends_too_early(b: Bench) -> None:
    area(b, 0, "device", lambda memory, start, address: start + 8192 - 4)


@mutant("DRV-SPLIT-37")
def used_ring_over_the_available_one(b: Bench) -> None:
    area(b, 0, "device", lambda memory, start, address: start + 1024)


def writes_the_device_area(b: Bench, features: int) -> None:
    queue = b.start(features)[0]
    b.one(queue)
    (queue.rings.device if features else queue.rings.used)["desc" if features else "flags"] = 1
    b.one(queue)


each_format(writes_the_device_area, "SPLIT-39 PACKED-42")


@mutant("DRV-SPLIT-46")
def idx_begins_at_five(b: Bench) -> None:
    area(b, 0, "desc", lambda memory, start, address: (memory.__setitem__(1026, 5), address)[1])


@mutant("DRV-PACKED-25")
def a_ring_with_leftovers(b: Bench) -> None:
    area(b, PACKED, "desc", lambda memory, start, address: (memory.__setitem__(20, 5), address)[1])


# Chains, split

SPLIT_CHAINS: dict[str, list[Row]] = {
    "SPLIT-04": [(8, NEXT | WRITE, 1), (8, 0, 0)],
    "SPLIT-06": [(0xFFFFFFFF, NEXT | WRITE, 1), (0xFFFFFFFF, WRITE, 0)],
    "SPLIT-07": [(8, NEXT | WRITE, 1), (8, NEXT | WRITE, 0)],
    "SPLIT-09": [(16, INDIRECT, 0)],
    "SPLIT-40": [(8, WRITE | 0x40, 0)],
    "SPLIT-41": [(8, NEXT | WRITE, 99)],
}
PACKED_CHAINS: dict[str, list[Row]] = {
    "PACKED-10": [(8, NEXT | WRITE | AVAIL, 0), (8, AVAIL, 0)],
    "PACKED-13": [(8, NEXT | WRITE | AVAIL, 0), (8, WRITE, 0)],
    "PACKED-14": [(16, INDIRECT | AVAIL, 0)],
    "PACKED-24": [(8, WRITE | AVAIL | 0x40, 0)],
    "PACKED-26": [(8, WRITE | USED, 0)],
    "PACKED-28": [(8, WRITE | USED | AVAIL, 0)],
    "PACKED-34": [(8, WRITE | AVAIL, 5), (8, WRITE | AVAIL, 5)],
}


def chain(requirement: str, table: list[Row], make: Any) -> None:
    def walk(b: Bench) -> None:
        b.device.hold = True
        make(b, *table)

    walk.__name__ = f"chain_against_{requirement}"
    mutant(f"DRV-{requirement}")(walk)


for name, entries in SPLIT_CHAINS.items():
    chain(name, entries, split)
for name, entries in PACKED_CHAINS.items():
    chain(name, entries, packed)


@mutant("DRV-PACKED-09")
def a_list_longer_than_the_ring(b: Bench) -> None:
    queue = b.start(PACKED, {0: 2})[0]
    b.one(queue)
    rows(b, queue, (8, NEXT | WRITE | USED, 0))
    rows(b, queue, (8, NEXT | WRITE | AVAIL, 0), at=1)
    queue.kick()


@mutant("DRV-SPLIT-11")
def a_table_longer_than_the_ring(b: Bench) -> None:
    indirect(b, *[(8, WRITE | NEXT, place + 1) for place in range(8)], (8, WRITE, 0))


@mutant("DRV-PACKED-16")
def a_packed_table_longer_than_the_ring(b: Bench) -> None:
    indirect(b, *[(8, WRITE, 0)] * 9, features=TABLES | PACKED)


@mutant("DRV-PACKED-08")
def a_list_longer_than_the_device_takes(b: Bench) -> None:
    queue = b.start(PACKED)[0]
    ring = b.device.queues[0].ring
    assert ring is not None
    ring.max_chain = 2
    rows(b, queue, *[(8, NEXT | WRITE | AVAIL, 0)] * 2, (8, WRITE | AVAIL, 0))
    queue.kick()


@mutant("DRV-SPLIT-08")
def links_out_of_order(b: Bench) -> None:
    split(b, (8, NEXT | WRITE, 2), (0, 0, 0), (8, WRITE, 0), features=ORDER)


@mutant("DRV-SPLIT-42")
def begins_out_of_order(b: Bench) -> None:
    split(b, (8, WRITE, 0), (8, WRITE, 0), features=ORDER, head=1)


@mutant("DRV-SPLIT-13")
def a_table_out_of_order(b: Bench) -> None:
    entries = (8, NEXT | WRITE, 2), (8, WRITE, 0), (8, WRITE, 0)
    indirect(b, *entries, features=TABLES | ORDER)


@mutant("DRV-SPLIT-10")
def a_table_in_a_table(b: Bench) -> None:
    indirect(b, (16, INDIRECT, 0))


@mutant("DRV-SPLIT-44")
def a_table_that_leads_outside(b: Bench) -> None:
    indirect(b, (8, NEXT | WRITE, 4), (8, WRITE, 0))


@mutant("DRV-PACKED-15")
def links_in_a_packed_table(b: Bench) -> None:
    indirect(b, (8, NEXT | WRITE, 0), (8, WRITE, 0), features=TABLES | PACKED)


def indirect_and_next(b: Bench, features: int) -> None:
    indirect(b, (8, WRITE, 0), features=TABLES | features, flags=NEXT)


def half_a_table(b: Bench, features: int) -> None:
    indirect(b, (8, WRITE, 0), features=TABLES | features, length=24)


each_format(indirect_and_next, "SPLIT-12 PACKED-17")
each_format(half_a_table, "SPLIT-43 PACKED-38")


@mutant("DRV-SPLIT-14")
def goes_back(b: Bench) -> None:
    queue = b.start()[0]
    for _ in range(3):
        b.one(queue)
    queue.rings.avail["idx"] = 1
    queue.kick()


@mutant("DRV-SPLIT-47", "DRV-SPLIT-14")
def reduces_idx_by_the_size(b: Bench) -> None:
    queue = b.start()[0]
    for _ in range(8):
        b.one(queue)
    b.one(queue, publish=False, kick=False)
    queue.rings.avail["idx"] = 1
    queue.kick()


@mutant("DRV-SPLIT-48")
def a_head_beyond_the_table(b: Bench) -> None:
    offer(b, b.start()[0], 77)


@mutant("DRV-SPLIT-50")
def more_buffers_than_descriptors(b: Bench) -> None:
    queue = b.start()[0]
    queue.rings.avail["idx"] = 20
    queue.kick()


@mutant("DRV-PACKED-11", "DRV-PACKED-12")
def begins_a_list_that_does_not_fit(b: Bench) -> None:
    b.device.hold = True
    queue = b.start(PACKED, {0: 4})[0]
    for _ in range(3):
        b.one(queue)
    rows(b, queue, (8, NEXT | WRITE | AVAIL, 3), at=3)
    queue.kick()


@mutant("DRV-PACKED-27")
def forgets_to_flip_its_wrap_counter(b: Bench) -> None:
    queue = b.start(PACKED, {0: 2})[0]
    for _ in range(2):
        b.one(queue)
    rows(b, queue, (9, WRITE | AVAIL, 0))
    queue.kick()


@mutant("DRV-PACKED-33", "DRV-PACKED-13")
def forgets_the_end_within_a_list(b: Bench) -> None:
    queue = b.start(PACKED, {0: 4})[0]
    for _ in range(3):
        b.one(queue)
    rows(b, queue, (8, WRITE | AVAIL, 3), at=0)
    rows(b, queue, (8, NEXT | WRITE | AVAIL, 3), at=3)
    queue.kick()


@mutant("DRV-CLEANUP-01", "DRV-PACKED-04", "DRV-PACKED-05")
def changes_a_packed_descriptor(b: Bench) -> None:
    queue = b.start(PACKED)[0]
    b.device.hold = True
    b.one(queue)
    queue.rings.desc[0]["len"] = 4
    b.device.release()


# Suppression and notifications


def suppresses(requirement: str, features: int, field: str, value: int) -> None:
    def walk(b: Bench) -> None:
        queue = b.start(features)[0]
        (queue.rings.driver if features & PACKED else queue.rings.avail)[field] = value
        b.one(queue)

    walk.__name__ = f"suppresses_with_{field}_{value}_against_{requirement}"
    mutant(f"DRV-{requirement}")(walk)


suppresses("SPLIT-15", 0, "flags", 2)
suppresses("SPLIT-17", EVENT, "flags", 1)
suppresses("PACKED-40", PACKED, "flags", 8)
suppresses("PACKED-41", PACKED, "flags", 2)


def forgets(requirements: str, features: int) -> None:
    def walk(b: Bench) -> None:
        queue = b.start(features)[0]
        b.one(queue)
        b.one(queue, kick=False)
        b.watch.settle()

    walk.__name__ = f"forgets_to_notify_against_{requirements.replace(' ', '_')}"
    mutant(*(f"DRV-{rule}" for rule in requirements.split()))(walk)


forgets("SPLIT-25", 0)
forgets("SPLIT-27 SPLIT-56", EVENT)
forgets("PACKED-43", PACKED)
forgets("PACKED-45", PACKED | EVENT)


@mutant("DRV-SPLIT-23", "DRV-SPLIT-25")
def minds_avail_event(b: Bench) -> None:
    b.one(wrong_wishes(b, 0), kick=False)
    b.watch.settle()


@mutant("DRV-SPLIT-26", "DRV-SPLIT-27", "DRV-SPLIT-56")
def minds_used_flags(b: Bench) -> None:
    b.one(wrong_wishes(b, EVENT), kick=False)
    b.watch.settle()


@mutant("DRV-PACKED-44")
def notifies_although_none_is_wanted(b: Bench) -> None:
    queue = b.start(PACKED)[0]
    b.device.queues[0].ask_for_kicks = False
    b.one(queue)
    b.one(queue)


def lies_in_its_notification(b: Bench, features: int) -> None:
    queue = b.start(features | DATA)[0]
    b.one(queue, kick=False)
    b.driver.write_at(CfgType.NOTIFY, 0, 4, 3 << 16 | (1 << 31 if features else 0))


each_format(lies_in_its_notification, "SPLIT-58 PACKED-06", spec="rng?notification_data=on")


@mutant("DRV-PACKED-46", spec="rng?notification_data=on")
def names_a_place_beyond_the_ring(b: Bench) -> None:
    queue = b.start(PACKED | DATA)[0]
    b.one(queue, kick=False)
    b.driver.write_at(CfgType.NOTIFY, 0, 4, 1000 << 16)


# The order of stores


def see(b: Bench, queue: RawQueue, kind: str, name: str = "", *numbers: int) -> None:
    """Show an access (offset, width, value) to the observer, as the observing build does."""
    offset, width, value = (*numbers, 0, 0, 0)[:3]
    b.function.journal.record(Event(kind, name, offset, width, value, queue.index))


def store(b: Bench, queue: RawQueue, name: str, offset: int, width: int, value: int) -> None:
    """A plain store that the observer sees."""
    see(b, queue, "store", name, offset, width, value)
    start = getattr(queue.layout, name).offset + offset
    queue.memory.array[start : start + width] = list(value.to_bytes(width, "little"))


def publishes_without_order(b: Bench, features: int) -> None:
    queue = b.start(features)[0]
    store(b, queue, "desc", 0, 8, queue.buffer(8).address)
    if not features:
        store(b, queue, "driver", 4, 2, 0)
    store(b, queue, *(("desc", 14, 2, 0) if features else ("driver", 2, 2, 1)))


def asks_without_a_fence(b: Bench, features: int) -> None:
    queue = b.start(features)[0]
    if not features:
        store(b, queue, "driver", 4, 2, 0)
    see(b, queue, "store release", *(("desc", 14, 2, 0) if features else ("driver", 2, 2, 1)))
    see(b, queue, "load", "device", 0, 2)


each_format(publishes_without_order, "SPLIT-32 PACKED-19")
each_format(asks_without_a_fence, "SPLIT-33 PACKED-20")


@mutant("DRV-SPLIT-45")
def stores_32_bits_to_the_available_ring(b: Bench) -> None:
    store(b, b.start()[0], "driver", 4, 4, 0)


@mutant("DRV-SPLIT-49")
def counts_a_head_twice(b: Bench) -> None:
    queue = b.start()[0]
    store(b, queue, "driver", 4, 2, 0)
    see(b, queue, "store release", "driver", 2, 2, 2)
