"""A zoned disk (5.2.6), host-managed or host-aware: the state machine of its zones over an ordinary one."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, Final

from ...spec import blk
from ...spec import features as ft
from ..ring import Chain, cut
from .blk import HEADER, Blk, Failure
from .blk_store import Store

OPEN: Final = (blk.ZS_IOPEN, blk.ZS_EOPEN)
DEAD: Final = (blk.ZS_RDONLY, blk.ZS_OFFLINE)
ZONED_FIELDS: Final = tuple(field.name for field in blk.CONFIG if field.feature == blk.F_ZONED)
DESCRIPTOR: Final = struct.Struct("<QQQBB38x")


@dataclass(slots=True)
class ZoneState:
    """One zone, in sectors; what lies between ``written`` and its end was never written."""

    start: int
    length: int
    pointer: int
    kind: int
    state: int
    written: int

    @property
    def end(self) -> int:
        """First sector behind it."""
        return self.start + self.length


class ZonedBlk(Blk):
    """A zoned disk; unwritten data reads as zeroes.

    Args:
        store: the sectors.
        zone_sectors: of each zone, the last may be shorter.
        conventional: how many zones at the start can be written anywhere.
        max_open, max_active: zones that may be open, and open or closed, at once; 0 for no limit.
        max_append: sectors of one append, 0 for no appends; less where seg_max and size_max allow less.
        granularity: bytes that writes to sequential zones are multiples of.
        aware: be host-aware: sequential zones are preferred, and take writes anywhere.
        read_only_zones, offline_zones: how many zones at the end are in these states, the offline ones last.
        options: of ``Blk``.
    """

    def __init__(
        self,
        store: Store,
        *,
        zone_sectors: int = 128,
        conventional: int = 1,
        max_open: int = 0,
        max_active: int = 0,
        max_append: int = 128,
        granularity: int = 512,
        aware: bool = False,
        read_only_zones: int = 0,
        offline_zones: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(store, **options)
        self.offered |= 1 << blk.F_ZONED
        # What they would do to a write pointer is not said.
        self.offered &= ~ft.mask((blk.F_DISCARD, blk.F_WRITE_ZEROES))
        if size_max := options.get("size_max", 0):
            seg_max = self.config["seg_max"]
            assert isinstance(seg_max, int)
            max_append = min(max_append, seg_max * size_max // blk.SECTOR)
        self.config |= {
            "zone_sectors": zone_sectors,
            "max_open_zones": max_open,
            "max_active_zones": max_active,
            "max_append_sectors": max_append,
            "write_granularity": granularity,
            "model": blk.Z_HA if aware else blk.Z_HM,
        }
        self._hidden: dict[str, int | bytes] = {}
        self._limits = (max_open, max_active)
        self._size, self._grain, self._append = zone_sectors, granularity, max_append
        sequential = blk.ZT_SWP if aware else blk.ZT_SWR
        self.zones = [
            ZoneState(
                start,
                min(zone_sectors, store.sectors - start),
                start,
                blk.ZT_CONV if number < conventional else sequential,
                blk.ZS_NOT_WP if number < conventional else blk.ZS_EMPTY,
                start,
            )
            for number, start in enumerate(range(0, store.sectors, zone_sectors))
        ]
        dead = self.zones[max(conventional, len(self.zones) - read_only_zones - offline_zones) :]
        for number, zone in enumerate(reversed(dead)):
            zone.state = blk.ZS_OFFLINE if number < offline_zones else blk.ZS_RDONLY

    def objection(self, features: int) -> str:
        """A host-managed disk works with nobody who does not know zones (5.2.5.2)."""
        if self.config["model"] == blk.Z_HM and not features >> blk.F_ZONED & 1:
            return "host-managed, and ZONED was not accepted"
        return super().objection(features)

    def reset(self) -> None:
        """Hidden characteristics are there again; zones stay as they are."""
        super().reset()
        self.config |= self._hidden
        self._hidden = {}

    def negotiated(self) -> None:
        """Without ZONED a host-aware disk is an ordinary one, and its characteristics are 0 (5.2.5.2)."""
        super().negotiated()
        if not self._has(blk.F_ZONED):
            self._hidden = {name: self.config[name] for name in ZONED_FIELDS}
            self.config |= dict.fromkeys(ZONED_FIELDS, 0)

    def _request(self, chain: Chain, kind: int, sector: int, room: int) -> None:
        data = chain.readable_bytes - HEADER.size
        if not self._has(blk.F_ZONED) or kind not in (blk.T_IN, blk.T_OUT, *blk.ZONE_TYPES):
            super()._request(chain, kind, sector, room)
        elif kind == blk.T_ZONE_REPORT:
            self._report(chain, sector, room)
        elif kind == blk.T_ZONE_RESET_ALL:
            for zone in self.zones:
                if zone.state not in (blk.ZS_NOT_WP, *DEAD):
                    self._empty(zone)
        elif kind == blk.T_ZONE_APPEND:
            self._append_to(chain, sector, data)
        elif kind == blk.T_IN:
            self._read(chain, sector, room)
        elif kind == blk.T_OUT:
            zone = self._at(sector)
            if zone.kind != blk.ZT_CONV:
                self._begin(zone, sector, data)
            super()._request(chain, kind, sector, room)
            if zone.kind != blk.ZT_CONV:
                self._advance(zone, sector, data // blk.SECTOR)
        else:
            self._manage(kind, self._named(sector))

    def _at(self, sector: int) -> ZoneState:
        if sector >= self.store.sectors:
            raise Failure(blk.S_IOERR, "DRV-BLK-13", f"sector {sector} is beyond the end")
        return self.zones[sector // self._size]

    def _named(self, sector: int, rule: str = "DRV-BLK-31") -> ZoneState:
        zone = self._at(sector)
        if zone.start != sector:
            raise Failure(blk.S_ZONE_INVALID_CMD, rule, f"no zone begins at sector {sector}")
        if zone.kind == blk.ZT_CONV or zone.state in DEAD:
            raise Failure(blk.S_ZONE_INVALID_CMD)
        return zone

    def _read(self, chain: Chain, sector: int, room: int) -> None:
        """A read; what a sequential zone never got written reads as zeroes (5.2.6.2)."""
        last = sector + room // blk.SECTOR
        if sector < self.store.sectors:
            zone = self._at(sector)
            if zone.kind == blk.ZT_SWR and last > zone.end:
                raise Failure(blk.S_ZONE_INVALID_CMD)
        touched = self.zones[sector // self._size : -(-last // self._size)]
        if any(zone.state == blk.ZS_OFFLINE for zone in touched):
            raise Failure(blk.S_ZONE_INVALID_CMD)
        super()._request(chain, blk.T_IN, sector, room)
        for zone in touched:
            first, end = max(zone.written, sector), min(zone.end, last)
            if zone.kind != blk.ZT_CONV and first < end:
                start = (first - sector) * blk.SECTOR
                for piece in cut(chain.writable, start, (end - first) * blk.SECTOR):
                    piece[:] = bytes(len(piece))

    def _report(self, chain: Chain, sector: int, room: int) -> None:
        first = self._at(sector).start // self._size
        chosen = self.zones[first : first + (room - 64) // DESCRIPTOR.size]
        raw = struct.pack("<Q56x", len(chosen)) + b"".join(
            DESCRIPTOR.pack(
                zone.length,
                zone.start,
                zone.pointer,
                zone.kind,
                zone.state,
            )
            for zone in chosen
        )
        chain.write(raw.ljust(room, b"\0"), 0)

    def _room_for(self, zone: ZoneState, opening: bool) -> None:
        """Resource limits, with implicitly open zones closed to make room (DEV-BLK-54)."""
        most_open, most_active = self._limits
        if zone.state == blk.ZS_EMPTY and most_active:
            active = sum(other.state in (*OPEN, blk.ZS_CLOSED) for other in self.zones)
            if active >= most_active:
                raise Failure(blk.S_ZONE_ACTIVE_RESOURCE)
        if opening and zone.state not in OPEN and most_open:
            opened = [other for other in self.zones if other.state in OPEN]
            if len(opened) >= most_open:
                victim = next((other for other in opened if other.state == blk.ZS_IOPEN), None)
                if victim is None:
                    raise Failure(blk.S_ZONE_OPEN_RESOURCE)
                victim.state = blk.ZS_CLOSED

    def _manage(self, kind: int, zone: ZoneState) -> None:
        if kind == blk.T_ZONE_RESET:
            self._empty(zone)
        elif kind == blk.T_ZONE_CLOSE:
            if zone.state not in (*OPEN, blk.ZS_CLOSED):
                raise Failure(blk.S_ZONE_INVALID_CMD)
            zone.state = blk.ZS_EMPTY if zone.pointer == zone.start else blk.ZS_CLOSED
        elif kind == blk.T_ZONE_FINISH:
            zone.state, zone.pointer = blk.ZS_FULL, zone.end
        else:
            if zone.state == blk.ZS_FULL:
                raise Failure(blk.S_ZONE_INVALID_CMD)
            self._room_for(zone, opening=True)
            zone.state = blk.ZS_EOPEN

    def _begin(self, zone: ZoneState, sector: int, data: int) -> None:
        """Whether a write to a sequential zone may begin."""
        if zone.state in DEAD:
            raise Failure(blk.S_ZONE_INVALID_CMD)
        if zone.kind == blk.ZT_SWP and sector != zone.pointer:
            return
        if zone.state == blk.ZS_FULL or sector + data // blk.SECTOR > zone.end:
            raise Failure(blk.S_ZONE_INVALID_CMD)
        if sector != zone.pointer:
            raise Failure(blk.S_ZONE_UNALIGNED_WP)
        if data % self._grain:
            raise Failure(blk.S_ZONE_UNALIGNED_WP, "DRV-BLK-37", f"{data} bytes, granularity {self._grain}")
        self._room_for(zone, opening=True)

    def _advance(self, zone: ZoneState, sector: int, sectors: int) -> None:
        """Take note of a write that was carried out."""
        zone.written = max(zone.written, min(sector + sectors, zone.end))
        if sector != zone.pointer or not sectors:
            return
        if zone.state not in OPEN:
            zone.state = blk.ZS_IOPEN
        zone.pointer += sectors
        if zone.pointer >= zone.end:
            zone.state, zone.pointer = blk.ZS_FULL, zone.end

    def _append_to(self, chain: Chain, sector: int, data: int) -> None:
        if not self._append:
            raise Failure(blk.S_UNSUPP)
        zone = self._named(sector, "DRV-BLK-33")
        if zone.kind != blk.ZT_SWR:
            raise Failure(blk.S_ZONE_INVALID_CMD)
        if data > self._append * blk.SECTOR:
            text = f"{data} bytes, max_append_sectors {self._append}"
            raise Failure(blk.S_ZONE_INVALID_CMD, "DRV-BLK-35", text)
        place = zone.pointer
        self._begin(zone, place, data)
        self.store.write(place * blk.SECTOR, list(cut(chain.readable, HEADER.size, data)))
        self._advance(zone, place, data // blk.SECTOR)
        chain.write(place.to_bytes(8, "little"), 0)

    @staticmethod
    def _empty(zone: ZoneState) -> None:
        zone.state, zone.pointer, zone.written = blk.ZS_EMPTY, zone.start, zone.start
