"""Zones of a zoned block device (5.2.6): report, open, close, finish, reset, append."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from ..errors import DeviceViolation, Refused, UsageError
from ..spec import blk as spec
from .blk import Blk, Data
from .blk_queue import Lease

TYPES: Final = {spec.ZT_CONV: "conventional", spec.ZT_SWR: "sequential-required", spec.ZT_SWP: "preferred"}
STATES: Final = {
    spec.ZS_NOT_WP: "no write pointer",
    spec.ZS_EMPTY: "empty",
    spec.ZS_IOPEN: "implicitly open",
    spec.ZS_EOPEN: "explicitly open",
    spec.ZS_CLOSED: "closed",
    spec.ZS_RDONLY: "read-only",
    spec.ZS_FULL: "full",
    spec.ZS_OFFLINE: "offline",
}
WITHOUT_POINTER: Final = (spec.ZS_NOT_WP, spec.ZS_RDONLY, spec.ZS_FULL, spec.ZS_OFFLINE)
"""States in which ``z_wp`` means nothing."""


@dataclass(frozen=True, slots=True)
class Zone:
    """One zone, in bytes.

    Attributes:
        start, capacity: first byte, and bytes that can be written.
        pointer: where the next write goes, None in a state without a write pointer.
        kind: ``ZT_*``; see ``TYPES``.
        state: ``ZS_*``; see ``STATES``.
    """

    start: int
    capacity: int
    pointer: int | None
    kind: int
    state: int


class Zones:
    """Zones of a driven disk. Offsets are bytes; a zone is named by its first one.

    A write to a sequential zone has to begin at its write pointer: keep one in flight for each zone, or
    use ``append``, which takes as many as you like and says where each went. ``Blk.write`` splits long
    writes and sends the pieces together, so on a host-managed disk give it no more than
    ``disk.limits.request_bytes``, or append.

    Raises:
        Refused: ZONED was not negotiated, or the device is not zoned.
        DeviceViolation: the zone size or the write granularity make no sense.
    """

    def __init__(self, disk: Blk, queue: int = 0) -> None:
        where = disk.transport.name
        if not disk.transport.has(spec.F_ZONED) or disk.model == spec.Z_NONE:
            raise Refused("it is no zoned device", where=where)
        self.disk = disk
        self._queue = queue
        self.zone_bytes = disk.config["zone_sectors"] * spec.SECTOR
        self.granularity = disk.config["write_granularity"]
        self.append_bytes = disk.config["max_append_sectors"] * spec.SECTOR
        for name, value in (("zone_sectors", self.zone_bytes), ("write_granularity", self.granularity)):
            if value < spec.SECTOR or value % spec.SECTOR:
                raise DeviceViolation(f"{name} is {disk.config[name]}", section="5.2.5.2", where=where)

    def __len__(self) -> int:
        return -(-self.disk.capacity // self.zone_bytes)

    def report(self, offset: int = 0, count: int | None = None) -> list[Zone]:
        """The zone that holds ``offset``, and those behind it, at most ``count``.

        Raises:
            DeviceViolation: the report is not in order, or claims more than it has.
        """
        zones: list[Zone] = []
        wanted = len(self) - offset // self.zone_bytes
        wanted = wanted if count is None else min(count, wanted)
        while len(zones) < wanted:
            start = zones[-1].start + self.zone_bytes if zones else offset
            got = self._report_once(start, wanted - len(zones))
            if not got:
                break
            zones += got
        return zones

    def _report_once(self, offset: int, wanted: int) -> list[Zone]:
        requests = self.disk.queues[self._queue]
        lease = Lease(requests.stages)
        try:
            room = min(wanted, lease.stage.nbytes // spec.ZONE_DESCRIPTOR.itemsize - 1)
            size = spec.ZONE_REPORT.itemsize + max(room, 1) * spec.ZONE_DESCRIPTOR.itemsize
            sector = offset // spec.SECTOR
            self.disk.request(
                spec.T_ZONE_REPORT, sector, (), [lease.stage[:size]], queue=self._queue, nbytes=size
            )
            head = lease.stage.array[: spec.ZONE_REPORT.itemsize].view(spec.ZONE_REPORT)[0]
            number = int(head["nr_zones"])
            if number > max(room, 1):
                raise DeviceViolation(
                    f"the report says {number} zones, there is room for {room}",
                    section="5.2.6",
                    where=self.disk.transport.name,
                )
            raw = lease.stage.array[spec.ZONE_REPORT.itemsize : size].view(spec.ZONE_DESCRIPTOR)[:number]
            return [self._zone(one, sector + n * self._zone_sectors) for n, one in enumerate(raw)]
        finally:
            lease.drop()

    @property
    def _zone_sectors(self) -> int:
        return self.zone_bytes // spec.SECTOR

    def _zone(self, raw: np.void, near: int) -> Zone:
        start, capacity, pointer = (int(raw[name]) for name in ("z_start", "z_cap", "z_wp"))
        kind, state = int(raw["z_type"]), int(raw["z_state"])
        expected = near // self._zone_sectors * self._zone_sectors
        wrong = start != expected or capacity > self._zone_sectors or kind not in TYPES or state not in STATES
        if not wrong and state not in WITHOUT_POINTER:
            wrong = not start <= pointer <= start + capacity
        if wrong:
            raise DeviceViolation(
                f"zone at sector {expected} is reported with start {start}, capacity {capacity}, write "
                f"pointer {pointer}, type {kind}, state {state}",
                section="5.2.6",
                where=self.disk.transport.name,
            )
        return Zone(
            start * spec.SECTOR,
            capacity * spec.SECTOR,
            None if state in WITHOUT_POINTER else pointer * spec.SECTOR,
            kind,
            state,
        )

    def open(self, zone: int) -> None:
        """Open explicitly: the zone keeps its resources until it is closed or full.

        Raises:
            ZoneError: its state or the device's limits do not allow it.
        """
        self._manage(spec.T_ZONE_OPEN, zone)

    def close(self, zone: int) -> None:
        """Close an open zone. Raises as ``open``."""
        self._manage(spec.T_ZONE_CLOSE, zone)

    def finish(self, zone: int) -> None:
        """Make the zone full: nothing more can be written. Raises as ``open``."""
        self._manage(spec.T_ZONE_FINISH, zone)

    def reset(self, zone: int) -> None:
        """Make the zone empty; its content is gone. Raises as ``open``."""
        self._manage(spec.T_ZONE_RESET, zone)

    def reset_all(self) -> None:
        """Make all zones empty that can be; their content is gone."""
        self.disk.request(spec.T_ZONE_RESET_ALL, 0, queue=self._queue)

    def append(self, zone: int, data: Data) -> int:
        """Write ``data`` where the zone's write pointer is; returns the byte where that was.

        Raises:
            Refused: the device takes no appends (``max_append_sectors`` is 0).
            UsageError: no zone begins there, or the size is not possible in one request.
            ZoneError: the zone is full, or the device's limits do not allow it.
        """
        where = self.disk.transport.name
        source = np.frombuffer(data, np.uint8)
        if not self.append_bytes:
            raise Refused("max_append_sectors is 0: the device takes no appends", where=where)
        self._check(zone)
        most = min(
            self.append_bytes, self.disk.limits.request_bytes, self.disk.queues[self._queue].stage_bytes
        )
        if source.nbytes % self.granularity or not 0 < source.nbytes <= most:
            raise UsageError(
                f"an append has up to {most} bytes, a multiple of {self.granularity}, not {source.nbytes}",
                where=where,
            )
        lease = Lease(self.disk.queues[self._queue].stages)
        try:
            part = lease.stage[: source.nbytes]
            part.array[:] = source
            (pieces,) = self.disk.limits.split(zone, [part])
            done = self.disk.request(
                spec.T_ZONE_APPEND, zone // spec.SECTOR, pieces[1], small=8, queue=self._queue
            )
        finally:
            lease.drop()
        place = int.from_bytes(done.small, "little") * spec.SECTOR
        if not zone <= place <= zone + self.zone_bytes - source.nbytes:
            raise DeviceViolation(
                f"append_sector is {place // spec.SECTOR}, not in the zone at sector {zone // spec.SECTOR}",
                section="5.2.6",
                where=where,
            )
        return place

    def _check(self, zone: int) -> None:
        if zone % self.zone_bytes or not 0 <= zone < self.disk.capacity:
            raise UsageError(
                f"no zone begins at byte {zone}; zones have {self.zone_bytes} bytes",
                where=self.disk.transport.name,
            )

    def _manage(self, kind: int, zone: int) -> None:
        self._check(zone)
        self.disk.request(kind, zone // spec.SECTOR, queue=self._queue)
