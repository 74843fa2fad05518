"""Zones of a block device (5.2.4 to 5.2.6). Only empty zones are written to, and they are emptied again."""

from __future__ import annotations

import pytest

from guestpv.conformance.case import Case
from guestpv.conformance.disk import Disk, ZonedDisk, name_of
from guestpv.conformance.rig import Rig
from guestpv.errors import FeaturesRefused
from guestpv.spec import blk

pytestmark = [pytest.mark.device("blk"), pytest.mark.formats]

MANAGEMENT = (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE, blk.T_ZONE_FINISH, blk.T_ZONE_RESET)
SEQUENTIAL = (blk.ZT_SWR, blk.ZT_SWP)
LIVE = (blk.ZS_IOPEN, blk.ZS_EOPEN, blk.ZS_CLOSED)
KNOWN_STATES = (*range(blk.ZS_NOT_WP, blk.ZS_CLOSED + 1), blk.ZS_RDONLY, blk.ZS_FULL, blk.ZS_OFFLINE)
LACKING = (blk.S_ZONE_OPEN_RESOURCE, blk.S_ZONE_ACTIVE_RESOURCE)
MOST_BYTES = 2 << 20
"""Longest request that is tried."""
MOST_ZONES = 64
"""Limits of open and active zones beyond which they are not tried."""


@pytest.fixture
def ring(negotiated: Rig, rig: Rig) -> int:
    """Ring features of the combination; the device is reset again."""
    features = negotiated.transport.features
    rig.transport.reset(rig.limit)
    return features


@pytest.fixture
def disk(rig: Rig, ring: int) -> ZonedDisk:
    """A running disk with zones."""
    return ZonedDisk(rig, ring)


def expect(status: int, wanted: int | tuple[int, ...], what: str) -> None:
    """Complain of a status that is not among the wanted ones."""
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    names = " or ".join(blk.STATUS_NAMES[one] for one in wanted)
    assert status in wanted, f"{name_of(status)} of {what}, expected {names}"


def ok(status: int, what: str) -> None:
    """Complain of a request that failed."""
    expect(status, blk.S_OK, what)


def model_of(rig: Rig) -> int:
    """The zone model, as the configuration shows it before FEATURES_OK."""
    if not rig.transport.offered >> blk.F_ZONED & 1:
        pytest.skip("ZONED is not offered")
    return rig.transport.read_config(blk.CONFIG["model"].offset, 1)


# Initialization (5.2.5.2).


@pytest.mark.requirement("DEV-BLK-08")
def test_a_host_managed_disk_needs_a_driver_for_zones(rig: Rig, ring: int, case: Case) -> None:
    """A host-managed disk leaves FEATURES_OK clear where ZONED is not accepted."""
    if model_of(rig) != blk.Z_HM:
        pytest.skip("the disk is not host-managed")
    case.sent("FEATURES_OK without ZONED")
    try:
        rig.negotiate(rig.features_for(ring) & ~(1 << blk.F_ZONED))
    except FeaturesRefused:
        return
    raise AssertionError("FEATURES_OK stays although ZONED was not accepted")


@pytest.mark.requirement("DEV-BLK-07")
def test_without_zoned_the_characteristics_are_0(rig: Rig, ring: int) -> None:
    """A host-aware disk whose driver does not accept ZONED shows zeroes instead of characteristics."""
    if model_of(rig) == blk.Z_HM:
        pytest.skip("the disk is host-managed")
    rig.negotiate(rig.features_for(ring) & ~(1 << blk.F_ZONED))
    for field in blk.CONFIG:
        if field.feature == blk.F_ZONED:
            value = rig.transport.read_config(field.offset, field.width)
            assert value == 0, f"{field.name} is {value} without ZONED"


@pytest.mark.requirement("DEV-BLK-09", "DEV-BLK-10", "DEV-BLK-11", "DEV-BLK-66")
def test_the_model_is_what_the_zones_are(rig: Rig, ring: int) -> None:
    """model is 1 with sequential-write-required zones, 2 with preferred ones, else 0."""
    model = model_of(rig)
    assert model in (blk.Z_NONE, blk.Z_HM, blk.Z_HA), f"model is {model}"
    if model == blk.Z_NONE:
        disk = Disk(rig, ring)
        request = disk.work.command(blk.T_ZONE_REPORT, into=1 << 12, status_is=None)
        if disk.run(request) != blk.S_OK:
            return
        zones = request.writable[0].array.view(blk.ZONE_DESCRIPTOR)[1:]
    else:
        zones = ZonedDisk(rig, ring).report()
    kinds = {int(zone["z_type"]) for zone in zones}
    expected = blk.Z_HM if blk.ZT_SWR in kinds else blk.Z_HA if blk.ZT_SWP in kinds else blk.Z_NONE
    assert model == expected, f"model is {model}, and zones of types {sorted(kinds)} are reported"


@pytest.mark.requirement("DEV-BLK-12", "DEV-BLK-66", "DEV-BLK-79")
def test_zones_are_as_long_as_zone_sectors_says(disk: ZonedDisk) -> None:
    """Zone n begins at n * zone_sectors; types, states, capacities and write pointers fit together."""
    size, count = disk.zone_sectors, -(-disk.capacity // disk.zone_sectors)
    zones = disk.report()
    assert len(zones) == min(count, disk.MOST), f"{len(zones)} zones are reported, the disk has {count}"
    for number, zone in enumerate(zones):
        start, capacity, pointer = (int(zone[name]) for name in ("z_start", "z_cap", "z_wp"))
        kind, state = int(zone["z_type"]), int(zone["z_state"])
        where = f"zone {number}"
        assert start == number * size, f"{where} begins at {start}, zone_sectors is {size}"
        assert 0 < capacity <= min(size, disk.capacity - start), f"the capacity of {where} is {capacity}"
        assert kind in (blk.ZT_CONV, *SEQUENTIAL), f"the type of {where} is {kind}"
        assert state in KNOWN_STATES, f"the state of {where} is {state}"
        assert (kind == blk.ZT_CONV) == (state == blk.ZS_NOT_WP), f"{where} has type {kind} and state {state}"
        if state == blk.ZS_EMPTY:
            assert pointer == start, f"{where} is empty, and its write pointer {pointer - start} sectors in"
        elif state in LIVE:
            assert start <= pointer <= start + capacity, f"the write pointer of {where} is {pointer}"


@pytest.mark.requirement("DEV-BLK-79")
def test_a_report_begins_anywhere_and_fits(disk: ZonedDisk) -> None:
    """A report begins with the zone that holds its sector, and nr_zones counts whole descriptors only."""
    last = len(disk.report()) - 1
    for number in {0, 1, last} & set(range(last + 1)):
        for within in (0, 1, min(disk.zone_sectors, disk.capacity - number * disk.zone_sectors) - 1):
            sector = number * disk.zone_sectors + within
            zones = disk.report(sector, 128)
            assert len(zones) == 1, f"{len(zones)} zones in a report with room for one, at sector {sector}"
            start = int(zones[0]["z_start"])
            assert start == number * disk.zone_sectors, (
                f"a report at {sector} begins with the zone at {start}"
            )
    if last:
        assert len(disk.report(0, 64 + 127)) == 1, "nr_zones counts a descriptor that has no room"


@pytest.mark.requirement("DEV-BLK-17")
def test_an_append_fits_into_a_request(disk: ZonedDisk) -> None:
    """max_append_sectors is at most seg_max * size_max."""
    offered = disk.rig.transport.offered
    if not (offered >> blk.F_SEG_MAX & 1 and offered >> blk.F_SIZE_MAX & 1):
        pytest.skip("SEG_MAX and SIZE_MAX are not both offered")
    most, append = disk.config("seg_max") * disk.config("size_max"), disk.config("max_append_sectors")
    assert append * blk.SECTOR <= most, f"max_append_sectors is {append}, a request has {most} bytes"


@pytest.mark.requirement("DEV-BLK-20")
def test_padding_of_the_characteristics(disk: ZonedDisk) -> None:
    """unused2 at 93 is 0."""
    for offset in range(93, min(96, disk.rig.transport.config_length)):
        value = disk.rig.transport.read_config(offset, 1)
        assert value == 0, f"the padding at {offset} is {value:#x}"


# States.


@pytest.mark.requirement("DEV-BLK-79", "DEV-BLK-70")
def test_the_life_of_a_zone(disk: ZonedDisk) -> None:
    """Writes and requests move a zone through its states, and the report follows."""
    with disk.empty_zones(preferred=True) as (zone,):

        def then(kind: int, state: int) -> None:
            name = blk.TYPE_NAMES[kind]
            status = disk.status(kind, zone, disk.data()) if kind == blk.T_OUT else disk.manage(kind, zone)
            ok(status, name)
            found = disk.state(zone)
            assert found == state, f"state {found} after {name}, expected {state}"

        then(blk.T_ZONE_RESET, blk.ZS_EMPTY)
        then(blk.T_ZONE_OPEN, blk.ZS_EOPEN)
        then(blk.T_ZONE_CLOSE, blk.ZS_EMPTY)
        then(blk.T_OUT, blk.ZS_IOPEN)
        assert disk.pointer(zone) == zone + disk.grain, "the write pointer did not follow a write"
        then(blk.T_ZONE_OPEN, blk.ZS_EOPEN)
        then(blk.T_ZONE_OPEN, blk.ZS_EOPEN)
        then(blk.T_ZONE_CLOSE, blk.ZS_CLOSED)
        then(blk.T_ZONE_CLOSE, blk.ZS_CLOSED)
        then(blk.T_ZONE_OPEN, blk.ZS_EOPEN)
        then(blk.T_ZONE_FINISH, blk.ZS_FULL)
        then(blk.T_ZONE_FINISH, blk.ZS_FULL)
        then(blk.T_ZONE_RESET, blk.ZS_EMPTY)


@pytest.mark.requirement("DEV-BLK-41", "DEV-BLK-43")
def test_transitions_that_do_not_exist(disk: ZonedDisk, case: Case) -> None:
    """A full zone cannot be opened, a full or an empty one not be closed: ZONE_INVALID_CMD, and no change."""
    with disk.empty_zones(preferred=True) as (zone,):
        case.sent("ZONE_CLOSE to an empty zone; ZONE_OPEN and ZONE_CLOSE to a full one")
        expect(disk.manage(blk.T_ZONE_CLOSE, zone), blk.S_ZONE_INVALID_CMD, "ZONE_CLOSE of an empty zone")
        assert disk.state(zone) == blk.ZS_EMPTY
        disk.manage(blk.T_ZONE_OPEN, zone)
        ok(disk.manage(blk.T_ZONE_FINISH, zone), "ZONE_FINISH of an open zone")
        for kind in (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE):
            name = blk.TYPE_NAMES[kind]
            expect(disk.manage(kind, zone), blk.S_ZONE_INVALID_CMD, f"{name} of a full zone")
            assert disk.state(zone) == blk.ZS_FULL, f"{name} failed and changed the state of a full zone"


@pytest.mark.requirement("DEV-BLK-39", "DEV-BLK-40")
def test_conventional_zones_have_no_states(disk: ZonedDisk) -> None:
    """Management of a conventional zone, and an append to anything not SWR, end with ZONE_INVALID_CMD."""
    conventional = disk.find(kind=blk.ZT_CONV)[:1]
    others = conventional + disk.find(kind=blk.ZT_SWP)[:1]
    if not others:
        pytest.skip("all zones are sequential-write-required")
    for zone in conventional:
        for kind in MANAGEMENT:
            what = f"{blk.TYPE_NAMES[kind]} of a conventional zone"
            expect(disk.manage(kind, zone), blk.S_ZONE_INVALID_CMD, what)
    if disk.config("max_append_sectors"):
        for zone in others:
            status, _ = disk.append(zone, disk.data())
            expect(status, blk.S_ZONE_INVALID_CMD, "an append to a zone that is not SWR")


def in_state(disk: ZonedDisk, state: int, name: str) -> int:
    """First sector of a sequential zone in this state, which nothing here can bring about."""
    zones = [zone for kind in SEQUENTIAL for zone in disk.find(kind=kind, state=state)]
    if not zones:
        pytest.skip(f"no zone is {name}")
    return zones[0]


@pytest.mark.requirement("DEV-BLK-55", "DEV-BLK-41", "DEV-BLK-43", "DEV-BLK-44", "DEV-BLK-45")
def test_read_only_zones(disk: ZonedDisk) -> None:
    """Writes, appends and management of a read-only zone end with ZONE_INVALID_CMD, and change nothing."""
    zone = in_state(disk, blk.ZS_RDONLY, "read-only")
    for kind in MANAGEMENT:
        name = blk.TYPE_NAMES[kind]
        expect(disk.manage(kind, zone), blk.S_ZONE_INVALID_CMD, f"{name} of a read-only zone")
        assert disk.state(zone) == blk.ZS_RDONLY, f"{name} changed the state of a read-only zone"
    expect(disk.status(blk.T_OUT, zone, disk.data()), blk.S_ZONE_INVALID_CMD, "a write to a read-only zone")
    if disk.config("max_append_sectors"):
        status, _ = disk.append(zone, disk.data())
        expect(status, blk.S_ZONE_INVALID_CMD, "an append to a read-only zone")


@pytest.mark.requirement("DEV-BLK-56")
def test_offline_zones(disk: ZonedDisk) -> None:
    """Every request to an offline zone ends with ZONE_INVALID_CMD."""
    zone = in_state(disk, blk.ZS_OFFLINE, "offline")
    for kind in MANAGEMENT:
        what = f"{blk.TYPE_NAMES[kind]} of an offline zone"
        expect(disk.manage(kind, zone), blk.S_ZONE_INVALID_CMD, what)
    expect(disk.status(blk.T_IN, zone, into=512), blk.S_ZONE_INVALID_CMD, "a read of an offline zone")
    expect(disk.status(blk.T_OUT, zone, disk.data()), blk.S_ZONE_INVALID_CMD, "a write to an offline zone")
    if disk.config("max_append_sectors"):
        status, _ = disk.append(zone, disk.data())
        expect(status, blk.S_ZONE_INVALID_CMD, "an append to an offline zone")


# Resources.


def free(disk: ZonedDisk) -> tuple[int, int, int]:
    """(max_open_zones, max_active_zones, how many can be open at once); skips where zones are in use."""
    opened, active = disk.config("max_open_zones"), disk.config("max_active_zones")
    limits = [limit for limit in (opened, active) if limit]
    if any(zone["z_state"] in LIVE for zone in disk.report()):
        pytest.skip("zones of the disk are open or closed")
    if limits and min(limits) > MOST_ZONES:
        pytest.skip(f"so many zones may be open ({limits}) that it is not tried")
    return opened, active, min(limits, default=0)


@pytest.mark.requirement("DEV-BLK-14", "DEV-BLK-42", "DEV-BLK-46")
def test_as_many_open_zones_as_promised(disk: ZonedDisk) -> None:
    """max_open_zones zones can be open; the next one stays as it is, and the status names the resource."""
    _, active, limit = free(disk)
    with disk.empty_zones(limit + 1 if limit else 4) as zones:
        for number, zone in enumerate(zones[: limit or None], 1):
            ok(disk.manage(blk.T_ZONE_OPEN, zone), f"ZONE_OPEN number {number}; {limit} may be open")
        if not limit:
            return
        wanted = blk.S_ZONE_ACTIVE_RESOURCE if limit == active else blk.S_ZONE_OPEN_RESOURCE
        expect(disk.manage(blk.T_ZONE_OPEN, zones[-1]), wanted, f"ZONE_OPEN while {limit} are open")
        assert disk.state(zones[-1]) == blk.ZS_EMPTY, "a zone that could not be opened has changed its state"
        status = disk.status(blk.T_OUT, zones[-1], disk.data())
        expect(status, LACKING, f"a write that would open a zone while {limit} are open")
        if disk.config("max_append_sectors"):
            status, _ = disk.append(zones[-1], disk.data())
            expect(status, LACKING, f"an append that would open a zone while {limit} are open")
        assert disk.pointer(zones[-1]) == zones[-1], "the write pointer of the zone has moved"


@pytest.mark.requirement("DEV-BLK-15", "DEV-BLK-42")
def test_as_many_active_zones_as_promised(disk: ZonedDisk) -> None:
    """max_active_zones zones can be open or closed; one more is refused with ZONE_ACTIVE_RESOURCE."""
    _, active, _ = free(disk)
    if active > MOST_ZONES:
        pytest.skip(f"max_active_zones is {active}")
    with disk.empty_zones(active + 1 if active else 4) as zones:
        for number, zone in enumerate(zones[: active or None], 1):
            ok(disk.status(blk.T_OUT, zone, disk.data()), f"a write to zone number {number} of {active}")
            ok(disk.manage(blk.T_ZONE_CLOSE, zone), f"ZONE_CLOSE of zone number {number} of {active}")
        if active:
            status = disk.manage(blk.T_ZONE_OPEN, zones[-1])
            expect(status, blk.S_ZONE_ACTIVE_RESOURCE, f"ZONE_OPEN while {active} zones are active")
            assert disk.state(zones[-1]) == blk.ZS_EMPTY, "the zone has changed its state"


# Writes, appends and reads.


@pytest.mark.requirement("DEV-BLK-49", "DEV-BLK-16", "DEV-BLK-19")
def test_appends_say_where_they_went(disk: ZonedDisk, case: Case) -> None:
    """Appends of one grain and of max_append_sectors succeed; append_sector is where the data is."""
    most = disk.config("max_append_sectors") // disk.grain
    if not most:
        pytest.skip("max_append_sectors is 0")
    capacity = int(disk.report(0, 128)[0]["z_cap"])
    if most * disk.grain * blk.SECTOR > MOST_BYTES or most + 1 > capacity // disk.grain:
        most = min(MOST_BYTES // blk.SECTOR, capacity) // disk.grain - 1
        case.note(f"# appends of {most * disk.grain} sectors at most are tried")
    with disk.empty_zones() as (zone,):
        place = zone
        for number, grains in enumerate((1, most)):
            data = disk.data(grains, 0x31 + number)
            status, sector = disk.append(zone, data)
            ok(status, f"an append of {grains * disk.grain} sectors")
            assert sector == place, f"append_sector is {sector}, the write pointer was {place}"
            assert disk.read(place, disk.grain) == data[: disk.grain * blk.SECTOR], "the data is not there"
            place += grains * disk.grain
            if place < zone + capacity:
                assert disk.pointer(zone) == place, "the write pointer did not follow an append"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-51", "DEV-BLK-50", "DEV-BLK-16")
def test_an_append_that_is_too_long(disk: ZonedDisk, case: Case) -> None:
    """An append beyond max_append_sectors ends with ZONE_INVALID_CMD, or with UNSUPP where that is 0."""
    most = disk.config("max_append_sectors")
    if (most + disk.grain) * blk.SECTOR > MOST_BYTES:
        pytest.skip(f"max_append_sectors is {most}")
    with disk.empty_zones() as (zone,):
        grains = most // disk.grain + 1
        case.sent(f"an append of {grains * disk.grain} sectors, max_append_sectors is {most}")
        status, _ = disk.append(zone, disk.data(grains))
        expect(status, blk.S_ZONE_INVALID_CMD if most else blk.S_UNSUPP, "the append")
        assert disk.pointer(zone) == zone, "the write pointer has moved"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-47")
def test_an_append_names_a_zone_by_its_first_sector(disk: ZonedDisk, case: Case) -> None:
    """An append whose sector is not the first of a zone ends with ZONE_INVALID_CMD."""
    if not disk.config("max_append_sectors"):
        pytest.skip("max_append_sectors is 0")
    with disk.empty_zones() as (zone,):
        case.sent(f"an append with sector {zone + disk.grain} in the zone at {zone}")
        status, _ = disk.append(zone + disk.grain, disk.data())
        expect(status, blk.S_ZONE_INVALID_CMD, "an append with a sector inside of a zone")
        assert disk.pointer(zone) == zone, "the write pointer has moved"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-48")
def test_writes_to_a_full_zone(disk: ZonedDisk, case: Case) -> None:
    """A write or an append beyond what is left of a zone ends with ZONE_INVALID_CMD."""
    with disk.empty_zones() as (zone,):
        disk.manage(blk.T_ZONE_OPEN, zone)
        ok(disk.manage(blk.T_ZONE_FINISH, zone), "ZONE_FINISH")
        case.sent("a write and an append to a full zone")
        expect(disk.status(blk.T_OUT, zone, disk.data()), blk.S_ZONE_INVALID_CMD, "a write to a full zone")
        if disk.config("max_append_sectors"):
            status, _ = disk.append(zone, disk.data())
            expect(status, blk.S_ZONE_INVALID_CMD, "an append to a full zone")


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-52", "DEV-BLK-48")
def test_a_write_across_the_end_of_a_zone(disk: ZonedDisk, case: Case) -> None:
    """A write at the write pointer that reaches into the next zone ends with ZONE_INVALID_CMD."""
    if (disk.zone_sectors + disk.grain) * blk.SECTOR > MOST_BYTES:
        case.not_observable(f"a zone of {disk.zone_sectors} sectors is too long to write across its end")
    with disk.empty_zones(2) as zones:
        if zones[1] != zones[0] + disk.zone_sectors:
            pytest.skip("no two empty zones are neighbours")
        case.sent("a write of a zone and a bit")
        status = disk.status(blk.T_OUT, zones[0], bytes((disk.zone_sectors + disk.grain) * blk.SECTOR))
        expect(status, blk.S_ZONE_INVALID_CMD, "a write across the end of its zone")
        assert disk.pointer(zones[0]) == zones[0], "the write pointer has moved"


@pytest.mark.requirement("DEV-BLK-52")
def test_a_read_across_the_end_of_a_zone(disk: ZonedDisk, case: Case) -> None:
    """A read of an SWR zone that reaches into the next zone ends with ZONE_INVALID_CMD."""
    zones = [
        zone for zone in disk.report() if zone["z_type"] == blk.ZT_SWR and zone["z_state"] != blk.ZS_OFFLINE
    ]
    end = next((int(one["z_start"]) + disk.zone_sectors for one in zones), disk.capacity)
    if end >= disk.capacity:
        pytest.skip("there is no sequential zone with another behind it")
    case.sent(f"a read of two sectors at {end - 1}, the last one of an SWR zone")
    status = disk.status(blk.T_IN, end - 1, into=2 * blk.SECTOR)
    expect(status, blk.S_ZONE_INVALID_CMD, "a read across the end of an SWR zone")


@pytest.mark.requirement("DEV-BLK-53")
def test_a_write_beside_the_write_pointer(disk: ZonedDisk, case: Case) -> None:
    """A write that does not begin at the write pointer ends with ZONE_UNALIGNED_WP."""
    with disk.empty_zones() as (zone,):
        case.sent("writes behind and before the write pointer")
        status = disk.status(blk.T_OUT, zone + disk.grain, disk.data())
        expect(status, blk.S_ZONE_UNALIGNED_WP, "a write beyond the write pointer")
        ok(disk.status(blk.T_OUT, zone, disk.data()), "a write at the write pointer")
        status = disk.status(blk.T_OUT, zone, disk.data())
        expect(status, blk.S_ZONE_UNALIGNED_WP, "a write before the write pointer")
        assert disk.pointer(zone) == zone + disk.grain, "the write pointer is not behind what was written"


@pytest.mark.hostile
@pytest.mark.requirement("DEV-BLK-19")
def test_a_write_of_half_a_grain(disk: ZonedDisk, case: Case) -> None:
    """A write of less than write_granularity ends with ZONE_UNALIGNED_WP."""
    if disk.grain == 1:
        pytest.skip("write_granularity is one sector")
    with disk.empty_zones() as (zone,):
        case.sent(f"a write of 512 bytes, write_granularity is {disk.grain * blk.SECTOR}")
        status = disk.status(blk.T_OUT, zone, bytes(blk.SECTOR))
        expect(status, blk.S_ZONE_UNALIGNED_WP, "a write that is no multiple of write_granularity")


@pytest.mark.requirement("DEV-BLK-57", "DEV-BLK-58")
def test_what_was_not_written_has_a_pattern(disk: ZonedDisk) -> None:
    """Behind the write pointer reads give the same pattern every time, whatever was there; or they fail."""

    def look(sector: int) -> bytes | None:
        request = disk.work.command(blk.T_IN, sector, into=disk.grain * blk.SECTOR, status_is=None)
        return request.writable[0].array.tobytes() if disk.run(request) == blk.S_OK else None

    with disk.empty_zones() as (zone,):
        behind = zone + disk.grain
        pattern = [look(zone), look(behind)]
        assert pattern == [look(zone), look(behind)], "unwritten sectors read differently the second time"
        data = disk.data(2, 0x77)
        half = len(data) // 2
        ok(disk.status(blk.T_OUT, zone, data), "a write")
        assert [look(zone), look(behind)] == [data[:half], data[half:]], "what was written is not there"
        ok(disk.manage(blk.T_ZONE_RESET, zone), "ZONE_RESET")
        assert [look(zone), look(behind)] == pattern, "a zone that was reset shows what was in it"
        ok(disk.status(blk.T_OUT, zone, data[:half]), "a write")
        assert look(behind) == pattern[1], "the sector at the write pointer shows what was in it"
        disk.manage(blk.T_ZONE_OPEN, zone)
        ok(disk.manage(blk.T_ZONE_FINISH, zone), "ZONE_FINISH")
        assert look(behind) == pattern[1], "a sector that ZONE_FINISH passed over shows what was in it"


@pytest.mark.requirement("DEV-BLK-70")
def test_reset_all(disk: ZonedDisk) -> None:
    """ZONE_RESET_ALL empties open, closed and full zones."""
    with disk.empty_zones(3) as zones:
        quiet = (blk.ZS_NOT_WP, blk.ZS_EMPTY, blk.ZS_RDONLY, blk.ZS_OFFLINE)
        if len(disk.report()) == disk.MOST or any(one["z_state"] not in quiet for one in disk.report()):
            pytest.skip("zones of the disk hold data, or there are too many to know")
        disk.status(blk.T_OUT, zones[0], disk.data())
        disk.status(blk.T_OUT, zones[1], disk.data())
        disk.manage(blk.T_ZONE_CLOSE, zones[1])
        disk.manage(blk.T_ZONE_OPEN, zones[2])
        disk.manage(blk.T_ZONE_FINISH, zones[2])
        ok(disk.manage(blk.T_ZONE_RESET_ALL, 0), "ZONE_RESET_ALL")
        states = [disk.state(zone) for zone in zones]
        assert states == [blk.ZS_EMPTY] * 3, f"states {states} after ZONE_RESET_ALL"
