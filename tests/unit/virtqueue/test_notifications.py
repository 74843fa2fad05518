"""When the driver half notifies, and when it asks to be: flags, event index, wraps (2.7, 2.8.10)."""

from __future__ import annotations

import os

import numpy as np
import pytest

from guestpv.memory import DmaBuffer
from guestpv.virtqueue.kick import Kick
from guestpv.virtqueue.queue import Virtqueue
from ringpeer import Bench, bench, mask

from .kit import FORMATS, PACKED, SPLIT, use_all


@pytest.mark.requirement("DRV-SPLIT-23", "DRV-SPLIT-24", "DRV-SPLIT-25")
def test_split_flags_suppress_kicks_and_avail_event_does_not_count() -> None:
    b = bench(SPLIT, 8)
    part = b.pool.allocate(4)
    b.queue.device["flags"] = 1
    b.queue.add([part])
    assert not b.queue.publish()
    b.queue.device["flags"] = 0
    b.queue.device["avail_event"] = 7
    b.queue.add([part])
    assert b.queue.publish()


@pytest.mark.requirement("DRV-SPLIT-26", "DRV-SPLIT-27", "DRV-SPLIT-28", "DRV-SPLIT-56")
@pytest.mark.parametrize("start", [0, 0x7FFE, 0xFFFE])
def test_event_index_counts_through_the_wrap(start: int) -> None:
    """The rule of 2.7.10 for every event index around a burst, also where indices pass 0xffff."""
    b = bench(mask("EVENT_IDX"), 8)
    part = b.pool.allocate(4)
    _advance(b, part, start)
    index = start
    for burst in (1, 2, 5):
        for event in range(-8, 8):
            at = (index + event) % 0x10000
            b.queue.device["avail_event"] = at
            b.queue.device["flags"] = 1  # has to be ignored
            for _ in range(burst):
                b.queue.add([part])
            assert b.queue.publish() == (0 <= event < burst), (index, event, burst)
            index = (index + burst) % 0x10000
            use_all(b)
    assert int(b.queue.driver["idx"]) == index


@pytest.mark.requirement("DRV-PACKED-45")
@pytest.mark.parametrize("size", [5, 8])
def test_packed_event_offset_and_wrap(size: int) -> None:
    """2.8.10: DESC asks for the notification when one (offset, wrap) is made available, and only then."""
    b = bench(PACKED | mask("EVENT_IDX"), size)
    part = b.pool.allocate(4)
    position = 0
    for burst in range(1, size + 1):
        for ahead in range(-size, size):
            place = position + ahead
            if place < 0:
                continue
            b.queue.device["desc"] = place % size | (1 - place // size % 2) << 15
            b.queue.device["flags"] = 2
            for _ in range(burst):
                b.queue.add([part])
            assert b.queue.publish() == (0 <= ahead < burst), (position, ahead, burst)
            position += burst
            use_all(b)


def _advance(b: Bench, part: DmaBuffer, count: int) -> None:
    while count:
        step = min(count, b.queue.size)
        b.queue.add_burst(np.full((step, 1), part.address, np.uint64), np.ones((step, 1), np.uint32), 1)
        b.queue.publish()
        use_all(b)
        count -= step


@pytest.mark.requirement("DRV-SPLIT-47")
@FORMATS
def test_indices_pass_0xffff_with_bursts_of_every_phase(base: int) -> None:
    b = bench(base | mask("EVENT_IDX"), 64)
    _advance(b, b.pool.allocate(4), 3 * 0x10000 + 17)
    assert b.queue.outstanding == 0
    if not b.queue.packed:
        assert int(b.queue.driver["idx"]) == 17


@pytest.mark.requirement("DRV-SPLIT-15", "DRV-SPLIT-16")
def test_split_interrupt_flags_without_event_index() -> None:
    b = bench(SPLIT, 8)
    b.queue.disable_interrupts()
    assert b.queue.driver["flags"] == 1
    assert not b.queue.enable_interrupts()
    assert b.queue.driver["flags"] == 0


@pytest.mark.requirement("DRV-SPLIT-17", "DRV-SPLIT-18", "DRV-SPLIT-55")
def test_split_event_index_leaves_flags_alone_and_moves_used_event() -> None:
    b = bench(mask("EVENT_IDX"), 8)
    part = b.pool.allocate(4)
    b.queue.disable_interrupts()
    for n in range(1, 20):
        b.queue.add([part])
        b.queue.publish()
        use_all(b)
        assert b.peer.interrupts == 0
        assert b.queue.driver["flags"] == 0
        if n % 5 == 0:
            assert not b.queue.enable_interrupts()
            assert int(b.queue.driver["used_event"]) == n
            b.queue.disable_interrupts()
    b.queue.enable_interrupts()
    b.queue.add([part])
    b.queue.publish()
    use_all(b)
    assert b.peer.interrupts == 1
    assert int(b.queue.driver["used_event"]) == 20, "whoever reaps with interrupts on asks for the next one"


@pytest.mark.requirement("DRV-SPLIT-34", "DRV-PACKED-21")
@FORMATS
@pytest.mark.parametrize("extra", ["", "EVENT_IDX", "IN_ORDER"])
def test_enable_interrupts_tells_of_what_is_pending_already(base: int, extra: str) -> None:
    b = bench(base | mask(*filter(None, [extra])), 8)
    part = b.pool.allocate(4)
    b.queue.disable_interrupts()
    b.queue.add([part])
    b.queue.publish()
    assert not b.queue.pending()
    assert not b.queue.enable_interrupts()
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, 0)
    assert b.peer.interrupts == 1
    assert b.queue.pending()
    assert b.queue.enable_interrupts()
    assert len(list(b.queue.completions())) == 1
    assert not b.queue.enable_interrupts()


@pytest.mark.requirement("DRV-PACKED-40", "DRV-PACKED-41")
def test_packed_driver_event_structure() -> None:
    plain, event = bench(PACKED, 5), bench(PACKED | mask("EVENT_IDX"), 5)
    for b in (plain, event):
        b.queue.disable_interrupts()
        assert b.queue.driver.tolist() == (0, 1)
        _advance(b, b.pool.allocate(4), 7)
        b.queue.enable_interrupts()
    assert plain.queue.driver.tolist() == (0, 0)
    assert event.queue.driver.tolist() == (2 | 0 << 15, 2), (
        "position 2 of the second lap, whose wrap value is 0"
    )


@pytest.mark.requirement(
    "DRV-SPLIT-58", "DRV-PACKED-06", "DRV-PACKED-07", "DRV-PACKED-46", "DRV-PCI-48", "DRV-PCI-50"
)
def test_notification_data_names_the_next_place() -> None:
    split = bench(mask("NOTIFICATION_DATA"), 8)
    part = split.pool.allocate(4)
    _advance(split, part, 0xFFFE)
    split.kicks.clear()
    for _ in range(3):
        split.queue.add([part])
        split.queue.publish()
    split.queue.notify()
    split.queue.notify()
    assert split.kicks == [5 | 0xFFFF << 16, 5, 5 | 1 << 16, 5 | 1 << 16, 5 | 1 << 16]
    packed = bench(PACKED | mask("NOTIFICATION_DATA"), 3)
    part = packed.pool.allocate(4)
    for _ in range(4):
        packed.queue.add([part])
        packed.queue.publish()
        use_all(packed)
    assert packed.kicks == [5 | (1 | 1 << 15) << 16, 5 | (2 | 1 << 15) << 16, 5, 5 | 1 << 16]


@pytest.mark.requirement("DRV-PCI-51")
def test_kick_value_is_the_configured_one_when_there_is_one() -> None:
    kicks: list[int] = []
    b = bench(SPLIT, 8)
    queue = Virtqueue(5, 8, SPLIT, b.pool, Kick.call(kicks.append, 0x1234))
    queue.add([b.pool.allocate(4)])
    queue.publish()
    assert kicks == [0x1234]


def test_kicks_by_store_and_by_eventfd() -> None:
    b = bench(SPLIT, 8)
    part = b.pool.allocate(4)
    doorbell = np.zeros(4, np.uint32)
    for width, expected in ((2, 0xFFFF0009), (4, 9)):
        doorbell[:] = 0xFFFFFFFF
        queue = Virtqueue(9, 8, SPLIT, b.pool, Kick.mmio(doorbell.ctypes.data + 4, width))
        queue.add([part])
        queue.publish()
        assert doorbell.tolist() == [0xFFFFFFFF, expected, 0xFFFFFFFF, 0xFFFFFFFF]
    fd = os.eventfd(0)
    queue = Virtqueue(9, 8, SPLIT, b.pool, Kick.eventfd(fd))
    for _ in range(3):
        queue.add([part])
        assert queue.publish()
    assert os.eventfd_read(fd) == queue.kicks == 3
    os.close(fd)


def test_an_exception_in_a_python_kick_reaches_the_publisher() -> None:
    b = bench(SPLIT, 8)

    def refuse(_value: int) -> None:
        raise OSError("the bus is gone")

    queue = Virtqueue(0, 8, SPLIT, b.pool, Kick.call(refuse))
    queue.add([b.pool.allocate(4)])
    with pytest.raises(OSError, match="the bus is gone"):
        queue.publish()
