"""A host-managed zoned disk (5.2.6): the state machine of its zones over an ordinary one."""

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
DESCRIPTOR: Final = struct.Struct("<QQQBB38x")


@dataclass(slots=True)
class ZoneState:
    """One zone, in sectors."""

    start: int
    length: int
    pointer: int
    conventional: bool
    state: int


class ZonedBlk(Blk):
    """A host-managed disk.

    Args:
        store: the sectors.
        zone_sectors: of each zone, the last may be shorter.
        conventional: how many zones at the start can be written anywhere.
        max_open, max_active: zones that may be open, and open or closed, at once; 0 for no limit.
        max_append: sectors of one append, 0 for no appends.
        granularity: bytes that writes to sequential zones are multiples of.
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
        **options: Any,
    ) -> None:
        super().__init__(store, **options)
        self.offered |= 1 << blk.F_ZONED
        self.offered &= ~ft.mask((blk.F_DISCARD,))
        self.config |= {
            "zone_sectors": zone_sectors,
            "max_open_zones": max_open,
            "max_active_zones": max_active,
            "max_append_sectors": max_append,
            "write_granularity": granularity,
            "model": blk.Z_HM,
        }
        self._limits = (max_open, max_active)
        self._size, self._grain, self._append = zone_sectors, granularity, max_append
        self.zones = [
            ZoneState(
                start,
                min(zone_sectors, store.sectors - start),
                start,
                number < conventional,
                blk.ZS_NOT_WP if number < conventional else blk.ZS_EMPTY,
            )
            for number, start in enumerate(range(0, store.sectors, zone_sectors))
        ]

    def _request(self, chain: Chain, kind: int, sector: int, room: int) -> None:
        data = chain.readable_bytes - HEADER.size
        if kind == blk.T_ZONE_REPORT:
            self._report(chain, sector, room)
        elif kind == blk.T_ZONE_RESET_ALL:
            for zone in self.zones:
                if zone.state not in (blk.ZS_NOT_WP, blk.ZS_RDONLY, blk.ZS_OFFLINE):
                    self._empty(zone)
        elif kind in (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE, blk.T_ZONE_FINISH, blk.T_ZONE_RESET):
            self._manage(kind, self._named(sector))
        elif kind == blk.T_ZONE_APPEND:
            self._append_to(chain, self._named(sector), data)
        elif kind == blk.T_OUT and not (zone := self._at(sector)).conventional:
            self._begin(zone, sector, data)
            super()._request(chain, kind, sector, room)
            self._advance(zone, data // blk.SECTOR)
        else:
            super()._request(chain, kind, sector, room)

    def _at(self, sector: int) -> ZoneState:
        if sector >= self.store.sectors:
            raise Failure(blk.S_IOERR, "DRV-BLK-13", f"sector {sector} is beyond the end")
        return self.zones[sector // self._size]

    def _named(self, sector: int) -> ZoneState:
        zone = self._at(sector)
        if zone.start != sector:
            raise Failure(blk.S_ZONE_UNALIGNED_WP, "DRV-BLK-31", f"no zone begins at sector {sector}")
        if zone.conventional or zone.state in (blk.ZS_RDONLY, blk.ZS_OFFLINE):
            raise Failure(blk.S_ZONE_INVALID_CMD)
        return zone

    def _report(self, chain: Chain, sector: int, room: int) -> None:
        first = self._at(sector).start // self._size
        chosen = self.zones[first : first + (room - 64) // DESCRIPTOR.size]
        raw = struct.pack("<Q56x", len(chosen)) + b"".join(
            DESCRIPTOR.pack(
                zone.length,
                zone.start,
                zone.pointer,
                blk.ZT_CONV if zone.conventional else blk.ZT_SWR,
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
            zone.state, zone.pointer = blk.ZS_FULL, zone.start + zone.length
        else:
            if zone.state == blk.ZS_FULL:
                raise Failure(blk.S_ZONE_INVALID_CMD)
            self._room_for(zone, opening=True)
            zone.state = blk.ZS_EOPEN

    def _begin(self, zone: ZoneState, sector: int, data: int) -> None:
        if zone.state in (blk.ZS_RDONLY, blk.ZS_OFFLINE, blk.ZS_FULL) or (
            sector + data // blk.SECTOR > zone.start + zone.length
        ):
            raise Failure(blk.S_ZONE_INVALID_CMD)
        if sector != zone.pointer:
            raise Failure(blk.S_ZONE_UNALIGNED_WP)
        if data % self._grain:
            raise Failure(blk.S_ZONE_UNALIGNED_WP, "DRV-BLK-37", f"{data} bytes, granularity {self._grain}")
        self._room_for(zone, opening=True)

    def _advance(self, zone: ZoneState, sectors: int) -> None:
        if zone.state not in OPEN:
            zone.state = blk.ZS_IOPEN
        zone.pointer += sectors
        if zone.pointer == zone.start + zone.length:
            zone.state = blk.ZS_FULL

    def _append_to(self, chain: Chain, zone: ZoneState, data: int) -> None:
        if not self._append:
            raise Failure(blk.S_UNSUPP)
        if data > self._append * blk.SECTOR:
            raise Failure(blk.S_IOERR, "DRV-BLK-35", f"{data} bytes, max_append_sectors {self._append}")
        place = zone.pointer
        self._begin(zone, place, data)
        self.store.write(place * blk.SECTOR, list(cut(chain.readable, HEADER.size, data)))
        self._advance(zone, data // blk.SECTOR)
        chain.write(place.to_bytes(8, "little"), 0)

    def _empty(self, zone: ZoneState) -> None:
        self.store.zero(zone.start * blk.SECTOR, zone.length * blk.SECTOR)
        zone.state, zone.pointer = blk.ZS_EMPTY, zone.start
