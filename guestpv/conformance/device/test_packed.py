"""The packed virtqueue: descriptors, wrap counters, lists, tables and event suppression (2.8)."""

from __future__ import annotations

from itertools import count as numbers

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.queue import Queue
from guestpv.conformance.requests import BlkWork
from guestpv.conformance.rig import Rig
from guestpv.conformance.shapes import (
    at_least,
    cut,
    fitting,
    judge,
    most,
    run_elements,
    sized,
    together,
)
from guestpv.spec import blk
from guestpv.spec import features as ft
from guestpv.spec import ring as rs

pytestmark = pytest.mark.rings("packed*")

MARKS = rs.PACKED_DESC_F_AVAIL | rs.PACKED_DESC_F_USED
ONE_AFTER_THE_OTHER = ("packed", "packed-event_idx")
"""Without IN_ORDER every buffer has a used descriptor of its own."""
GARBAGE = 0xA5A5


def wrap(queue: Queue, position: int) -> int:
    """The wrap counter at a free-running position."""
    return 1 - position // queue.size % 2


def entry(queue: Queue, position: int) -> tuple[int, int, int]:
    """(id, length, flags) of the descriptor at a free-running position, whatever it is."""
    row = queue.raw.desc[position % queue.size]
    return int(row["id"]), int(row["len"]), int(row["flags"])


def marks_of(wrap_counter: int) -> int:
    """AVAIL and USED of a used descriptor (2.8.1)."""
    return MARKS if wrap_counter else 0


@pytest.mark.device("blk")
@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-08")
def test_pieces_are_taken_in_their_order(queue: Queue, rig: Rig, case: Case) -> None:
    """What the device writes into many descriptors is what it writes into one."""
    assert isinstance(rig.work, BlkWork)
    case.sent("GET_ID with its buffer in ever more descriptors")
    found = []
    for pieces in (1, 2, 5):
        request = rig.work.command(blk.T_GET_ID, into=blk.ID_BYTES, status_is=None)
        queue.offer(cut(queue.elements(request.readable, request.writable), pieces))
        queue.wait()
        if request.writable[-1].array[0] == blk.S_UNSUPP:
            pytest.skip("the disk has no GET_ID")
        found.append(request.writable[0].array.tobytes())
    if len(set(found[0])) == 1:
        pytest.skip("the disk's ID is empty")
    assert found == found[:1] * len(found), f"the ID is {found[0]!r}, and in pieces {found[1:]!r}"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-08")
def test_any_split_of_a_request_over_descriptors(queue: Queue, rig: Rig, case: Case) -> None:
    """A request means the same in whatever number of descriptors it comes, taken in their order."""
    case.sent("one request cut into ever more descriptors")
    for pieces in (1, 2, 3, 5, 16):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        run_elements(queue, request, fitting(queue, elements, pieces))


@pytest.mark.rings(*ONE_AFTER_THE_OTHER)
@pytest.mark.requirement("DEV-PACKED-02", "DEV-PACKED-14", "DEV-PACKED-15", "DEV-PACKED-16", "DEV-PACKED-19")
def test_used_descriptors_pass_after_pass(queue: Queue, rig: Rig) -> None:
    """Used descriptors lie one list behind the other, and carry the wrap counter in AVAIL and USED."""
    position = 0
    for pieces in numbers(1):
        request = rig.work.request()
        elements = fitting(queue, queue.elements(request.readable, request.writable), pieces % 5 + 1)
        id = queue.offer(elements)
        queue.wait()
        found, _, flags = entry(queue, position)
        assert found == id, f"position {position % queue.size} has id {found}, {id} was made available there"
        expected = marks_of(wrap(queue, position))
        assert flags & MARKS == expected, (
            f"descriptor {position % queue.size} of pass {position // queue.size + 1}: flags {flags:#06x}"
        )
        position += len(elements)
        if position > 3 * queue.size:
            break


@pytest.mark.requirement("DEV-PACKED-12")
@pytest.mark.parametrize("size", [7, 13, 64])
def test_queues_of_several_sizes(negotiated: Rig, size: int) -> None:
    """A packed queue may have any size, also one that is no power of 2."""
    if negotiated.transport.queue_max_size(negotiated.work.main) < size:
        pytest.skip(f"the queue cannot have {size} entries")
    queue = sized(negotiated, size)
    for _ in range(2 * size + 1):
        request = negotiated.work.request()
        judge(request, queue.run(request.readable, request.writable))


@pytest.mark.requirement("DEV-PACKED-13", "DEV-PACKED-20")
def test_each_id_comes_back_once(negotiated: Rig) -> None:
    """Every buffer of every batch comes back exactly once, by its id, in any pass."""
    rig = negotiated
    queue = sized(rig, 16)
    count = most(rig, queue, 5)
    for _ in range(40 // count):
        made = dict(together(rig, queue, count))
        found = queue.wait(count)
        assert sorted(id for id, _ in found) == sorted(made), (
            f"{sorted(made)} were made available, {found} used"
        )
        for id, length in found:
            if not queue.features >> ft.F_IN_ORDER & 1:
                judge(made[id], length)
            made[id].check()
        rig.settle()
        assert queue.used() == [], "more buffers came back than were made available"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-20")
def test_ids_are_the_drivers_choice(queue: Queue, rig: Rig, case: Case) -> None:
    """A buffer id is any number below the queue size, in any order, and comes back as it was."""
    for id in (queue.size - 1, 0, queue.size // 2, 1):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        case.sent(f"buffer id {id}")
        queue.raw.offer(elements, id)
        queue.expect(id, elements)
        queue.kick()
        ((used, length),) = queue.wait()
        assert used == id, f"buffer {id} was made available, {used} came back"
        judge(request, length)


@pytest.mark.device("blk")
@pytest.mark.rings(*ONE_AFTER_THE_OTHER)
@pytest.mark.requirement("DEV-PACKED-01")
def test_buffers_are_looked_at_in_ring_order(queue: Queue, rig: Rig, case: Case) -> None:
    """Buffers that are available together are all taken, beginning with the first of them."""
    count = most(rig, queue)
    made = together(rig, queue, count)
    found = dict(queue.wait(count))
    for id, request in made:
        judge(request, found[id])


@pytest.mark.requirement("DEV-PACKED-04")
def test_readable_buffers_stay_as_they_are(queue: Queue, rig: Rig) -> None:
    """The device writes nothing into device-readable buffers."""
    for _ in range(3):
        request = rig.work.request()
        before = [buffer.array.tobytes() for buffer in request.readable]
        queue.run(request.readable, request.writable)
        after = [buffer.array.tobytes() for buffer in request.readable]
        assert after == before, "a device-readable buffer was written to"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-06", "DEV-PACKED-17")
def test_stale_descriptors_are_not_taken(queue: Queue, rig: Rig, case: Case) -> None:
    """Descriptors that are zero, or as the last pass left them, are not available."""
    case.sent("notifications at descriptors that are not available")
    sample = rig.work.request()
    rounds = 2 * queue.size // len(queue.elements(sample.readable, sample.writable)) + 3
    for number in range(rounds):
        if number % max(1, rounds // 8) == 0:
            queue.kick()
            rig.settle()
            assert queue.used() == [], "a descriptor was used that is not available"
        request = rig.work.request()
        judge(request, queue.run(request.readable, request.writable))


@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-07")
def test_used_descriptors_stay_as_they_are(queue: Queue, rig: Rig) -> None:
    """A descriptor that was seen used does not change any more."""
    seen: dict[int, tuple[int, int, int]] = {}
    position = 0
    for _ in range(4):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        run_elements(queue, request, elements)
        seen[position] = entry(queue, position)
        position += len(elements)
        rig.settle()
        for place, before in seen.items():
            assert entry(queue, place) == before, f"the used descriptor {place} has changed"


@pytest.mark.formats
@pytest.mark.requirement("DEV-PACKED-18")
def test_only_the_next_position_is_looked_at(queue: Queue, rig: Rig, case: Case) -> None:
    """A descriptor that is exposed before the one in front of it waits for that one."""
    first, second = rig.work.request(), rig.work.request()
    early = at_least(queue.elements(first.readable, first.writable), 1)
    place = len(early)
    raw = queue.raw
    # The second buffer alone: the first one's head stays unavailable.
    raw.offset = place
    late = queue.elements(second.readable, second.writable)
    raw.offer(late, 1)
    case.sent("a buffer behind a descriptor that is not available yet")
    queue.kick()
    rig.settle()
    assert raw.used_entry(0) is None, "a buffer was used before the one in front of it was there"
    behind = raw.offset
    raw.offset = 0
    raw.offer(early, 0)
    raw.offset = behind
    queue.expect(0, early)
    queue.expect(1, late)
    queue.kick()
    found = dict(queue.wait(2))
    judge(first, found[0])
    judge(second, found[1])


@pytest.mark.rings(*ONE_AFTER_THE_OTHER)
@pytest.mark.requirement("DEV-PACKED-21")
def test_write_and_length_of_used_descriptors(queue: Queue, rig: Rig) -> None:
    """A used descriptor has WRITE exactly where data was written, and its length counts that data."""
    position = 0
    for _ in range(3):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        queue.offer(elements)
        ((_, length),) = queue.wait()
        _, _, flags = entry(queue, position)
        if request.writable:
            judge(request, length)
            assert flags & rs.DESC_F_WRITE, f"data was written and WRITE is not set (flags {flags:#06x})"
        else:
            assert not flags & rs.DESC_F_WRITE, f"WRITE is set and nothing was written (flags {flags:#06x})"
        position += len(elements)


@pytest.mark.hostile
@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-PACKED-22")
def test_flags_and_ids_in_a_table_mean_nothing(queue: Queue, rig: Rig, case: Case) -> None:
    """Of the flags in an indirect table only WRITE counts, and the ids there count for nothing."""
    request = rig.work.request()
    elements = at_least(queue.elements(request.readable, request.writable), 3)
    memory = rig.buffer(16 * len(elements))
    rows = memory.array.view(rs.PACKED_DESC)
    for number, (address, length, flags) in enumerate(elements):
        rows[number] = (address, length, GARBAGE, flags | MARKS | (rs.DESC_F_NEXT if number % 2 else 0))
    case.sent("an indirect table with NEXT, AVAIL, USED and ids in its entries")
    run_elements(queue, request, [(memory.address, memory.nbytes, rs.DESC_F_INDIRECT)])


@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-PACKED-22")
def test_a_table_is_as_long_as_its_descriptor_says(queue: Queue, rig: Rig) -> None:
    """An indirect table is read as len / 16 entries, one after the other."""
    for pieces in (1, 2, 7):
        request = rig.work.request()
        elements = fitting(queue, queue.elements(request.readable, request.writable), pieces)
        run_elements(queue, request, queue.table(elements))


@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-PACKED-23")
def test_write_flag_of_an_indirect_descriptor(queue: Queue, rig: Rig, case: Case) -> None:
    """The WRITE flag of a descriptor that refers to an indirect table means nothing."""
    request = rig.work.request()
    ((address, length, flags),) = queue.table(queue.elements(request.readable, request.writable))
    case.sent("an indirect descriptor with WRITE")
    run_elements(queue, request, [(address, length, flags | rs.DESC_F_WRITE)])


@pytest.mark.ring("IN_ORDER")
@pytest.mark.requirement("DEV-PACKED-24")
def test_batches_of_used_buffers_in_order(queue: Queue, rig: Rig) -> None:
    """With IN_ORDER a used descriptor lies where the first buffer of its batch does, and names the last."""
    count = most(rig, queue)
    position = 0
    for _ in range(2 * queue.size // count + 1):
        sizes = {id: queue.outstanding[id] for id, _ in together(rig, queue, count)}
        queue.wait(count)
        while sizes:
            id, _, flags = entry(queue, position)
            assert flags & MARKS == marks_of(wrap(queue, position)), f"position {position} is not used"
            assert id in sizes, f"position {position} names {id}, outstanding are {list(sizes)}"
            for one in list(sizes)[: list(sizes).index(id) + 1]:
                position += sizes.pop(one)


@pytest.mark.requirement("DEV-PACKED-26", "DEV-PACKED-27")
def test_device_event_suppression_is_well_formed(queue: Queue, rig: Rig) -> None:
    """The device's event flags are 0, 1 or, with EVENT_IDX, 2 with a position inside the ring."""
    event_idx = bool(queue.features >> ft.F_EVENT_IDX & 1)
    for _ in range(2 * queue.size // 3):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        flags, place = int(queue.raw.device["flags"]), int(queue.raw.device["desc"])
        assert flags in ((0, 1, 2) if event_idx else (0, 1)), f"device event flags are {flags:#06x}"
        if flags == rs.EVENT_FLAGS_DESC:
            assert place & 0x7FFF < queue.size, f"device event offset {place & 0x7FFF} of {queue.size}"


@pytest.mark.requirement("DEV-PACKED-28")
def test_driver_event_suppression_is_the_drivers(queue: Queue, rig: Rig) -> None:
    """The device does not write the driver's event suppression."""
    before = queue.raw.driver.tobytes()
    for _ in range(3):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        assert queue.raw.driver.tobytes() == before, "the driver event suppression was written to"


@pytest.mark.requirement("DEV-PACKED-26", "DEV-PACKED-27")
def test_notifications_where_the_device_asks_for_them(queue: Queue, rig: Rig, case: Case) -> None:
    """A driver that notifies only as the device's event suppression asks has every buffer used."""
    case.sent("notifications only where the device's event suppression asks for them")
    position = 0
    for _ in range(queue.size):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        queue.offer(elements, kick=False)
        flags, place = int(queue.raw.device["flags"]), int(queue.raw.device["desc"])
        asked = flags == rs.EVENT_FLAGS_ENABLE or (
            flags == rs.EVENT_FLAGS_DESC
            and any(
                place == one % queue.size | wrap(queue, one) << 15
                for one in range(position, position + len(elements))
            )
        )
        position += len(elements)
        if asked:
            queue.kick()
        queue.wait()


@pytest.mark.requirement("DEV-PACKED-29")
def test_interrupts_are_sent_when_they_are_enabled(queue: Queue, rig: Rig) -> None:
    """With driver event flags 0 each used buffer is notified."""
    for _ in range(3):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        queue.wait_interrupt()


@pytest.mark.requirement("DEV-PACKED-30")
def test_no_interrupts_where_they_are_disabled(queue: Queue, rig: Rig) -> None:
    """With driver event flags 1 no used buffer notification is sent."""
    queue.suppress()
    # A notification that was on its way already is no fault.
    request = rig.work.request()
    queue.run(request.readable, request.writable)
    queue.interrupts()
    for _ in range(3):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
    rig.settle()
    assert queue.interrupts() == 0, "an interrupt came while they are disabled"


@pytest.mark.rings("packed-event_idx")
@pytest.mark.requirement("DEV-PACKED-31")
@pytest.mark.parametrize("offset", [-1, 0, 1, 3, 40])
def test_interrupts_at_the_position_that_was_asked_for(
    queue: Queue, rig: Rig, case: Case, offset: int
) -> None:
    """With driver event flags 2 a notification comes when the descriptor at that position is used."""
    made = together(rig, queue, 1)
    queue.wait()
    position = len(queue.elements(made[0][1].readable, made[0][1].writable))
    queue.interrupts()
    wanted = position + offset
    case.sent(f"event position {offset:+} from the first of 4 descriptors")
    queue.ask_at(wanted % queue.size | wrap(queue, wanted) << 15)
    request = rig.work.request()
    elements = at_least(queue.elements(request.readable, request.writable), 4)
    run_elements(queue, request, elements)
    last = position + len(elements) - 1
    if position <= wanted <= last:
        queue.wait_interrupt()
    else:
        rig.settle()
        assert queue.interrupts() == 0, "an interrupt came though the position was not passed"
