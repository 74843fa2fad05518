"""The block device: configuration, requests and their status (5.2). What a check writes it takes back."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.disk import Disk, segments
from guestpv.conformance.queue import Queue
from guestpv.conformance.rig import Rig
from guestpv.conformance.shapes import judge
from guestpv.spec import blk
from guestpv.spec.status import Status

pytestmark = [pytest.mark.device("blk"), pytest.mark.formats]

SECTOR = 0x0102
"""Where checks write: two bytes that differ, so that a number read backwards leads elsewhere."""
UNKNOWN_TYPE = 0x7F


@pytest.fixture
def ring(negotiated: Rig, rig: Rig) -> int:
    """Ring features of the combination; the device is reset again."""
    features = negotiated.transport.features
    rig.transport.reset(rig.limit)
    return features


@pytest.mark.requirement("DEV-BLK-02")
def test_flush_is_offered_with_config_wce(rig: Rig) -> None:
    """CONFIG_WCE is offered only together with FLUSH."""
    offered = rig.transport.offered
    if not offered >> blk.F_CONFIG_WCE & 1:
        pytest.skip("CONFIG_WCE is not offered")
    assert offered >> blk.F_FLUSH & 1, "CONFIG_WCE is offered without FLUSH"


@pytest.mark.requirement("DEV-BLK-03")
def test_writeback_without_flush(rig: Rig, ring: int) -> None:
    """With CONFIG_WCE and without FLUSH writeback begins as 0."""
    transport = rig.transport
    if not transport.offered >> blk.F_CONFIG_WCE & 1:
        pytest.skip("CONFIG_WCE is not offered")
    # By hand: our own negotiation takes no feature without the one that it needs.
    steps = (Status.ACKNOWLEDGE, Status.ACKNOWLEDGE | Status.DRIVER)
    for status in steps:
        transport.write_status(status)
    transport.write_features(rig.features_for(ring) & ~(1 << blk.F_FLUSH) | 1 << blk.F_CONFIG_WCE)
    transport.write_status(steps[-1] | Status.FEATURES_OK)
    if not transport.read_status() & Status.FEATURES_OK:
        pytest.skip("the device refuses CONFIG_WCE without FLUSH")
    value = transport.read_config(blk.CONFIG["writeback"].offset, 1)
    assert value == 0, f"writeback is {value} without FLUSH"


@pytest.mark.requirement("DEV-BLK-77")
def test_writeback_keeps_what_the_driver_writes(rig: Rig, ring: int) -> None:
    """writeback is 0 or 1, and keeps what the driver writes."""
    disk = Disk(rig, ring, blk.F_CONFIG_WCE, blk.F_FLUSH)
    first = disk.config("writeback")
    assert first in (0, 1), f"writeback is {first}"
    for value in (1 - first, first):
        rig.transport.config_write(blk.CONFIG["writeback"], value)
        found = disk.config("writeback")
        assert found == value, f"writeback is {found} after {value} was written"


@pytest.mark.requirement("DEV-BLK-04")
def test_padding_of_the_configuration(rig: Rig, ring: int) -> None:
    """unused0 at 33 and unused1 at 57 are 0."""
    Disk(rig, ring)
    length = rig.transport.config_length
    for offset in (33, 57, 58, 59):
        if offset < length:
            value = rig.transport.read_config(offset, 1)
            assert value == 0, f"the padding at {offset} is {value:#x}"


@pytest.mark.requirement("DEV-BLK-23", "DEV-BLK-24")
def test_a_read_only_disk_refuses_writes(rig: Rig, ring: int) -> None:
    """With RO a write ends with IOERR and changes nothing."""
    disk = Disk(rig, ring, blk.F_RO)
    before = disk.read(SECTOR)
    status = disk.status(blk.T_OUT, SECTOR, bytes(byte ^ 0xFF for byte in before))
    assert disk.read(SECTOR) == before, "the write changed the disk"
    assert status == blk.S_IOERR, f"status {status} of a write to a read-only disk"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-25", "DEV-BLK-26")
@pytest.mark.parametrize("kind", [blk.T_DISCARD, blk.T_WRITE_ZEROES])
def test_unknown_flags_of_ranges(rig: Rig, ring: int, kind: int, case: Case) -> None:
    """Flags that are not defined, and unmap on a discard, end with UNSUPP."""
    disk = Disk(rig, ring, blk.F_DISCARD if kind == blk.T_DISCARD else blk.F_WRITE_ZEROES)
    wrong = (1, 2, 0x80000000) if kind == blk.T_DISCARD else (2, 0x80000000)
    for flags in wrong:
        case.sent(f"{blk.TYPE_NAMES[kind]} with flags {flags:#x}")
        status = disk.status(kind, 0, segments((SECTOR, 8, flags)))
        assert status == blk.S_UNSUPP, f"status {status} of {blk.TYPE_NAMES[kind]} with flags {flags:#x}"


@pytest.mark.requirement("DEV-BLK-29", "DEV-BLK-74", "DEV-BLK-70")
def test_written_zeroes_are_read(rig: Rig, ring: int) -> None:
    """After WRITE_ZEROES exactly the range of each segment reads as zeroes, whatever unmap says."""
    disk = Disk(rig, ring, blk.F_WRITE_ZEROES)
    with disk.borrowed(SECTOR, 4):
        full = disk.read(SECTOR, 4)
        for unmap in (0, blk.DISCARD_F_UNMAP):
            disk.write(SECTOR, full)
            status = disk.status(blk.T_WRITE_ZEROES, 0, segments((SECTOR + 1, 2, unmap)))
            assert status == blk.S_OK, f"status {status}"
            found = disk.read(SECTOR, 4)
            expected = full[:512] + bytes(1024) + full[1536:]
            assert found == expected, f"not the two sectors of the segment were zeroed (flags {unmap})"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-38")
def test_zone_requests_without_zones(rig: Rig, ring: int) -> None:
    """Without ZONED the zone requests end with UNSUPP."""
    if rig.transport.offered >> blk.F_ZONED & 1:
        pytest.skip("the disk has zones")
    disk = Disk(rig, ring)
    for kind in blk.ZONE_TYPES:
        status = disk.status(kind, 0, into=512 if kind == blk.T_ZONE_REPORT else 0)
        assert status == blk.S_UNSUPP, f"status {status} of request type {kind}"


@pytest.mark.requirement("DEV-BLK-71", "DEV-BLK-70")
def test_status_of_good_bad_and_unknown_requests(rig: Rig, ring: int, case: Case) -> None:
    """Status is 0 for a good request, 1 beyond the end of the disk, 2 for a type that does not exist."""
    disk = Disk(rig, ring)
    case.sent("a read, a read beyond the end, an unknown type")
    assert disk.status(blk.T_IN, 0, into=512) == blk.S_OK
    beyond = disk.status(blk.T_IN, disk.capacity, into=512)
    assert beyond == blk.S_IOERR, f"status {beyond} of a read at sector {disk.capacity}, the capacity"
    unknown = disk.status(UNKNOWN_TYPE, 0)
    assert unknown == blk.S_UNSUPP, f"status {unknown} of request type {UNKNOWN_TYPE}"


@pytest.mark.requirement("DEV-BLK-67", "DEV-BLK-63")
def test_capacity_counts_sectors_of_512_bytes(rig: Rig, ring: int) -> None:
    """The last sector of 512 bytes is at capacity - 1."""
    disk = Disk(rig, ring)
    last = disk.status(blk.T_IN, disk.capacity - 1, into=512)
    if last == blk.S_ZONE_INVALID_CMD:
        pytest.skip("the last zone is offline")
    assert last == blk.S_OK, f"status {last} of a read of the last sector"
    status = disk.status(blk.T_IN, disk.capacity, into=512)
    assert status != blk.S_OK, f"sector {disk.capacity} of a disk of {disk.capacity} can be read"


@pytest.mark.requirement("DEV-BLK-68", "DEV-BLK-72")
def test_sectors_are_where_the_header_says(rig: Rig, ring: int) -> None:
    """The header's sector counts 512 bytes: neighbours are neighbours, and nothing else is touched."""
    disk = Disk(rig, ring)
    with disk.borrowed(SECTOR, 3):
        rows = [bytes([number + 1]) * blk.SECTOR for number in range(3)]
        for number in (1, 0, 2):
            disk.write(SECTOR + number, rows[number])
        assert disk.read(SECTOR, 3) == b"".join(rows)
        assert disk.read(SECTOR + 1) == rows[1]
        assert disk.read(SECTOR >> 8 | (SECTOR & 0xFF) << 8) != rows[0]


@pytest.mark.requirement("DEV-BLK-69", "DEV-BLK-73")
def test_the_status_is_the_last_writable_byte(rig: Rig, ring: int) -> None:
    """The status lies behind the data also where both share a descriptor, and the used length counts both."""
    disk = Disk(rig, ring)
    header = disk.work.read(SECTOR).readable
    expected = disk.read(SECTOR)
    for parts in ((513,), (512, 1), (1, 511, 1), (200, 313)):
        pieces = [rig.buffer(size, b"\xee" * size) for size in parts]
        length = disk.queue.run(header, pieces)
        data = b"".join(piece.array.tobytes() for piece in pieces)
        assert data[-1] == blk.S_OK, f"the last byte of {parts} is {data[-1]:#x}"
        assert data[:-1] == expected, f"the data in {parts} differs"
        assert length == 513, f"used length {length} of a read of 512 bytes"


@pytest.mark.requirement("DEV-BLK-70", "DEV-BLK-73")
def test_a_flush_succeeds(rig: Rig, ring: int) -> None:
    """FLUSH is type 4; nothing but the status is written."""
    disk = Disk(rig, ring, blk.F_FLUSH)
    request = disk.work.command(blk.T_FLUSH)
    judge(request, disk.queue.run(request.readable, request.writable))


@pytest.mark.requirement("DEV-BLK-76")
def test_the_id_is_padded(rig: Rig, ring: int) -> None:
    """GET_ID gives 20 bytes, padded with NUL behind the string."""
    disk = Disk(rig, ring)
    found = []
    for fill in (0xEE, 0xDD):
        request = disk.work.command(blk.T_GET_ID, into=blk.ID_BYTES, status_is=None)
        request.writable[0].array[:] = fill
        if disk.run(request) == blk.S_UNSUPP:
            pytest.skip("the disk has no GET_ID")
        found.append(request.writable[0].array.tobytes())
    assert found[0] == found[1], f"not all 20 bytes were written: {found}"
    name = found[0].split(b"\0")[0]
    assert found[0] == name.ljust(blk.ID_BYTES, b"\0"), f"the ID is {found[0]!r}"


@pytest.mark.requirement("DEV-BLK-75")
def test_as_many_segments_as_promised(rig: Rig, ring: int) -> None:
    """A request with seg_max data segments, header and status is accepted."""
    disk = Disk(rig, ring, blk.F_SEG_MAX)
    most = min(disk.config("seg_max"), disk.queue.size - 2, disk.capacity)
    if rig.transport.features >> blk.F_ZONED & 1:
        most = min(most, disk.config("zone_sectors") or most)
    parts = [rig.buffer(blk.SECTOR) for _ in range(most)]
    request = disk.work.read(0)
    status = rig.buffer(1, b"\xee")
    disk.queue.run(request.readable, [*parts, status])
    assert status.array[0] == blk.S_OK, f"status {status.array[0]} of a read with {most} segments"


@pytest.mark.requirement("DEV-BLK-62", "DEV-BLK-63")
def test_each_request_queue_works(rig: Rig, ring: int) -> None:
    """With MQ there are num_queues request queues, and each takes requests; without it there is one."""
    disk = Disk(rig, ring)
    if rig.transport.num_queues > 1:
        assert not rig.transport.queue_max_size(1), "queue 1 exists without MQ"
    if not rig.transport.offered >> blk.F_MQ & 1:
        return
    rig.transport.reset(rig.limit)
    rig.negotiate(rig.features_for(ring) | 1 << blk.F_MQ)
    count = disk.config("num_queues")
    queues: Sequence[Queue] = [rig.queue(index) for index in range(count)]
    rig.transport.driver_ok()
    for queue in queues:
        request = disk.work.read(SECTOR)
        judge(request, queue.run(request.readable, request.writable))


@pytest.mark.requirement("DEV-BLK-64")
def test_limits_of_ranges(rig: Rig, ring: int) -> None:
    """A discard and a write of zeroes of one sector in one segment are within the limits that are shown."""
    disk = Disk(rig, ring, blk.F_DISCARD, blk.F_WRITE_ZEROES)
    for name in (
        "max_discard_sectors",
        "max_discard_seg",
        "max_write_zeroes_sectors",
        "max_write_zeroes_seg",
    ):
        assert disk.config(name), f"{name} is 0"
    assert disk.config("write_zeroes_may_unmap") in (0, 1)
    unit = max(1, disk.config("discard_sector_alignment"))
    with disk.borrowed(SECTOR // unit * unit, unit):
        status = disk.status(blk.T_DISCARD, 0, segments((SECTOR // unit * unit, unit, 0)))
        assert status == blk.S_OK, f"status {status} of a discard of {unit} sectors"
