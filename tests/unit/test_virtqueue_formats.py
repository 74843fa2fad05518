"""What the driver half writes to the rings, checked through a device half written for the tests."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time

import numpy as np
import pytest

from guestpv.errors import QueueFull, UsageError
from guestpv.memory import DmaBuffer
from guestpv.virtqueue.kick import Kick
from guestpv.virtqueue.queue import Virtqueue
from ringpeer import AVAIL, INDIRECT, NEXT, USED, WRITE, Bench, bench, mask

OPTIONS = ("EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "NOTIFICATION_DATA", "ORDER_PLATFORM")
SPLIT, PACKED = mask(), mask("RING_PACKED")
FORMATS = pytest.mark.parametrize("base", [SPLIT, PACKED], ids=["split", "packed"])
EVERY = [
    pytest.param(mask(*form, *options), id="+".join((*form, *options)) or "split")
    for form in ((), ("RING_PACKED",))
    for n in range(len(OPTIONS) + 1)
    for options in itertools.combinations(OPTIONS, n)
]


def buffers(b: Bench, *sizes: int) -> list[DmaBuffer]:
    return [b.pool.allocate(size) for size in sizes]


def where(parts: list[DmaBuffer]) -> tuple[tuple[int, int], ...]:
    return tuple((part.address, part.nbytes) for part in parts)


@pytest.mark.parametrize("features", EVERY)
def test_every_combination_of_options_moves_buffers_there_and_back(features: int) -> None:
    """Shapes, contents and lengths survive three laps of the ring under each of the 64 option sets."""
    b = bench(features, 8)
    read, write = buffers(b, 10, 20, 30), buffers(b, 40, 50)
    shapes = [(1, 0), (0, 1), (2, 1), (1, 2), (3, 2)]
    sent = 0
    for turn in range(3 * 8):
        shape = shapes[turn % len(shapes)]
        readable, writable = read[: shape[0]], write[: shape[1]]
        b.peer.suppress(True)
        token = b.queue.add(readable, writable, cookie=turn)
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        assert (chain.readable, chain.writable) == (where(readable), where(writable))
        assert b.peer.pop() is None
        b.peer.push(chain, chain.room)
        sent += 1
        done = [(t, length, b.queue.cookie(t)) for t, length in b.queue.completions()]
        assert done == [(token, chain.room, turn)]
        assert b.queue.cookie(token) is None
    assert len(b.kicks) == sent, "nothing was suppressed"
    assert b.peer.interrupts >= 1
    assert (b.queue.free_slots, b.queue.outstanding) == (8, 0)


@pytest.mark.requirement("DRV-SPLIT-40", "DRV-SPLIT-45", "DRV-SPLIT-46", "DRV-SPLIT-49")
def test_split_chain_is_written_field_by_field() -> None:
    b = bench(SPLIT, 4)
    parts = buffers(b, 16, 512, 1)
    assert b.queue.add(parts[:1], parts[1:]) & 0xFFFF == 0
    a = [part.address for part in parts]
    assert b.queue.desc[:3].tolist() == [
        (a[0], 16, NEXT, 1),
        (a[1], 512, NEXT | WRITE, 2),
        (a[2], 1, WRITE, 0),
    ]
    assert b.queue.driver["idx"] == 0, "nothing is available before publish"
    assert b.queue.publish()
    assert str(b.queue.driver) == "(0, 1, [0, 0, 0, 0], 0)"


@pytest.mark.requirement(
    "DRV-PACKED-24", "DRV-PACKED-26", "DRV-PACKED-27", "DRV-PACKED-31", "DRV-PACKED-32", "DRV-PACKED-33"
)
def test_packed_list_is_written_field_by_field_and_changes_its_flags_with_the_lap() -> None:
    b = bench(PACKED, 3)
    parts = buffers(b, 16, 512)
    a = [part.address for part in parts]
    for _lap, (mine, other) in enumerate([(AVAIL, USED), (USED, AVAIL), (AVAIL, USED)]):
        token = b.queue.add(parts[:1], parts[1:])
        id = token & 0xFFFF
        start = b.peer.avail_at
        rows = [b.queue.desc[(start + i) % 3].tolist() for i in range(2)]
        assert [row[:3] for row in rows] == [(a[0], 16, id), (a[1], 512, id)]
        wrapped = [mine, mine if start < 2 else other]
        assert b.queue.desc[start]["flags"] != wrapped[0] | NEXT, "the head waits for publish"
        assert rows[1][3] == wrapped[1] | WRITE
        b.queue.publish()
        assert b.queue.desc[start]["flags"] == wrapped[0] | NEXT
        chain = b.peer.pop()
        assert chain is not None
        b.peer.push(chain, 7)
        assert list(b.queue.completions()) == [(token, 7)]
        # One more descriptor moves every lap to its beginning again: 2 + 1 = 3.
        b.queue.add(parts[:1])
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        b.peer.push(chain, 0)
        assert [length for _, length in b.queue.completions()] == [0]


@pytest.mark.requirement("DRV-SPLIT-43", "DRV-SPLIT-44", "DRV-PACKED-38")
@FORMATS
def test_indirect_table_holds_the_buffer_in_order(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 4)
    parts = buffers(b, 16, 512, 1)
    b.queue.add(parts[:2], parts[2:])
    b.queue.publish()
    head = b.queue.desc[0]
    assert int(head["len"]) == 3 * 16
    assert int(head["flags"]) & ~(AVAIL | USED) == INDIRECT
    assert b.queue.free_slots == 3
    chain = b.peer.pop()
    assert chain is not None
    assert (chain.readable, chain.writable, chain.count) == (where(parts[:2]), where(parts[2:]), 1)


@FORMATS
def test_longer_buffers_than_the_tables_become_chains(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 8, indirect_entries=2)
    parts = buffers(b, 4, 4, 4)
    b.queue.add(parts[:2], [])
    b.queue.add(parts, [])
    b.queue.publish()
    chains = [b.peer.pop(), b.peer.pop()]
    assert [chain and chain.count for chain in chains] == [1, 3]


@pytest.mark.requirement("DRV-SPLIT-11", "DRV-PACKED-09", "DRV-PACKED-12")
@FORMATS
@pytest.mark.parametrize("size", [1, 2, 64, 32768])
@pytest.mark.parametrize("extra", ["", "IN_ORDER"])
def test_one_buffer_may_take_the_whole_queue(base: int, size: int, extra: str) -> None:
    b = bench(base | mask(*filter(None, [extra])), size)
    for _ in range(3):
        part = b.pool.allocate(size)
        addresses = np.arange(size, dtype=np.uint64)[None] + np.uint64(part.address)
        slots = b.queue.add_burst(addresses, np.ones((1, size), np.uint32), size // 2)
        assert len(slots) == 1
        assert b.queue.free_slots == 0
        with pytest.raises(QueueFull, match="0 of"):
            b.queue.add([part[:1]])
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        assert chain.count == size
        assert len(chain.readable) == size // 2
        b.peer.push(chain, chain.room)
        ids, lengths = b.queue.reap_burst()
        assert (ids.tolist(), lengths.tolist()) == (slots.tolist(), [size - size // 2])


@pytest.mark.requirement("DRV-PACKED-22", "DRV-PACKED-35")
@pytest.mark.parametrize("size", [1, 3, 7, 100, 1000])
def test_packed_sizes_need_be_no_power_of_two(size: int) -> None:
    b = bench(PACKED, size)
    part = b.pool.allocate(4)
    for burst in (1, size, (size + 1) // 2, size):
        tokens = [b.queue.add([part]) for _ in range(burst)]
        b.queue.publish()
        chains = [b.peer.pop() for _ in range(burst)]
        assert b.peer.pop() is None
        for chain in reversed(chains):
            assert chain is not None
            b.peer.push(chain, 0)
        assert [token for token, _ in b.queue.completions()] == tokens[::-1]


@pytest.mark.requirement("DRV-SPLIT-38", "DRV-PACKED-22")
@pytest.mark.parametrize(
    ("size", "base"), [(0, SPLIT), (3, SPLIT), (32769, PACKED), (65536, SPLIT), (0, PACKED)]
)
def test_sizes_that_the_format_does_not_allow(size: int, base: int) -> None:
    with pytest.raises(ValueError, match=f"queue size {size} .*VIRTIO 1.4 section"):
        bench(base, size)


@FORMATS
def test_bursts_are_published_with_one_kick_and_come_back_as_arrays(base: int) -> None:
    b = bench(base, 16)
    parts = [buffers(b, 8, 32) for _ in range(5)]
    addresses = np.array([[p.address for p in pair] for pair in parts], np.uint64)
    lengths = np.array([[8, 32]] * 5, np.uint32)
    slots = b.queue.add_burst(addresses, lengths, 1)
    assert b.peer.pop() is None, "nothing of a burst is seen before publish"
    assert b.queue.publish()
    assert b.kicks == [5]
    chains = []
    while chain := b.peer.pop():
        chains.append(chain)
    assert [chain.readable + chain.writable for chain in chains] == [where(pair) for pair in parts]
    for n, chain in enumerate(reversed(chains)):
        b.peer.push(chain, n)
    ids, got = b.queue.reap_burst()
    assert (ids.dtype, got.dtype) == (np.uint32, np.uint32)
    assert ids.tolist() == slots.tolist()[::-1]
    assert got.tolist() == [0, 1, 2, 3, 4]
    assert not b.queue.publish(), "nothing to publish, nothing to kick"
    assert b.kicks == [5]


@FORMATS
def test_a_burst_takes_what_finds_room(base: int) -> None:
    b = bench(base, 4)
    part = b.pool.allocate(8)
    slots = b.queue.add_burst(np.full((3, 2), part.address, np.uint64), np.full((3, 2), 8, np.uint32), 1)
    assert len(slots) == 2
    assert b.queue.outstanding == 2
    assert (
        len(b.queue.add_burst(np.full((1, 1), part.address, np.uint64), np.full((1, 1), 8, np.uint32), 0))
        == 0
    )


@pytest.mark.requirement("DRV-SPLIT-06", "DRV-SPLIT-11", "DRV-PACKED-09")
@FORMATS
def test_buffers_that_make_no_sense_are_refused_and_leave_no_trace(base: int) -> None:
    b = bench(base, 4)
    part = b.pool.allocate(8)
    before = b.queue.desc.copy()
    with pytest.raises(UsageError, match="1 to 4 elements"):
        b.queue.add()
    with pytest.raises(UsageError, match="1 to 4 elements"):
        b.queue.add([part] * 5)
    with pytest.raises(UsageError, match="1 to 4 elements"):
        b.queue.add_burst(np.zeros((1, 5), np.uint64), np.ones((1, 5), np.uint32), 0)
    with pytest.raises(UsageError, match="at least 1 byte"):
        b.queue.add_burst(np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.uint32), 0)
    with pytest.raises(UsageError, match=r"at most 2\^32"):
        b.queue.add_burst(np.zeros((1, 2), np.uint64), np.array([[0xFFFFFFFF, 2]], np.uint32), 0)
    with pytest.raises(UsageError, match="one shape"):
        b.queue.add_burst(np.zeros((1, 2), np.uint64), np.ones((2, 1), np.uint32), 0)
    assert (b.queue.desc == before).all()
    assert b.queue.free_slots == 4
    assert len(b.queue.add_burst(np.zeros((1, 2), np.uint64), np.array([[0xFFFFFFFF, 1]], np.uint32), 0)) == 1


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
            _use_all(b)
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
            _use_all(b)


def _use_all(b: Bench) -> None:
    while chain := b.peer.pop():
        b.peer.push(chain, 0)
    b.queue.reap_burst()


def _advance(b: Bench, part: DmaBuffer, count: int) -> None:
    while count:
        step = min(count, b.queue.size)
        b.queue.add_burst(np.full((step, 1), part.address, np.uint64), np.ones((step, 1), np.uint32), 1)
        b.queue.publish()
        _use_all(b)
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
        _use_all(b)
        assert b.peer.interrupts == 0
        assert b.queue.driver["flags"] == 0
        if n % 5 == 0:
            assert not b.queue.enable_interrupts()
            assert int(b.queue.driver["used_event"]) == n
            b.queue.disable_interrupts()
    b.queue.enable_interrupts()
    b.queue.add([part])
    b.queue.publish()
    _use_all(b)
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
        _use_all(packed)
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


@pytest.mark.requirement("DRV-SPLIT-57", "DRV-PACKED-39")
@FORMATS
def test_in_order_batches_return_every_buffer_and_count_the_skipped_ones_as_full(base: int) -> None:
    b = bench(base | mask("IN_ORDER"), 8)
    read, write = buffers(b, 4)[0], buffers(b, 40)[0]
    tokens = [b.queue.add([read], [write]), b.queue.add([read]), b.queue.add([], [write])]
    b.queue.publish()
    chains = [b.peer.pop() for _ in tokens]
    assert all(chains)
    b.peer.push(chains[2], 3, batch=(chains[0], chains[1]))  # type: ignore[arg-type]
    assert b.queue.pending()
    assert list(b.queue.completions()) == list(zip(tokens, (40, 0, 3), strict=True))
    assert not b.queue.pending()
    assert b.queue.free_slots == 8


@FORMATS
def test_slots_freed_last_are_used_first(base: int) -> None:
    """So a large queue with few buffers in flight stays within few cache lines (and tables)."""
    b = bench(base, 1024)
    part = b.pool.allocate(4)
    seen = set()
    for _ in range(3000):
        seen.add(b.queue.add([part]) & 0xFFFF)
        b.queue.publish()
        _use_all(b)
    assert seen == {0}


@FORMATS
def test_tokens_are_never_given_out_twice(base: int) -> None:
    b = bench(base, 2)
    part = b.pool.allocate(4)
    tokens = []
    for _ in range(100):
        tokens.append(b.queue.add([part]))
        b.queue.publish()
        _use_all(b)
    assert len(set(tokens)) == 100


@pytest.mark.requirement("DRV-VQRESET-02", "DRV-PACKED-25")
@FORMATS
def test_drain_returns_what_never_came_back_and_starts_over(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 8)
    part = b.pool.allocate(8)
    tokens = [b.queue.add([part], cookie=n) for n in range(5)]
    b.queue.publish()
    chains = [b.peer.pop() for _ in range(5)]
    assert chains[2] is not None
    b.peer.push(chains[2], 0)
    assert [token for token, _ in b.queue.completions()] == [tokens[2]]
    unpublished = b.queue.add([part], [part], cookie="never seen")
    assert b.queue.drain() == [tokens[0], tokens[1], tokens[3], tokens[4], unpublished]
    assert b.queue.cookie(unpublished) == "never seen"
    assert b.queue.outstanding == 0
    assert not b.queue.desc["flags"].any()
    assert not any(np.any(b.queue.driver[name]) for name in b.queue.driver.dtype.names)
    again = type(b.peer)(b.queue, b.space)
    token = b.queue.add([part])
    b.queue.publish()
    chain = again.pop()
    assert chain is not None
    again.push(chain, 0)
    assert list(b.queue.completions()) == [(token, 0)]


@pytest.mark.requirement("DRV-VQRESET-03")
@FORMATS
def test_restart_with_another_size_moves_the_rings(base: int) -> None:
    b = bench(base | mask("INDIRECT_DESC"), 8)
    part = b.pool.allocate(8)
    b.queue.add([part])
    with pytest.raises(UsageError, match="1 buffers are outstanding"):
        b.queue.restart(16)
    b.queue.drain()
    with pytest.raises(ValueError, match="queue size 0"):
        b.queue.restart(0)
    b.queue.restart(16)
    assert (b.queue.size, len(b.queue.desc), b.queue.free_slots) == (16, 16, 16)
    peer = type(b.peer)(b.queue, b.space)
    b.queue.add_burst(np.full((16, 1), part.address, np.uint64), np.full((16, 1), 8, np.uint32), 0)
    b.queue.publish()
    assert [peer.pop() is not None for _ in range(17)] == [True] * 16 + [False]


def test_close_gives_the_memory_back_and_later_calls_say_so() -> None:
    b = bench(mask("INDIRECT_DESC"), 8)
    b.queue.close()
    b.queue.close()
    assert b.pool.in_use == 0
    with pytest.raises(UsageError, match="closed"):
        b.queue.publish()


@FORMATS
def test_a_queue_belongs_to_one_thread_until_it_is_handed_over(base: int) -> None:
    b = bench(base, 8)
    part = b.pool.allocate(8)
    errors: list[str] = []

    def other() -> None:
        for operation in (
            lambda: b.queue.add([part]),
            b.queue.publish,
            b.queue.reap_burst,
            b.queue.pending,
            b.queue.disable_interrupts,
            b.queue.enable_interrupts,
            lambda: b.queue.wait(0),
        ):
            with pytest.raises(UsageError, match="another thread") as caught:
                operation()
            errors.append(str(caught.value))
        b.queue.own()
        b.queue.add([part])

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 7
    with pytest.raises(UsageError, match=r"own\(\)"):
        b.queue.publish()
    b.queue.own()
    assert b.queue.publish()


@FORMATS
@pytest.mark.parametrize("extra", ["", "EVENT_IDX"])
def test_wait_sleeps_on_the_eventfd_and_loses_no_wakeup(base: int, extra: str) -> None:
    """A device thread that interrupts only when the rings say so, at every phase of the wait."""
    fd = os.eventfd(0)
    b = bench(base | mask(*filter(None, [extra])), 4, interrupt_fd=fd)
    assert b.queue.fileno() == fd
    part = b.pool.allocate(4)
    for n in range(60):
        token = b.queue.add([part])
        b.queue.publish()
        delay = n % 6 * 40e-6

        def device(delay: float = delay) -> None:
            time.sleep(delay)
            chain = b.peer.pop()
            assert chain is not None
            before = b.peer.interrupts
            b.peer.push(chain, 0)
            if b.peer.interrupts != before:
                os.eventfd_write(fd, 1)

        thread = threading.Thread(target=device)
        thread.start()
        assert b.queue.wait(60, spin_us=n % 3 * 50), "the wake-up was lost"
        thread.join()
        assert list(b.queue.completions()) == [(token, 0)]
        b.queue.disable_interrupts()
    os.close(fd)


def test_wait_without_an_interrupt_polls_and_ends_in_time() -> None:
    b = bench(SPLIT, 4)
    with pytest.raises(UsageError, match="no interrupt"):
        b.queue.fileno()
    begin = time.monotonic()
    assert not b.queue.wait(0.02)
    assert 0.02 <= time.monotonic() - begin < 60
    assert not b.queue.wait(0)


def test_wait_is_interrupted_by_signal_handlers_and_goes_on() -> None:
    import signal

    b = bench(SPLIT, 4, interrupt_fd=(fd := os.eventfd(0)))
    token = b.queue.add([b.pool.allocate(4)])
    b.queue.publish()
    seen: list[int] = []

    def handler(number: int, _frame: object) -> None:
        seen.append(number)
        if len(seen) == 3:
            chain = b.peer.pop()
            assert chain is not None
            b.peer.push(chain, 0)
            os.eventfd_write(fd, 1)

    old = signal.signal(signal.SIGUSR1, handler)
    over = threading.Event()

    def alarm() -> None:
        while not over.wait(0.01):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    thread = threading.Thread(target=alarm)
    try:
        thread.start()
        assert b.queue.wait(60, spin_us=0)
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR1, old)
    assert len(seen) >= 3
    assert list(b.queue.completions()) == [(token, 0)]
    os.close(fd)


def test_interrupts_that_need_an_acknowledgement_get_one_each_time() -> None:
    acknowledged: list[int] = []
    fd = os.eventfd(0)
    b = bench(SPLIT, 4, interrupt_fd=fd, acknowledge=lambda: acknowledged.append(1))
    os.eventfd_write(fd, 1)
    assert not b.queue.wait(0.01)
    assert acknowledged == [1]
    os.eventfd_write(fd, 1)
    assert b.queue.clear_interrupt()
    assert not b.queue.clear_interrupt()
    assert acknowledged == [1, 1]
    os.close(fd)


@FORMATS
def test_a_generator_of_completions_left_early_loses_nothing(base: int) -> None:
    b = bench(base, 4)
    part = b.pool.allocate(4)
    tokens = [b.queue.add([part]) for _ in range(3)]
    b.queue.publish()
    while chain := b.peer.pop():
        b.peer.push(chain, 0)
    assert next(iter(b.queue.completions())) == (tokens[0], 0)
    assert list(b.queue.completions()) == [(tokens[1], 0), (tokens[2], 0)]


@FORMATS
@pytest.mark.parametrize("extra", ["", "EVENT_IDX"])
def test_asyncio_waits_on_the_queue(base: int, extra: str) -> None:
    fd = os.eventfd(0)
    b = bench(base | mask(*filter(None, [extra])), 4, interrupt_fd=fd)
    part = b.pool.allocate(4)

    async def drive() -> list[int]:
        loop = asyncio.get_running_loop()
        back: list[int] = []
        for turn in range(5):
            done = loop.create_future()

            def look(done: asyncio.Future[None] = done) -> None:
                b.queue.clear_interrupt()
                back.extend(token for token, _ in b.queue.completions())
                if not done.done():
                    done.set_result(None)

            def device() -> None:
                chain = b.peer.pop()
                assert chain is not None
                before = b.peer.interrupts
                b.peer.push(chain, 0)
                assert b.peer.interrupts > before, "the interrupt was lost"
                os.eventfd_write(fd, 1)

            b.queue.add([part])
            b.queue.publish()
            assert not b.queue.enable_interrupts()
            loop.add_reader(b.queue.fileno(), look)
            loop.call_later(0.001, device)
            await asyncio.wait_for(done, 20)
            loop.remove_reader(b.queue.fileno())
            assert len(back) == turn + 1
        return back

    assert len(set(asyncio.run(drive()))) == 5
    os.close(fd)
