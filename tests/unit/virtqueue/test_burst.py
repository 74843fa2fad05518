"""Prepared bursts: the same rules as the friendly queue, and no Python object per buffer."""

from __future__ import annotations

import sys

import pytest

from guestpv.errors import DeviceViolation, UsageError
from guestpv.virtqueue.burst import Burst
from ringpeer import Bench, bench, mask

FORMATS = pytest.mark.parametrize("base", [mask(), mask("RING_PACKED")], ids=["split", "packed"])


def prepared(b: Bench, capacity: int) -> Burst:
    """Rows of 16 readable and then 48 writable bytes."""
    burst = Burst(b.queue, capacity, 2, 1)
    for row in range(capacity):
        buffer = b.pool.allocate(64)
        burst.addresses[row] = buffer.address, buffer.address + 16
    burst.lengths[:] = 16, 48
    return burst


@FORMATS
@pytest.mark.parametrize("extra", [(), ("INDIRECT_DESC",), ("IN_ORDER", "EVENT_IDX")], ids=str)
def test_rows_go_out_and_come_back(base: int, extra: tuple[str, ...]) -> None:
    b = bench(base | mask(*extra), 16)
    burst = prepared(b, 4)
    for turn in range(20):
        count = 1 + turn % 4
        assert burst.submit(count) == count
        rows = burst.addresses[:count].tolist()
        for n in range(count):
            chain = b.peer.pop()
            assert chain is not None
            assert chain.id == burst.slots[n]
            assert [list(part) for part in chain.readable + chain.writable] == [
                [rows[n][0], 16],
                [rows[n][1], 48],
            ]
            b.peer.push(chain, n)
        assert burst.reap() == count
        assert burst.used_slots[:count].tolist() == burst.slots[:count].tolist()
        assert burst.used_lengths[:count].tolist() == list(range(count))
    assert burst.reap() == 0


@FORMATS
def test_a_burst_takes_what_finds_room_and_never_more_than_its_rows(base: int) -> None:
    b = bench(base, 8)
    burst = prepared(b, 3)
    assert burst.submit(1000) == 3
    assert burst.submit(3) == 1
    assert burst.submit(3) == 0
    assert b.queue.outstanding == 4


@FORMATS
def test_violations_come_out_of_bursts_too(base: int) -> None:
    b = bench(base, 8)
    burst = prepared(b, 1)
    burst.submit(1)
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, 49)
    with pytest.raises(DeviceViolation, match="used length 49"):
        burst.reap()
    with pytest.raises(DeviceViolation, match="used length 49"):
        burst.submit(1)


@FORMATS
def test_a_burst_ends_with_its_queue(base: int) -> None:
    b = bench(base, 8)
    burst = prepared(b, 1)
    b.queue.restart(16)
    for operation in (lambda: burst.submit(1), burst.reap):
        with pytest.raises(UsageError, match="closed"):
            operation()


@pytest.mark.parametrize(
    ("capacity", "elements", "writable_from"), [(0, 1, 0), (1, 0, 0), (1, 9, 0), (1, 2, 3)]
)
def test_shapes_that_make_no_sense(capacity: int, elements: int, writable_from: int) -> None:
    with pytest.raises(UsageError, match=f"a burst of {capacity} buffers of {elements} elements"):
        Burst(bench(mask(), 8).queue, capacity, elements, writable_from)


@FORMATS
def test_no_python_object_is_made_per_buffer(base: int) -> None:
    """Bytecodes and C calls of a turn do not depend on the size of the burst."""
    calls: dict[int, list[str]] = {}
    for count in (1, 128):
        made = []
        # The interpreter fills its caches in a first turn, and other threads of it may be at work in any.
        for _ in range(5):
            b = bench(base, 256)
            burst = prepared(b, count)
            b.queue.device["flags"] = 1
            seen: list[str] = []

            def profile(frame: object, event: str, argument: object, seen: list[str] = seen) -> None:
                seen.append(event)

            before = sys.getallocatedblocks()
            sys.setprofile(profile)
            burst.submit(count)
            burst.reap()
            sys.setprofile(None)
            made.append(sys.getallocatedblocks() - before)
            calls[count] = seen
        assert min(made) < 64
    assert calls[1] == calls[128]
