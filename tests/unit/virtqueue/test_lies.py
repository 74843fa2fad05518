"""A device that lies: each lie is named, breaks its queue only, and never the process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from guestpv.errors import DeviceViolation
from guestpv.virtqueue.check import CheckedVirtqueue, InvariantBroken
from guestpv.virtqueue.queue import Virtqueue
from guestpv.virtqueue.raw import RawPacked, RawSplit
from ringpeer import AVAIL, USED, WRITE, Bench, bench, mask

SPLIT, PACKED = mask(), mask("RING_PACKED")
FORMATS = pytest.mark.parametrize("base", [SPLIT, PACKED], ids=["split", "packed"])


def outstanding(features: int, count: int = 2, room: int = 40, size: int = 8) -> Bench:
    """A bench with ``count`` published buffers: 4 readable and ``room`` writable bytes in two descriptors."""
    b = bench(features, size, name="the queue under test")
    read, write = b.pool.allocate(4), b.pool.allocate(room)
    for _ in range(count):
        b.queue.add([read], [write])
    b.queue.publish()
    return b


def use(b: Bench, id: int, length: int) -> None:
    """Write one used entry as a device would, whatever it says."""
    if b.queue.packed:
        at, wrap = b.peer.used_at, b.peer.used_wrap
        b.queue.desc[at]["id"], b.queue.desc[at]["len"] = id, length
        b.queue.desc[at]["flags"] = (AVAIL | USED if wrap else 0) | WRITE
    else:
        b.queue.device["ring"][b.peer.next_used % b.queue.size] = (id, length)
        b.peer.next_used += 1
        b.queue.device["idx"] = b.peer.next_used % 0x10000


def caught(b: Bench, what: str, requirement: str, act: Callable[[], object] | None = None) -> None:
    """The violation is named, stays, and leaves another queue and the drain alone."""
    other = outstanding(b.queue.features)
    with pytest.raises(DeviceViolation, match=what) as first:
        (act or b.queue.reap_burst)()
    assert first.value.requirement == requirement
    assert str(first.value).startswith("the queue under test: ")
    assert f"VIRTIO 1.4 section {first.value.section}" in str(first.value)
    for operation in (
        b.queue.publish,
        b.queue.reap_burst,
        lambda: list(b.queue.completions()),
        b.queue.notify,
    ):
        with pytest.raises(DeviceViolation, match=what):
            operation()
    assert b.queue.wait(0), "nobody sleeps on a broken queue"
    count = b.queue.outstanding
    assert len(b.queue.drain()) == count
    assert not b.queue.pending()
    chain = other.peer.pop()
    assert chain is not None
    other.peer.push(chain, 1)
    assert len(list(other.queue.completions())) == 1


@FORMATS
@pytest.mark.parametrize("id", [8, 9, 0xFFFF])
def test_used_id_out_of_range(base: int, id: int) -> None:
    b = outstanding(base)
    use(b, id, 0)
    caught(
        b,
        f"used id {id} at position 0 is not below the queue size 8",
        "DEV-PACKED-20" if b.queue.packed else "DEV-SPLIT-37",
    )


def test_used_id_uses_all_32_bits_of_a_split_ring() -> None:
    b = outstanding(SPLIT)
    use(b, 0x10000, 0)
    caught(b, "used id 65536 at position 0 is not below", "DEV-SPLIT-37")


@FORMATS
def test_used_id_never_made_available(base: int) -> None:
    b = outstanding(base)
    use(b, 7, 0)
    caught(b, "used id 7 at position 0 was never made", "DEV-PACKED-20" if b.queue.packed else "DEV-SPLIT-37")


@FORMATS
def test_used_id_added_but_not_published(base: int) -> None:
    b = outstanding(base)
    token = b.queue.add([b.pool.allocate(4)])
    use(b, token & 0xFFFF, 0)
    caught(b, "was never made available", "DEV-PACKED-20" if b.queue.packed else "DEV-SPLIT-37")


@FORMATS
def test_used_id_repeated(base: int) -> None:
    b = outstanding(base, 3)
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, 4)
    assert len(list(b.queue.completions())) == 1
    use(b, chain.id, 4)
    caught(
        b,
        f"used id {chain.id} at position .* came back before",
        "DEV-PACKED-20" if b.queue.packed else "DEV-SPLIT-37",
    )


@FORMATS
def test_what_came_back_before_the_lie_is_delivered_first(base: int) -> None:
    b = outstanding(base, 3)
    chain = b.peer.pop()
    assert chain is not None
    b.peer.push(chain, 4)
    use(b, 7, 4)
    ids, lengths = b.queue.reap_burst()
    assert (ids.tolist(), lengths.tolist()) == ([chain.id], [4])
    caught(b, "used id 7", "DEV-PACKED-20" if b.queue.packed else "DEV-SPLIT-37")


@FORMATS
@pytest.mark.parametrize("length", [41, 44, 0xFFFFFFFF])
@pytest.mark.parametrize("extra", ["", "INDIRECT_DESC", "IN_ORDER"])
def test_used_length_above_the_writable_bytes(base: int, length: int, extra: str) -> None:
    b = outstanding(base | mask(*filter(None, [extra])))
    chain = b.peer.pop()
    assert chain is not None
    use(b, chain.id, length)
    caught(
        b,
        f"used length {length} of buffer {chain.id} at position 0 is more than its 40 writable bytes",
        "DEV-PACKED-21" if b.queue.packed else "DEV-SPLIT-38",
    )


@FORMATS
def test_used_length_of_a_readable_buffer(base: int) -> None:
    b = bench(base, 4, name="the queue under test")
    id = b.queue.add([b.pool.allocate(9)]) & 0xFFFF
    b.queue.publish()
    use(b, id, 1)
    caught(b, "more than its 0 writable bytes", "DEV-PACKED-21" if b.queue.packed else "DEV-SPLIT-38")


@pytest.mark.requirement("DRV-PACKED-37")
def test_packed_length_without_write_is_reserved_and_ignored() -> None:
    b = outstanding(PACKED)
    id = int(b.queue.desc[1]["id"])
    b.queue.desc[0]["id"], b.queue.desc[0]["len"] = id, 0xFFFFFFFF
    b.queue.desc[0]["flags"] = AVAIL | USED
    assert [length for _, length in b.queue.completions()] == [0]


@pytest.mark.parametrize("jump", [3, 100, 0x8000, 0xFFFF])
def test_used_index_jumping(jump: int) -> None:
    b = outstanding(SPLIT, 2)
    b.queue.device["idx"] = jump
    caught(b, f"used idx is {jump:#06x}: more buffers than were made available .*0x0002", "DEV-SPLIT-36")


def test_used_index_jumping_when_nothing_is_outstanding_or_published() -> None:
    b = bench(SPLIT, 8, name="the queue under test")
    b.queue.add([b.pool.allocate(4)])
    b.queue.device["idx"] = 1
    caught(b, "used idx is 0x0001", "DEV-SPLIT-36")


@pytest.mark.parametrize("flags", [USED, USED | WRITE, 0])
def test_packed_wrap_bit_flipped(flags: int) -> None:
    """On the first lap available is AVAIL alone and used both; what is left belongs to no lap."""
    b = outstanding(PACKED)
    b.queue.desc[0]["flags"] = flags
    caught(b, f"flags {flags:#06x} of descriptor 0 are neither available .* wrap counter 1", "DEV-PACKED-16")


def test_packed_used_descriptor_although_nothing_is_outstanding() -> None:
    b = bench(PACKED, 8, name="the queue under test")
    b.queue.desc[0]["flags"] = AVAIL | USED
    caught(b, "descriptor 0 is marked used .* although no buffer is outstanding", "DEV-PACKED-20")


def test_in_order_device_that_jumps_ahead() -> None:
    b = outstanding(SPLIT | mask("IN_ORDER"), 3)
    b.queue.device["ring"][0] = (4, 0)
    b.queue.device["idx"] = 2
    caught(b, "IN_ORDER: used id 4 at position 0 is out of order; id 0 is next", "DEV-SPLIT-41")


@pytest.mark.parametrize("flags", [2, 3, 0xFFFF])
def test_split_suppression_flags_that_do_not_exist(flags: int) -> None:
    b = outstanding(SPLIT)
    b.queue.device["flags"] = flags
    b.queue.add([b.pool.allocate(4)])
    caught(b, f"suppression flags are {flags:#06x}; at most 1", "DEV-SPLIT-18", b.queue.publish)


@pytest.mark.parametrize(
    ("features", "flags"), [(PACKED, 2), (PACKED | mask("EVENT_IDX"), 3), (PACKED, 0x100)]
)
def test_packed_suppression_flags_that_do_not_exist(features: int, flags: int) -> None:
    b = outstanding(features)
    b.queue.device["flags"] = flags
    b.queue.add([b.pool.allocate(4)])
    caught(b, f"suppression flags are {flags:#06x}", "DEV-PACKED-27", b.queue.publish)


def test_packed_event_offset_outside_the_ring() -> None:
    b = outstanding(PACKED | mask("EVENT_IDX"))
    b.queue.device["desc"], b.queue.device["flags"] = 8 | 1 << 15, 2
    b.queue.add([b.pool.allocate(4)])
    caught(b, "names descriptor 8, which is not below the queue size 8", "DEV-PACKED-26", b.queue.publish)


@FORMATS
@pytest.mark.parametrize("extra", ["", "INDIRECT_DESC", "IN_ORDER"])
def test_descriptors_rewritten_behind_the_drivers_back_lead_the_driver_nowhere(base: int, extra: str) -> None:
    """The free list, chains and tables are private: garbage in the ring changes nothing on this side."""
    b = outstanding(base | mask(*filter(None, [extra])), 2)
    chains = [b.peer.pop(), b.peer.pop()]
    for name in ("addr", "len", "id") if b.queue.packed else ("addr", "len", "flags", "next"):
        b.queue.desc[name] = 0xA5A5
    if not b.queue.packed:
        b.queue.driver["ring"][:] = 0xA5A5
        b.queue.driver["idx"] = 0xA5A5
        b.queue.device["idx"] = 0
    used = []
    for chain in chains:
        assert chain is not None
        b.peer.push(chain, 40)
        used += [length for _, length in b.queue.completions()]
    assert used == [40, 40]
    assert b.queue.free_slots == 8
    part = b.pool.allocate(8)
    tokens = {b.queue.add([part]) & 0xFFFF for _ in range(8)}
    assert tokens == set(range(8))


@FORMATS
def test_random_event_fields_never_break_anything_but_the_kick(base: int) -> None:
    """Every value that avail_event, or the offset under flags DESC, can have: at worst a kick too many."""
    b = bench(base | mask("EVENT_IDX"), 8)
    part = b.pool.allocate(4)
    for value in range(0, 0x10000, 251):
        if b.queue.packed:
            b.queue.device["desc"], b.queue.device["flags"] = value & 0x8007, 2
        else:
            b.queue.device["avail_event"], b.queue.device["flags"] = value, value & 1
        b.queue.add([part])
        b.queue.publish()
        chain = b.peer.pop()
        assert chain is not None
        b.peer.push(chain, 0)
        assert len(list(b.queue.completions())) == 1


def test_raw_split_ring_takes_any_value_and_reports_what_the_device_said() -> None:
    b = bench(SPLIT, 4)
    part = b.pool.allocate(64)
    raw = RawSplit(b.queue)
    head = raw.chain([(part.address, 16, 0), (part.address + 16, 48, WRITE)], first=3)
    assert raw.desc[3]["next"] == 0
    raw.offer(head)
    raw.notify()
    raw.notify(0xBEEF)
    assert b.kicks == [5, 0xBEEF]
    chain = b.peer.pop()
    assert chain is not None
    assert (chain.id, chain.count, chain.room) == (3, 2, 48)
    b.peer.push(chain, 17)
    assert raw.used_entries() == [(3, 17)]
    assert raw.used_entries() == []
    raw.offer(advance=0x8000)
    assert raw.avail["idx"] == 0x8001


def test_raw_packed_ring_takes_any_value_and_reports_what_the_device_said() -> None:
    b = bench(PACKED, 3)
    part = b.pool.allocate(64)
    raw = RawPacked(b.queue)
    for _lap in range(3):
        raw.offer([(part.address, 16, 0), (part.address + 16, 48, WRITE)], id=0x1234)
        assert raw.used_entry(2) is None
        chain = b.peer.pop()
        assert chain is not None
        assert (chain.id, chain.count, chain.room) == (0x1234, 2, 48)
        b.peer.push(chain, 17)
        entry = raw.used_entry(2)
        assert entry is not None
        assert entry[:2] == (0x1234, 17)
    raw.descriptor(1, 1, 2, 3, 0xFFFF)
    assert raw.desc[1].tolist() == (1, 2, 3, 0xFFFF)


def checked(features: int) -> Bench:
    b = bench(features, 8, name="the queue under test", queue_type=CheckedVirtqueue)
    read, write = b.pool.allocate(4), b.pool.allocate(40)
    for _ in range(2):
        b.queue.add([read], [write])
    b.queue.publish()
    return b


@FORMATS
@pytest.mark.parametrize("field", ["addr", "len"])
def test_the_checked_queue_names_a_rewritten_descriptor(base: int, field: str) -> None:
    b = checked(base)
    b.queue.desc[3][field] ^= 1
    with pytest.raises(DeviceViolation, match=r"rewrote descriptor 3 of buffer [12]") as caught:
        b.queue.publish()
    assert caught.value.requirement == ("DEV-PACKED-07" if b.queue.packed else "DEV-SPLIT-06")
    b.queue.desc[3][field] ^= 1
    b.queue.publish()


@FORMATS
def test_the_checked_queue_names_a_rewritten_table(base: int) -> None:
    b = checked(base | mask("INDIRECT_DESC"))
    b.space.at(int(b.queue.desc[1]["addr"]), 32)[17] ^= 1
    with pytest.raises(DeviceViolation, match="rewrote the indirect table of buffer 1"):
        b.queue.reap_burst()


def test_the_checked_queue_knows_the_flags_of_event_index() -> None:
    b = checked(mask("EVENT_IDX"))
    b.queue.device["flags"] = 1
    with pytest.raises(DeviceViolation, match="used flags are 0x1") as caught:
        b.queue.reap_burst()
    assert caught.value.requirement == "DEV-SPLIT-20"


def test_the_checked_queue_finds_a_driver_that_broke_an_invariant() -> None:
    b = checked(SPLIT)
    b.queue.driver["idx"] = 1
    with pytest.raises(InvariantBroken, match="index: available idx 0x0001, published 0x0002"):
        b.queue.publish()
    b.queue.driver["idx"] = 2
    b.queue.driver["flags"] = 2
    with pytest.raises(InvariantBroken, match="suppression: available flags 0x2"):
        b.queue.publish()
    b.queue.driver["flags"] = 0
    placed = b.queue._placed
    placed[7] = placed[0]
    with pytest.raises(InvariantBroken, match=r"disjoint: descriptors \[0, 1\] belong to two buffers"):
        b.queue.publish()
    del placed[7], placed[0]
    with pytest.raises(InvariantBroken, match="counted: 4 free and 2 taken descriptors of 8"):
        b.queue.publish()


@FORMATS
def test_the_checked_queue_sees_a_buffer_that_does_not_stand_as_it_was_added(
    base: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    b = checked(base)
    read, write = b.pool.allocate(4), b.pool.allocate(40)
    monkeypatch.setattr(Virtqueue, "add", lambda self, *_: Virtqueue.add_burst(self, *burst)[0])
    burst = np.array([[read.address, write.address]], np.uint64), np.array([[4, 40]], np.uint32), 2
    with pytest.raises(InvariantBroken, match="shape: buffer"):
        b.queue.add([read], [write])
