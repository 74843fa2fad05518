"""Zones over our own host-managed disk: every request, every state, every refusal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import guestpv
from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk_store import Store
from guestpv.devices.models.blk_zoned import ZonedBlk
from guestpv.devices.ring import Chain
from guestpv.drivers.blk import Blk
from guestpv.drivers.blk_errors import ZoneError
from guestpv.drivers.blk_zoned import Zone, Zones
from guestpv.errors import DeviceViolation, Refused, UsageError
from guestpv.serve.vfio_user import VfioUserServer, make_function
from guestpv.spec import blk as spec
from guestpv.transport.pci import PciTransport

ZONE = 64 << 10
Make = Callable[..., tuple[Zones, ZonedBlk]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[Blk, SoftwareFunction, bool]] = []

    def start(*, findings: bool = False, **options: Any) -> tuple[Zones, ZonedBlk]:
        model = ZonedBlk(Store("", 10 * ZONE - 8192), **options)
        function = SoftwareFunction(model, name="loopback:zoned")
        disk = Blk(PciTransport(function))
        made.append((disk, function, findings))
        return Zones(disk), model

    yield start
    for disk, function, findings in made:
        disk.close()
        if not findings:
            assert [str(finding) for finding in function.findings] == []


def states(zones: Zones) -> list[int]:
    return [zone.state for zone in zones.report()]


@pytest.mark.requirement("DRV-BLK-06", "DRV-BLK-29", "DRV-BLK-30", "DRV-BLK-45")
def test_report(make: Make) -> None:
    zones, _ = make()
    assert zones.disk.model == spec.Z_HM
    assert not zones.disk.transport.has(spec.F_DISCARD)
    report = zones.report()
    assert len(zones) == len(report) == 10
    assert report[0] == Zone(0, ZONE, None, spec.ZT_CONV, spec.ZS_NOT_WP)
    assert report[3] == Zone(3 * ZONE, ZONE, 3 * ZONE, spec.ZT_SWR, spec.ZS_EMPTY)
    assert report[9].capacity == ZONE - 8192
    assert zones.report(5 * ZONE + 512, 2) == report[5:7]
    # With room for a few descriptors only, it is asked in pieces.
    zones.disk.queues[0].stages[:] = [stage[:256] for stage in zones.disk.queues[0].stages]
    assert zones.report() == report


@pytest.mark.requirement("DRV-BLK-31", "DRV-BLK-32", "DRV-BLK-37", "DRV-BLK-39")
def test_a_zones_life(make: Make) -> None:
    zones, _ = make()
    disk, zone = zones.disk, 2 * ZONE
    disk.write(zone, b"a" * 4096)
    assert zones.report(zone, 1) == [Zone(zone, ZONE, zone + 4096, spec.ZT_SWR, spec.ZS_IOPEN)]
    with pytest.raises(ZoneError, match="ZONE_UNALIGNED_WP") as caught:
        disk.write(zone, b"b" * 512)
    assert (caught.value.sector, caught.value.nbytes) == (zone // 512, 512)
    zones.open(zone)
    assert zones.report(zone, 1)[0].state == spec.ZS_EOPEN
    zones.close(zone)
    assert zones.report(zone, 1)[0].state == spec.ZS_CLOSED
    disk.write(zone + 4096, b"c" * (ZONE - 4096))
    assert zones.report(zone, 1)[0] == Zone(zone, ZONE, None, spec.ZT_SWR, spec.ZS_FULL)
    with pytest.raises(ZoneError, match="ZONE_INVALID_CMD"):
        zones.open(zone)
    assert bytes(disk.read(zone, 8192)) == b"a" * 4096 + b"c" * 4096
    zones.reset(zone)
    assert not disk.read(zone, ZONE).any()
    zones.finish(zone)
    assert zones.report(zone, 1)[0].state == spec.ZS_FULL
    disk.write(0, b"anywhere in a conventional zone".ljust(512))
    with pytest.raises(ZoneError, match="ZONE_INVALID_CMD"):
        zones.reset(0)
    zones.reset_all()
    assert states(zones) == [spec.ZS_NOT_WP] + [spec.ZS_EMPTY] * 9


def test_transfers_end_with_their_zone(make: Make) -> None:
    zones, _ = make()
    rows = [bytes([n]) * ZONE for n in range(1, 5)]
    for number, row in enumerate(rows):
        zones.disk.write(number * ZONE, row)
    assert zones.disk.read(0, 4 * ZONE).tobytes() == b"".join(rows)
    assert zones.disk.read(ZONE - 512, 1024).tobytes() == rows[0][-512:] + rows[1][:512]
    buffer = zones.disk.allocate(2 * ZONE)
    zones.disk.read_into(ZONE + 4096, [buffer])
    assert buffer.array.tobytes() == b"".join(rows[1:])[4096 : 4096 + 2 * ZONE]


@pytest.mark.requirement("DRV-BLK-33", "DRV-BLK-34", "DRV-BLK-35", "DRV-BLK-36", "DRV-BLK-62")
def test_append(make: Make) -> None:
    zones, _ = make(granularity=4096, max_append=32)
    places = [zones.append(3 * ZONE, bytes([n]) * 4096) for n in range(1, 5)]
    assert places == [3 * ZONE + 4096 * n for n in range(4)]
    assert bytes(zones.disk.read(3 * ZONE + 8192, 4096)) == b"\3" * 4096
    for size in (0, 512, 20480):
        with pytest.raises(UsageError, match="up to 16384 bytes, a multiple of 4096"):
            zones.append(3 * ZONE, bytes(size))
    with pytest.raises(UsageError, match="no zone begins at byte 4096"):
        zones.append(4096, bytes(4096))
    zones, _ = make(max_append=0)
    with pytest.raises(Refused, match="max_append_sectors is 0"):
        zones.append(ZONE, bytes(512))


@pytest.mark.provokes("it appends to a full zone")
def test_a_full_zone_takes_no_more(make: Make) -> None:
    zones, _ = make(findings=True, granularity=4096, max_append=32)
    for number in range(16):
        assert zones.append(3 * ZONE, bytes(4096)) == 3 * ZONE + 4096 * number
    with pytest.raises(ZoneError, match="ZONE_INVALID_CMD"):
        zones.append(3 * ZONE, bytes(4096))


def test_limits_of_open_and_active_zones(make: Make) -> None:
    zones, _ = make(max_open=2, max_active=3)
    zones.open(1 * ZONE)
    zones.disk.write(2 * ZONE, bytes(512))
    zones.open(3 * ZONE)
    assert states(zones)[1:4] == [spec.ZS_EOPEN, spec.ZS_CLOSED, spec.ZS_EOPEN]
    with pytest.raises(ZoneError, match="ZONE_OPEN_RESOURCE"):
        zones.open(2 * ZONE)
    with pytest.raises(ZoneError, match="ZONE_ACTIVE_RESOURCE"):
        zones.append(4 * ZONE, bytes(512))
    zones.finish(1 * ZONE)
    zones.open(4 * ZONE)


def test_reports_that_lie(make: Make) -> None:
    zones, model = make()
    model.zones[4].pointer = 3
    with pytest.raises(DeviceViolation, match=r"zone at sector 512 is reported with start 512, .* pointer 3"):
        zones.report()

    def too_many(queue: Any, chain: Chain) -> None:
        room = chain.writable_bytes - 1
        chain.write((1 << 40).to_bytes(8, "little").ljust(room + 1, b"\0"), 0)
        queue.complete(chain, room + 1)

    model.handle = too_many  # type: ignore[method-assign]
    with pytest.raises(DeviceViolation, match="the report says 1099511627776 zones"):
        zones.report()


def test_an_ordinary_disk_has_no_zones() -> None:
    from guestpv.devices.loopback import open_function

    with Blk(PciTransport(open_function("blk", {}))) as disk, pytest.raises(Refused, match="no zoned device"):
        Zones(disk)


@pytest.mark.parametrize("field", ["zone_sectors", "write_granularity"])
def test_characteristics_that_make_no_sense(make: Make, field: str) -> None:
    zones, model = make()
    model.config[field] = 0
    zones.disk.restart()
    with pytest.raises(DeviceViolation, match=f"{field} is 0"):
        Zones(zones.disk)


def test_a_specification_names_a_zoned_disk() -> None:
    query = "size=1M&zoned=64K&conventional=1&max_open=2&max_active=3&max_append=8K&granularity=4K"
    with guestpv.open(f"loopback:blk?{query}") as transport, Blk(transport) as disk:
        zones = Zones(disk)
        assert (len(zones), zones.zone_bytes, zones.append_bytes, zones.granularity) == (16, ZONE, 8192, 4096)
        assert [zone.kind for zone in zones.report(count=2)] == [spec.ZT_CONV, spec.ZT_SWR]
        assert zones.append(ZONE, b"a" * 8192) == ZONE
        assert disk.read(ZONE, 8192).tobytes() == b"a" * 8192
        for number in (1, 2):
            zones.open(number * ZONE)
        with pytest.raises(ZoneError):
            zones.open(3 * ZONE)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("zoned=1000", "zoned=1000 is no multiple of 512"),
        ("zoned=64K&granularity=100", "granularity=100 is no multiple of 512"),
        ("zoned=64K&max_append=77", "max_append=77 is no multiple of 512"),
        ("cache=big", "cache is none or volatile, not 'big'"),
        ("cache=volatile&ro=on", "no use for cache=volatile"),
        ("max_open=2", "unknown parameter max_open"),
    ],
)
def test_what_a_specification_cannot_say(query: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        guestpv.open(f"loopback:blk?{query}")


def test_a_served_disk_has_zones(tmp_path: Path) -> None:
    function = make_function("blk?size=1M&zoned=64K")
    with (
        VfioUserServer(function, str(tmp_path / "s")) as server,
        guestpv.open(f"vfio-user:{server.path}") as transport,
        Blk(transport) as disk,
    ):
        zones = Zones(disk)
        assert zones.append(ZONE, b"s" * 4096) == ZONE
        assert zones.report(ZONE, 1)[0].pointer == ZONE + 4096
    assert [str(finding) for finding in function.findings] == []
