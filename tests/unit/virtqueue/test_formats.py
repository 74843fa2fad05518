"""What the driver half writes to the rings, checked through a device half of the tests (2.7, 2.8)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from guestpv.errors import QueueFull, UsageError
from ringpeer import AVAIL, INDIRECT, NEXT, USED, WRITE, bench, mask

from .kit import FORMATS, PACKED, SPLIT, buffers, where

OPTIONS = ("EVENT_IDX", "INDIRECT_DESC", "IN_ORDER", "NOTIFICATION_DATA", "ORDER_PLATFORM")
EVERY = [
    pytest.param(mask(*form, *options), id="+".join((*form, *options)) or "split")
    for form in ((), ("RING_PACKED",))
    for n in range(len(OPTIONS) + 1)
    for options in itertools.combinations(OPTIONS, n)
]


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
