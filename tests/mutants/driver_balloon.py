"""Balloon drivers with one mistake (5.5)."""

from __future__ import annotations

import struct
from typing import Any

from guestpv.devices.scripted import RawQueue
from guestpv.spec import balloon as spec
from guestpv.spec.pci import CfgType

from .driver_bench import Bench, healthy, mutant

STATS, HINT, REPORT, POISON = 1 << 1, 1 << 3, 1 << 5, 1 << 4
ACTUAL, COMMAND, POISON_VAL = 4, 8, 12
BALLOON = "balloon"


def start(b: Bench, features: int = 0, poison: bool = True) -> list[RawQueue]:
    """Negotiate, set up the queues that the features call for, go live."""
    b.device.offered = b.device.offered & ~(STATS | HINT | REPORT | POISON) | features
    b.driver.negotiate(b.must | features)
    numbers = [0, 1, *(queue for queue, bit in spec.OPTIONAL_QUEUES.items() if features >> bit & 1)]
    queues = {number: b.driver.queue(number, 8) for number in numbers}
    if features & POISON and poison:
        b.driver.write_at(CfgType.DEVICE, POISON_VAL, 4, 0x55AA55AA)
    b.driver.driver_ok()
    return [queues.get(number, queues[0]) for number in range(5)]


def pages(b: Bench, queue: RawQueue, *numbers: int) -> None:
    """Inflate or deflate these pages."""
    queue.add([queue.buffer(4 * len(numbers), struct.pack(f"<{len(numbers)}I", *numbers))])
    queue.kick()


def actual(b: Bench, value: int) -> None:
    b.driver.write_at(CfgType.DEVICE, ACTUAL, 4, value)


def stats(b: Bench, queue: RawQueue, *tags: int, size: int = 0) -> None:
    """A statistics buffer with these tags."""
    data = b"".join(struct.pack("<HQ", tag, 1 + tag) for tag in tags)
    queue.add([queue.buffer(size or len(data), data)])
    queue.kick()


def command(b: Bench, queue: RawQueue, value: int, size: int = 4) -> None:
    """A command id on the free page queue."""
    queue.add([queue.buffer(size, value.to_bytes(size, "little"))])
    queue.kick()


def report(b: Bench, queue: RawQueue, fill: bytes = b"", size: int = 4096) -> Any:
    """Report free pages."""
    region = b.function.dma.map(4096)
    region.array[:] = list((fill or b"\0") * (4096 // len(fill or b"\0")))
    address = region.segments[0].address
    queue.parts = lambda readable, writable: [(address, size, True)]  # type: ignore[method-assign]
    queue.add()
    queue.kick()
    return region


@healthy(BALLOON)
def up_and_down(b: Bench) -> None:
    inflate, deflate, *_ = start(b)
    b.model.set_target(3)
    b.driver.read_at(CfgType.DEVICE, 0, 4)
    pages(b, inflate, 1, 2, 3)
    actual(b, 3)
    b.model.set_target(1)
    b.driver.read_at(CfgType.DEVICE, 0, 4)
    pages(b, deflate, 2, 3)
    actual(b, 1)
    b.watch.settle()


@healthy(BALLOON)
def tells_statistics(b: Bench) -> None:
    queue = start(b, STATS)[2]
    stats(b, queue, 0, 4, 5)
    b.model.ask_statistics()
    stats(b, queue, 0, 4, 5)
    b.watch.settle()


@healthy(BALLOON)
def hints_free_pages(b: Bench) -> None:
    queue = start(b, HINT)[3]
    b.model.hint(2)
    b.driver.read_at(CfgType.DEVICE, COMMAND, 4)
    command(b, queue, 2)
    queue.add([], [queue.buffer(4096)])
    command(b, queue, 0)
    b.watch.settle()


@healthy(BALLOON)
def reports_poisoned_pages(b: Bench) -> None:
    report(b, start(b, REPORT | POISON)[4], (0x55AA55AA).to_bytes(4, "little"))


@mutant("DRV-BALLOON-07", spec=BALLOON)
def takes_back_what_is_wanted(b: Bench) -> None:
    inflate, deflate, *_ = start(b)
    b.model.config["num_pages"] = 3
    pages(b, inflate, 1, 2, 3)
    pages(b, deflate, 3)
    actual(b, 2)
    b.watch.settle()


@mutant("DRV-BALLOON-09", "DRV-BALLOON-48", spec=BALLOON)
def takes_pages_back_in_silence(b: Bench) -> None:
    inflate = start(b)[0]
    pages(b, inflate, 1, 2)
    actual(b, 1)


@mutant("DRV-BALLOON-48", spec=BALLOON)
def counts_bytes(b: Bench) -> None:
    pages(b, start(b)[0], 1, 2)
    actual(b, 8192)


@mutant("DRV-BALLOON-13", "DRV-BALLOON-49", spec=BALLOON)
def deflates_too_early(b: Bench) -> None:
    inflate, deflate, *_ = start(b)
    b.device.hold = True
    pages(b, inflate, 1)
    b.model.pages.clear()
    pages(b, deflate, 1)


@mutant("DRV-BALLOON-14", spec=BALLOON)
def does_not_write_actual(b: Bench) -> None:
    pages(b, start(b)[0], 1)
    b.watch.settle()


@mutant("DRV-BALLOON-16", spec=BALLOON)
def two_statistics_buffers(b: Bench) -> None:
    queue = start(b, STATS)[2]
    stats(b, queue, 0, 4)
    stats(b, queue, 0, 4)


@mutant("DRV-BALLOON-17", spec=BALLOON)
def no_statistics_at_first(b: Bench) -> None:
    start(b, STATS)
    b.watch.settle()


@mutant("DRV-BALLOON-18", spec=BALLOON)
def statistics_once(b: Bench) -> None:
    stats(b, start(b, STATS)[2], 4)
    b.model.ask_statistics()
    b.watch.settle()


@mutant("DRV-BALLOON-19", spec=BALLOON)
def a_statistic_twice(b: Bench) -> None:
    stats(b, start(b, STATS)[2], 4, 4)


@mutant("DRV-BALLOON-20", spec=BALLOON)
def part_of_a_statistic(b: Bench) -> None:
    stats(b, start(b, STATS)[2], 4, size=14)


@mutant("DRV-BALLOON-23", spec=BALLOON)
def other_statistics_each_time(b: Bench) -> None:
    queue = start(b, STATS)[2]
    stats(b, queue, 4)
    b.model.ask_statistics()
    stats(b, queue, 5)


@mutant("DRV-BALLOON-50", spec=BALLOON)
def a_tag_that_is_not(b: Bench) -> None:
    stats(b, start(b, STATS)[2], 4, 99)


@mutant("DRV-BALLOON-52", "DRV-INIT-13", spec=BALLOON)
def announces_statistics_too_early(b: Bench) -> None:
    b.driver.negotiate(b.must | STATS)
    for number in (0, 1):
        b.driver.queue(number, 8)
    stats(b, b.driver.queue(2, 8), 4)
    b.driver.driver_ok()


@mutant("DRV-BALLOON-24", spec=BALLOON)
def a_command_of_eight_bytes(b: Bench) -> None:
    command(b, start(b, HINT)[3], 0, size=8)


@mutant("DRV-BALLOON-25", spec=BALLOON)
def hints_without_a_command(b: Bench) -> None:
    queue = start(b, HINT)[3]
    b.one(queue, 4096)


@mutant("DRV-BALLOON-26", spec=BALLOON)
def a_command_twice(b: Bench) -> None:
    queue = start(b, HINT)[3]
    b.model.hint(2)
    b.driver.read_at(CfgType.DEVICE, COMMAND, 4)
    for _ in range(2):
        command(b, queue, 2)


@mutant("DRV-BALLOON-29", spec=BALLOON)
def never_stops(b: Bench) -> None:
    queue = start(b, HINT)[3]
    b.model.hint(2)
    b.driver.read_at(CfgType.DEVICE, COMMAND, 4)
    command(b, queue, 2)
    b.watch.settle()


@mutant("DRV-BALLOON-53", spec=BALLOON)
def a_command_of_its_own(b: Bench) -> None:
    command(b, start(b, HINT)[3], 77)


@mutant("DRV-BALLOON-54", spec=BALLOON)
def a_hint_in_two_parts(b: Bench) -> None:
    queue = start(b, HINT)[3]
    command(b, queue, 0)
    queue.add([], [queue.buffer(4096), queue.buffer(4096)])
    queue.kick()


@mutant("DRV-BALLOON-35", spec=BALLOON)
def forgets_to_write_poison(b: Bench) -> None:
    start(b, POISON, poison=False)


@mutant("DRV-BALLOON-36", spec=BALLOON)
def writes_poison_too_late(b: Bench) -> None:
    start(b, POISON)
    b.driver.write_at(CfgType.DEVICE, POISON_VAL, 4, 1)


@mutant("DRV-BALLOON-38", spec=BALLOON)
def reports_pages_that_are_not_poisoned(b: Bench) -> None:
    report(b, start(b, REPORT | POISON)[4], b"\1")


@mutant("DRV-BALLOON-39", spec=BALLOON)
def uses_reported_pages(b: Bench) -> None:
    queue = start(b, REPORT)[4]
    b.device.hold = True
    report(b, queue).array[7] = 1
    b.device.release()


@mutant("DRV-BALLOON-55", spec=BALLOON)
def reports_part_of_a_page(b: Bench) -> None:
    report(b, start(b, REPORT)[4], size=100)


@mutant("DRV-BALLOON-43", spec=BALLOON)
def numbers_queues_densely(b: Bench) -> None:
    b.device.offered |= REPORT
    b.driver.start(b.must | REPORT, {0: 8, 1: 8})


@mutant("DRV-BALLOON-44", "DRV-PCI-66", spec=BALLOON)
def sets_up_a_queue_without_its_feature(b: Bench) -> None:
    b.driver.negotiate(b.must)
    b.driver.queue(2, 8)


@mutant("DRV-BALLOON-45", "DRV-PCI-07", spec=BALLOON)
def reads_across_fields(b: Bench) -> None:
    start(b)
    b.driver.read_at(CfgType.DEVICE, 2, 4)


@mutant("DRV-BALLOON-46", spec=BALLOON)
def writes_its_own_target(b: Bench) -> None:
    start(b)
    b.driver.write_at(CfgType.DEVICE, 0, 4, 5)


@mutant("DRV-BALLOON-47", spec=BALLOON)
def numbers_of_three_bytes(b: Bench) -> None:
    queue = start(b)[0]
    queue.add([queue.buffer(7)])
    queue.kick()


@mutant("DRV-BALLOON-49", spec=BALLOON)
def deflates_what_it_never_had(b: Bench) -> None:
    pages(b, start(b)[1], 9)
