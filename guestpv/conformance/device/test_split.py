"""The split virtqueue: descriptors, chains, indirect tables and the two rings (2.7)."""

from __future__ import annotations

import numpy as np
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
    scattered,
    sized,
    together,
)
from guestpv.spec import blk
from guestpv.spec import features as ft
from guestpv.spec import ring as rs

pytestmark = pytest.mark.rings("split*")

ANY_ORDER = ("split", "split-event_idx")
"""Without IN_ORDER descriptors may lie anywhere."""
POISON = 0xEE


def both_rings(queue: Queue) -> tuple[bytes, bytes]:
    """Descriptor table and available ring, which only the driver writes."""
    return queue.raw.desc.tobytes(), queue.raw.avail.tobytes()


@pytest.mark.device("blk")
@pytest.mark.formats
@pytest.mark.requirement("DEV-SPLIT-01")
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
@pytest.mark.requirement("DEV-SPLIT-01", "DEV-SPLIT-27")
def test_any_split_of_a_request_over_descriptors(queue: Queue, rig: Rig, case: Case) -> None:
    """A request means the same in whatever number of descriptors it comes."""
    case.sent("one request cut into ever more descriptors")
    for pieces in (1, 2, 3, 5, 16):
        request = rig.work.request()
        elements = queue.elements(request.readable, request.writable)
        run_elements(queue, request, fitting(queue, elements, pieces))


@pytest.mark.requirement("DEV-SPLIT-03")
def test_readable_buffers_stay_as_they_are(queue: Queue, rig: Rig) -> None:
    """The device writes nothing into device-readable buffers."""
    for _ in range(3):
        request = rig.work.request()
        before = [buffer.array.tobytes() for buffer in request.readable]
        queue.run(request.readable, request.writable)
        after = [buffer.array.tobytes() for buffer in request.readable]
        assert after == before, "a device-readable buffer was written to"


@pytest.mark.requirement("DEV-SPLIT-06", "DEV-SPLIT-26")
def test_what_the_driver_writes_is_not_written_by_the_device(queue: Queue, rig: Rig) -> None:
    """Descriptor table and available ring are as the driver left them after their buffers were used."""
    for _ in range(3):
        request = rig.work.request()
        queue.add(request.readable, request.writable, kick=False)
        before = both_rings(queue)
        queue.kick()
        queue.wait()
        descriptors, available = both_rings(queue)
        assert descriptors == before[0], "the descriptor table was written to"
        assert available == before[1], "the available ring was written to"


@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-SPLIT-07")
def test_write_flag_of_an_indirect_descriptor(queue: Queue, rig: Rig, case: Case) -> None:
    """The WRITE flag of a descriptor that refers to an indirect table means nothing."""
    request = rig.work.request()
    ((address, length, flags),) = queue.table(queue.elements(request.readable, request.writable))
    case.sent("an indirect descriptor with WRITE")
    run_elements(queue, request, [(address, length, flags | rs.DESC_F_WRITE)])


@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-SPLIT-08")
def test_direct_descriptors_before_an_indirect_one(queue: Queue, rig: Rig, case: Case) -> None:
    """A chain may begin with direct descriptors and end with one that refers to a table."""
    request = rig.work.request()
    elements = at_least(queue.elements(request.readable, request.writable), 3)
    case.sent("one direct descriptor, then an indirect one with the rest")
    run_elements(queue, request, [elements[0], *queue.table(elements[1:])])


@pytest.mark.rings(*ANY_ORDER)
@pytest.mark.requirement("DEV-SPLIT-27")
def test_descriptors_anywhere_in_the_table(queue: Queue, rig: Rig) -> None:
    """A chain follows next, wherever its descriptors lie."""
    request = rig.work.request()
    elements = at_least(queue.elements(request.readable, request.writable), 3)
    head = scattered(queue, elements)
    queue.kick()
    ((used, length),) = queue.wait()
    assert used == head, f"chain {head} was made available, {used} came back"
    judge(request, length)


@pytest.mark.rings(*ANY_ORDER)
@pytest.mark.requirement("DEV-SPLIT-28")
def test_next_without_the_flag_is_not_looked_at(queue: Queue, rig: Rig, case: Case) -> None:
    """next of a descriptor without NEXT may be anything."""
    for garbage in (0, 1, queue.size, 0xFFFF):
        request = rig.work.request()
        case.sent(f"next {garbage:#x} in a descriptor without NEXT")
        scattered(queue, queue.elements(request.readable, request.writable), garbage=garbage)
        queue.kick()
        ((_, length),) = queue.wait()
        judge(request, length)


@pytest.mark.rings("split-indirect")
@pytest.mark.requirement("DEV-SPLIT-29")
def test_entries_of_a_table_in_any_order(queue: Queue, rig: Rig) -> None:
    """An indirect table is followed from entry 0 along next, whatever the order of its entries."""
    request = rig.work.request()
    elements = at_least(queue.elements(request.readable, request.writable), 4)
    places = [0, *range(len(elements) - 1, 0, -1)]
    memory = rig.buffer(16 * len(elements))
    rows = memory.array.view(rs.SPLIT_DESC)
    for number, (address, length, flags) in enumerate(elements):
        last = number + 1 == len(elements)
        more = 0 if last else rs.DESC_F_NEXT
        rows[places[number]] = (address, length, flags | more, 0 if last else places[number + 1])
    run_elements(queue, request, [(memory.address, memory.nbytes, rs.DESC_F_INDIRECT)])


@pytest.mark.device("blk")
@pytest.mark.ring("INDIRECT_DESC")
@pytest.mark.requirement("DEV-SPLIT-30")
def test_a_table_with_readable_and_writable_entries(queue: Queue, rig: Rig) -> None:
    """One indirect table may hold what the device reads and what it writes."""
    request = rig.work.request()
    run_elements(queue, request, queue.table(queue.elements(request.readable, request.writable)))


@pytest.mark.rings("split", "split-event_idx")
@pytest.mark.requirement("DEV-SPLIT-31", "DEV-SPLIT-35", "DEV-SPLIT-34")
@pytest.mark.parametrize("size", [8, 32, 128])
def test_queues_of_several_sizes(negotiated: Rig, size: int) -> None:
    """Buffers and notifications find their places in the rings of any queue size, round after round."""
    rig = negotiated
    if rig.transport.queue_max_size(rig.work.main) < size:
        pytest.skip(f"the queue cannot have {size} entries")
    queue = sized(rig, size)
    for place in range(2 * size + 3):
        request = rig.work.request()
        if queue.features >> ft.F_EVENT_IDX & 1:
            queue.ask_at(place)
        id = queue.add(request.readable, request.writable)
        ((used, length),) = queue.wait()
        assert used == id, f"buffer {id} was made available, {used} came back"
        judge(request, length)
    queue.wait_interrupt()


@pytest.mark.formats
@pytest.mark.requirement("DEV-SPLIT-32")
def test_the_first_available_entry_is_in_slot_0(queue: Queue, rig: Rig) -> None:
    """The first buffer of a queue is the one that ring[0] names."""
    wanted, decoy = rig.work.request(), rig.work.request()
    elements = queue.elements(decoy.readable, decoy.writable)
    queue.raw.chain(elements, queue.size - len(elements))
    queue.raw.avail["ring"][:] = queue.size - len(elements)
    id = queue.add(wanted.readable, wanted.writable)
    ((used, length),) = queue.wait()
    assert used == id, f"ring[0] names {id}, {used} came back"
    judge(wanted, length)


@pytest.mark.requirement("DEV-SPLIT-34", "DEV-SPLIT-37")
def test_batches_across_the_end_of_the_rings(negotiated: Rig) -> None:
    """Every buffer of every batch comes back exactly once, also where a batch runs over the ring's end."""
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
        assert queue.used() == [], "more buffers came back than were made available"


@pytest.mark.requirement("DEV-SPLIT-38")
def test_used_length(queue: Queue, rig: Rig) -> None:
    """The used length counts what was written to the device-writable part, and is 0 without one."""
    for _ in range(3):
        request = rig.work.request()
        judge(request, queue.run(request.readable, request.writable))


@pytest.mark.formats
@pytest.mark.requirement("DEV-SPLIT-15", "DEV-SPLIT-16")
def test_entry_and_data_are_there_when_idx_says_so(queue: Queue, rig: Rig) -> None:
    """When the used idx covers an entry, the entry and the bytes that it counts have been written."""
    for number in range(64):
        request = rig.work.request()
        queue.raw.used["ring"][number % queue.size] = (0xFFFFFFFF, 0xFFFFFFFF)
        for buffer in request.writable:
            buffer.array[-1] = POISON
        id = queue.add(request.readable, request.writable)
        ((used, length),) = queue.wait()
        assert used == id, f"the used idx covers an entry with id {used:#x}, {id} was made available"
        judge(request, length)


@pytest.mark.requirement("DEV-SPLIT-18", "DEV-SPLIT-20")
def test_used_flags(queue: Queue, rig: Rig) -> None:
    """Used flags are 0 or 1, and 0 with VIRTIO_F_EVENT_IDX."""
    allowed = (0,) if queue.features >> ft.F_EVENT_IDX & 1 else (0, 1)
    for _ in range(3):
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        flags = int(queue.raw.used["flags"])
        assert flags in allowed, f"used flags are {flags:#x}"


@pytest.mark.ring("EVENT_IDX")
@pytest.mark.requirement("DEV-SPLIT-40")
def test_notifications_where_avail_event_asks_for_them(queue: Queue, rig: Rig, case: Case) -> None:
    """A driver that notifies only when it passes avail_event has every buffer used."""
    case.sent("notifications only where the available idx passes avail_event")
    kicks = 0
    for number in range(2 * min(queue.size, 64)):
        request = rig.work.request()
        queue.add(request.readable, request.writable, kick=False)
        event = int(queue.raw.used["avail_event"])
        if event == number & 0xFFFF:
            queue.kick()
            kicks += 1
        ((_, length),) = queue.wait()
        judge(request, length)
    assert kicks, "the device asked for no notification at all"


@pytest.mark.ring("IN_ORDER")
@pytest.mark.requirement("DEV-SPLIT-41")
def test_batches_of_used_buffers_in_order(queue: Queue, rig: Rig) -> None:
    """With IN_ORDER each used entry names a buffer, and lies in the slot of the first that it stands for."""
    count = most(rig, queue)
    position = 0
    for _ in range(2 * queue.size // count + 1):
        heads = [id for id, _ in together(rig, queue, count)]
        rig.wait(
            lambda end=position + count: int(queue.raw.used["idx"]) == end & 0xFFFF,  # type: ignore[misc]
            f"used idx {position + count}",
        )
        while heads:
            id = int(queue.raw.used["ring"][position % queue.size]["id"])
            assert id in heads, f"slot {position % queue.size} names {id}, outstanding are {heads}"
            batch = heads.index(id) + 1
            del heads[:batch]
            position += batch
        queue.used()


@pytest.mark.rings("split")
@pytest.mark.requirement("DEV-SPLIT-33", "DEV-SPLIT-36", "DEV-SPLIT-37")
def test_more_buffers_than_an_index_can_count(queue: Queue, rig: Rig, case: Case) -> None:
    """Both indices go from 65535 to 0, and no buffer is lost or used twice there."""
    count = most(rig, queue, queue.size)
    heads = [id for id, _ in together(rig, queue, count)]
    queue.wait(count)
    case.sent(f"{count} buffers again and again, until both indices have wrapped")
    wanted = np.sort(np.array(heads))
    ring, used = queue.raw.avail["ring"], queue.raw.used
    position, total = count, 0x10000 + 2 * count
    rig.case.log.clear()
    while position < total:
        slots = (position + np.arange(count)) % queue.size
        ring[slots] = heads
        queue.raw.fence()
        position += count
        queue.raw.avail["idx"] = position & 0xFFFF
        queue.raw.fence()
        queue.raw.notify()
        end = position & 0xFFFF
        rig.wait(lambda: int(used["idx"]) == end, f"used idx {end}")  # noqa: B023
        found = np.sort(used["ring"]["id"][slots])
        assert np.array_equal(found, wanted), f"at used idx {end} not every buffer came back once"
    queue.raw.idx = queue.raw.seen = position & 0xFFFF
    rig.settle()
    assert int(used["idx"]) == position & 0xFFFF, "buffers were used twice"


@pytest.mark.requirement("DEV-SPLIT-22")
def test_notifications_without_buffers(queue: Queue, rig: Rig, case: Case) -> None:
    """Notifications that announce nothing are harmless."""
    case.sent("notifications without a new buffer")
    for _ in range(3):
        queue.kick()
        rig.settle()
        assert queue.used() == [], "a buffer came back that was never made available"
        request = rig.work.request()
        judge(request, queue.run(request.readable, request.writable))


@pytest.mark.ring("NOTIFICATION_DATA")
@pytest.mark.requirement("DEV-SPLIT-42")
def test_the_same_notification_twice(queue: Queue, rig: Rig, case: Case) -> None:
    """A repeated notification with the same position uses nothing twice."""
    case.sent("each notification three times")
    for _ in range(3):
        request = rig.work.request()
        id = queue.add(request.readable, request.writable)
        queue.kick()
        queue.kick()
        ((used, length),) = queue.wait()
        assert used == id, f"buffer {id} was made available, {used} came back"
        judge(request, length)
        rig.settle()
        assert queue.used() == [], "a buffer came back twice"


@pytest.mark.formats
@pytest.mark.requirement("DEV-SPLIT-25")
def test_sizes_are_powers_of_two(negotiated: Rig) -> None:
    """The size that a split queue is offered with is a power of 2, at most 32768, or 0."""
    common = negotiated.pci.common
    for index in range(common.read("num_queues")):
        common.write("queue_select", index)
        size = common.read("queue_size")
        assert size & (size - 1) == 0, f"queue {index} is offered with size {size}"
        assert size <= rs.MAX_QUEUE_SIZE, f"queue {index} is offered with size {size}"


@pytest.mark.rings("split", "split-indirect", "split-in_order")
@pytest.mark.requirement("DEV-SPLIT-09", "DEV-SPLIT-11")
def test_interrupts_follow_available_flags(queue: Queue, rig: Rig, case: Case) -> None:
    """Without EVENT_IDX and with flags 0 each used buffer is notified, whatever used_event says."""
    for event in (0, 0x8000, 0xFFFF):
        request = rig.work.request()
        queue.raw.avail["used_event"] = event
        case.sent(f"used_event {event:#x} without EVENT_IDX, flags 0")
        queue.run(request.readable, request.writable)
        queue.wait_interrupt()


@pytest.mark.hostile
@pytest.mark.ring("EVENT_IDX")
@pytest.mark.requirement("DEV-SPLIT-12")
def test_available_flags_mean_nothing_with_event_idx(queue: Queue, rig: Rig, case: Case) -> None:
    """With EVENT_IDX bit 0 of the available flags is ignored."""
    queue.suppress()
    case.sent("flags 1 with EVENT_IDX, used_event at the next entry")
    for number in range(3):
        queue.ask_at(number)
        request = rig.work.request()
        queue.run(request.readable, request.writable)
        queue.wait_interrupt()


@pytest.mark.ring("EVENT_IDX")
@pytest.mark.requirement("DEV-SPLIT-13", "DEV-SPLIT-39")
@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 3, 4])
def test_interrupts_where_used_event_asks_for_them(queue: Queue, rig: Rig, case: Case, offset: int) -> None:
    """A used buffer notification comes when the used idx passes used_event, and only then."""
    count = min(4, most(rig, queue))
    if count < 4:
        pytest.skip("the queue is too small for a batch of 4")
    # A device may send one notification before it has seen where the driver stands.
    queue.ask_at(0)
    together(rig, queue, count)
    queue.wait(count)
    queue.wait_interrupt()
    case.sent(f"used_event {offset:+} from the first of 4 buffers")
    queue.ask_at(4 + offset)
    together(rig, queue, count)
    queue.wait(count)
    if 0 <= offset < 4:
        queue.wait_interrupt()
    else:
        rig.settle()
        assert queue.interrupts() == 0, "an interrupt came though the used idx did not pass used_event"
