"""A disk in the hands of a check: requests and their status, and zones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from ..spec import blk
from ..spec import features as ft
from .queue import Queue
from .requests import BlkWork, Request
from .rig import Rig
from .shapes import judge


class Disk:
    """A running disk.

    Args:
        rig: the device, reset.
        ring: ring features.
        wanted: features of the device type; the case is skipped where one is not offered.
    """

    def __init__(self, rig: Rig, ring: int, *wanted: int) -> None:
        for bit in wanted:
            if not rig.transport.offered >> bit & 1:
                pytest.skip(f"{ft.feature_name(ft.BLK, bit)} is not offered")
        assert isinstance(rig.work, BlkWork)
        self.rig, self.work = rig, rig.work
        rig.negotiate(rig.features_for(ring) | ft.mask(wanted))
        self.queue: Queue = rig.queue(0)
        rig.transport.driver_ok()
        self.capacity = self.config("capacity")

    def config(self, name: str) -> int:
        """A field of the configuration."""
        field = blk.CONFIG[name]
        if field.width < 8:
            return self.rig.transport.read_config(field.offset, field.width)
        low, high = (self.rig.transport.read_config(field.offset + at, 4) for at in (0, 4))
        return low | high << 32

    def run(self, request: Request) -> int:
        """Carry out a request. Returns the status byte."""
        self.queue.run(request.readable, request.writable)
        return int(request.writable[-1].array[-1])

    def status(self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0) -> int:
        """The status of a request."""
        return self.run(self.work.command(kind, sector, out, into, status_is=None))

    def read(self, sector: int, sectors: int = 1) -> bytes:
        """Sectors of the disk."""
        request = self.work.read(sector, sectors)
        judge(request, self.queue.run(request.readable, request.writable))
        return request.writable[0].array.tobytes()

    def write(self, sector: int, data: bytes) -> None:
        """Write sectors."""
        request = self.work.write(data, sector)
        judge(request, self.queue.run(request.readable, request.writable))

    @contextmanager
    def borrowed(self, sector: int, sectors: int) -> Iterator[None]:
        """Sectors that may be written in here, and are as before afterwards."""
        if self.rig.transport.offered >> blk.F_RO & 1:
            pytest.skip("the disk is read-only")
        if self.rig.transport.features >> blk.F_ZONED & 1 and self.config("model") == blk.Z_HM:
            pytest.skip("the disk is host-managed: there is a check of its zones")
        before = self.read(sector, sectors)
        mark = bytes([0xC3, 0x3C]) * (blk.SECTOR // 2) * sectors
        self.write(sector, mark)
        kept = self.read(sector, sectors) == mark
        try:
            if not kept:
                self.rig.case.not_observable("the disk does not keep what is written, such as null-co")
            yield
        finally:
            self.write(sector, before)


class ZonedDisk(Disk):
    """A running disk with zones; the case is skipped where there are none.

    Nothing but empty zones is written to, and they are empty again afterwards.

    Attributes:
        zone_sectors, grain: sectors of a zone, and those that writes are multiples of.
    """

    MOST = 256
    """Zones that are looked at."""

    def __init__(self, rig: Rig, ring: int) -> None:
        if not rig.transport.offered >> blk.F_ZONED & 1:
            pytest.skip("ZONED is not offered")
        super().__init__(rig, ring, blk.F_ZONED)
        if self.config("model") not in (blk.Z_HM, blk.Z_HA):
            pytest.skip("the disk is no zoned one")
        self.zone_sectors = self.config("zone_sectors")
        self.grain = max(1, self.config("write_granularity") // blk.SECTOR)

    def report(self, sector: int = 0, room: int = 0) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """Zones from the one that holds ``sector`` on.

        Args:
            sector: anywhere in the first zone.
            room: bytes for the report; by default for all zones, at most ``MOST``.
        """
        head, row = blk.ZONE_REPORT.itemsize, blk.ZONE_DESCRIPTOR.itemsize
        room = room or head + row * min(self.MOST, -(-self.capacity // self.zone_sectors))
        request = self.work.command(blk.T_ZONE_REPORT, sector, into=room, status_is=None)
        status = self.run(request)
        assert status == blk.S_OK, f"{name_of(status)} of a zone report at sector {sector}"
        data = request.writable[0].array
        count = int(data[:head].view(blk.ZONE_REPORT)[0]["nr_zones"])
        assert count <= (room - head) // row, f"nr_zones is {count} in a report of {room} bytes"
        found: np.ndarray[tuple[int], np.dtype[np.void]] = data[head : head + count * row].view(
            blk.ZONE_DESCRIPTOR
        )
        return found

    def state(self, zone: int) -> int:
        """The state of the zone that begins at a sector."""
        return int(self.report(zone, 128)[0]["z_state"])

    def pointer(self, zone: int) -> int:
        """The write pointer of the zone that begins at a sector."""
        return int(self.report(zone, 128)[0]["z_wp"])

    def find(self, *, kind: int | None = None, state: int | None = None) -> list[int]:
        """First sectors of the zones of a type, in a state."""
        return [
            int(zone["z_start"])
            for zone in self.report()
            if (kind is None or zone["z_type"] == kind) and (state is None or zone["z_state"] == state)
        ]

    def manage(self, kind: int, zone: int) -> int:
        """The status of a zone management request."""
        return self.status(kind, zone)

    def append(self, zone: int, data: bytes) -> tuple[int, int]:
        """Append data. Returns the status and ``append_sector``."""
        request = self.work.command(blk.T_ZONE_APPEND, zone, data, into=8, status_is=None)
        return self.run(request), int(request.writable[0].array.view("<u8")[0])

    def data(self, grains: int = 1, fill: int = 0xC3) -> bytes:
        """Data of so many grains."""
        return bytes([fill]) * (grains * self.grain * blk.SECTOR)

    @contextmanager
    def empty_zones(self, count: int = 1, *, preferred: bool = False) -> Iterator[list[int]]:
        """First sectors of this many empty sequential zones, which are empty again afterwards.

        Args:
            count: how many.
            preferred: whether sequential-write-preferred ones will do as well.
        """
        kinds = (blk.ZT_SWR, blk.ZT_SWP) if preferred else (blk.ZT_SWR,)
        zones = [zone for kind in kinds for zone in self.find(kind=kind, state=blk.ZS_EMPTY)]
        if len(zones) < count:
            pytest.skip(f"{len(zones)} empty sequential zones, {count} are needed")
        zones = zones[:count]
        try:
            yield zones
        finally:
            for zone in zones:
                self.manage(blk.T_ZONE_RESET, zone)


def name_of(status: int) -> str:
    """A status byte in words."""
    return f"status {blk.STATUS_NAMES.get(status, hex(status))}"


def segments(*rows: tuple[int, int, int]) -> bytes:
    """Segments (sector, number of sectors, flags) of a discard or write zeroes request."""
    return np.array(list(rows), dtype=blk.DISCARD_SEGMENT).tobytes()
