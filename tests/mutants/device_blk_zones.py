"""Broken devices: zoned disks."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Failure
from guestpv.spec import blk

from .device import mutant, replace
from .device_blk import on_request

ZONED = (
    "loopback:blk?size=1M&zoned=64K&conventional=1&max_open=3&max_active=4&max_append=8K&granularity=1K"
    "&read_only_zones=1&offline_zones=1"
)
AWARE = "loopback:blk?size=1M&zoned=64K&aware=on"
SEGMENTS = "loopback:blk?size=1M&zoned=64K&size_max=4096&seg_max=4"
NO_APPENDS = "loopback:blk?size=1M&zoned=64K&max_append=0"
PLAIN = "loopback:blk?offer=%2Bzoned"
MANAGEMENT = (blk.T_ZONE_OPEN, blk.T_ZONE_CLOSE, blk.T_ZONE_FINISH, blk.T_ZONE_RESET)


def config(function: SoftwareFunction, **values: int) -> None:
    """Let the configuration say something else than what the disk does."""
    function.model.config.update(values)


def answers(
    function: SoftwareFunction, kinds: Collection[int], status: int, instead: int, when: Callable[..., bool]
) -> None:
    """Requests of these types end with another status than this one, where ``when(zone, sector)`` says so."""
    model: Any = function.model

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        zone = model.zones[min(sector // model._size, len(model.zones) - 1)]
        affected = kind in kinds and when(zone, sector)
        try:
            inner(chain, kind, sector, room)
        except Failure as failure:
            if affected and failure.status == status:
                if instead == blk.S_OK:
                    return
                raise Failure(instead) from None
            raise

    on_request(function, act)


def invalid(function: SoftwareFunction, kinds: Collection[int], when: Callable[..., bool]) -> None:
    """What has to end with ZONE_INVALID_CMD ends with IOERR."""
    answers(function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_IOERR, when)


# Initialization.


@mutant("DEV-BLK-08", spec=ZONED)
def takes_every_driver(function: SoftwareFunction) -> None:
    """A host-managed disk starts without ZONED."""
    function.model.objection = lambda features: ""  # type: ignore[method-assign]


@mutant("DEV-BLK-09", spec=PLAIN)
def zones_that_are_not_there(function: SoftwareFunction) -> None:
    """An ordinary disk says that it is host-managed."""
    config(function, model=blk.Z_HM, zone_sectors=128, write_granularity=512)


@mutant("DEV-BLK-10", spec=ZONED)
def host_managed_is_told_as_none(function: SoftwareFunction) -> None:
    """A host-managed disk says that it has no zones."""
    config(function, model=blk.Z_NONE)


@mutant("DEV-BLK-11", spec=AWARE)
def host_aware_is_told_as_managed(function: SoftwareFunction) -> None:
    """A host-aware disk says that it is host-managed."""
    config(function, model=blk.Z_HM)


@mutant("DEV-BLK-12", spec=ZONED)
def zones_of_another_size(function: SoftwareFunction) -> None:
    """zone_sectors is half of a zone."""
    config(function, zone_sectors=64)


@mutant("DEV-BLK-14", spec=ZONED)
def fewer_open_zones_than_promised(function: SoftwareFunction) -> None:
    """One zone less than max_open_zones can be open."""
    config(function, max_open_zones=4)


@mutant("DEV-BLK-15", spec="loopback:blk?size=1M&zoned=64K&max_active=4")
def fewer_active_zones_than_promised(function: SoftwareFunction) -> None:
    """max_active_zones is 0, and there is a limit."""
    config(function, max_active_zones=6)


@mutant("DEV-BLK-16", spec=ZONED)
def shorter_appends_than_promised(function: SoftwareFunction) -> None:
    """The longest append is shorter than max_append_sectors."""
    config(function, max_append_sectors=32)


@mutant("DEV-BLK-17", spec=SEGMENTS)
def appends_longer_than_requests(function: SoftwareFunction) -> None:
    """max_append_sectors is more than seg_max segments of size_max hold."""
    config(function, max_append_sectors=33)


@mutant("DEV-BLK-19", spec=ZONED)
def coarser_than_promised(function: SoftwareFunction) -> None:
    """Writes have to be multiples of more than write_granularity."""
    model: Any = function.model
    model._grain = 2048


@mutant("DEV-BLK-20", spec=ZONED)
def dirty_padding_of_zones(function: SoftwareFunction) -> None:
    """unused2 is not 0."""
    replace(
        function.registers,
        "config_read",
        lambda inner: lambda offset, width: 1 if offset == 94 else inner(offset, width),
    )


@mutant("DEV-BLK-66", spec=ZONED)
def characteristics_in_another_order(function: SoftwareFunction) -> None:
    """zone_sectors and max_open_zones have changed places."""
    config(function, zone_sectors=3, max_open_zones=128)


def report(function: SoftwareFunction, change: Callable[[bytearray], object]) -> None:
    """Change the zone report."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def act(chain: Any, sector: int, room: int) -> None:
            inner(chain, sector, room)
            raw = bytearray(b"".join(bytes(piece) for piece in chain.writable)[:room])
            change(raw)
            chain.write(bytes(raw), 0)

        return act

    replace(model, "_report", make)


@mutant("DEV-BLK-79", spec=ZONED)
def states_before_types(function: SoftwareFunction) -> None:
    """z_type and z_state have changed places."""

    def change(raw: bytearray) -> None:
        for at in range(64, len(raw) - 63, 64):
            raw[at + 24], raw[at + 25] = raw[at + 25], raw[at + 24]

    report(function, change)


# Management.


@mutant("DEV-BLK-39", spec=ZONED)
def conventional_zones_are_managed(function: SoftwareFunction) -> None:
    """Management of a conventional zone succeeds."""
    kinds = MANAGEMENT
    answers(function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_OK, lambda zone, sector: zone.kind == blk.ZT_CONV)


@mutant("DEV-BLK-40", spec=ZONED)
def conventional_zones_take_appends(function: SoftwareFunction) -> None:
    """An append to a conventional zone succeeds."""
    kinds = (blk.T_ZONE_APPEND,)
    answers(function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_OK, lambda zone, sector: zone.kind == blk.ZT_CONV)


@mutant("DEV-BLK-41", spec=ZONED)
def full_zones_cannot_be_opened_with_ioerr(function: SoftwareFunction) -> None:
    """ZONE_OPEN of a full zone ends with IOERR."""
    invalid(function, (blk.T_ZONE_OPEN,), lambda zone, sector: zone.state == blk.ZS_FULL)


@mutant("DEV-BLK-43", spec=ZONED)
def every_zone_can_be_closed(function: SoftwareFunction) -> None:
    """ZONE_CLOSE of a full zone succeeds and does nothing."""
    kinds = (blk.T_ZONE_CLOSE,)
    answers(function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_OK, lambda zone, sector: zone.state == blk.ZS_FULL)


def on_read_only(function: SoftwareFunction, kind: int, state: int) -> None:
    """A management request of a read-only zone is carried out."""
    model: Any = function.model

    def act(inner: Any, chain: Any, asked: int, sector: int, room: int) -> None:
        zone = model.zones[min(sector // model._size, len(model.zones) - 1)]
        if asked == kind and zone.state == blk.ZS_RDONLY:
            zone.state = state
        else:
            inner(chain, asked, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-44", spec=ZONED)
def read_only_zones_are_finished(function: SoftwareFunction) -> None:
    """ZONE_FINISH makes a read-only zone a full one."""
    on_read_only(function, blk.T_ZONE_FINISH, blk.ZS_FULL)


@mutant("DEV-BLK-45", spec=ZONED)
def read_only_zones_are_reset(function: SoftwareFunction) -> None:
    """ZONE_RESET makes a read-only zone an empty one."""
    on_read_only(function, blk.T_ZONE_RESET, blk.ZS_EMPTY)


@mutant("DEV-BLK-42", spec=ZONED)
def a_zone_too_many_is_an_error(function: SoftwareFunction) -> None:
    """ZONE_OPEN without resources ends with IOERR."""
    kinds = (blk.T_ZONE_OPEN,)
    answers(function, kinds, blk.S_ZONE_OPEN_RESOURCE, blk.S_IOERR, lambda zone, sector: True)


@mutant("DEV-BLK-46", spec=ZONED)
def a_write_too_many_is_invalid(function: SoftwareFunction) -> None:
    """A write that cannot open its zone ends with ZONE_INVALID_CMD."""
    kinds, instead = (blk.T_OUT, blk.T_ZONE_APPEND), blk.S_ZONE_INVALID_CMD
    answers(function, kinds, blk.S_ZONE_OPEN_RESOURCE, instead, lambda zone, sector: True)


# Writes, appends and reads.


@mutant("DEV-BLK-47", spec=ZONED)
def appends_name_any_sector(function: SoftwareFunction) -> None:
    """An append goes to the zone that holds its sector."""
    model: Any = function.model
    replace(
        model,
        "_append_to",
        lambda inner: lambda chain, sector, data: inner(chain, sector - sector % model._size, data),
    )


@mutant("DEV-BLK-48", spec=ZONED)
def full_zones_are_misaligned(function: SoftwareFunction) -> None:
    """Writes to a full zone end with ZONE_UNALIGNED_WP."""
    kinds, instead = (blk.T_OUT, blk.T_ZONE_APPEND), blk.S_ZONE_UNALIGNED_WP
    answers(function, kinds, blk.S_ZONE_INVALID_CMD, instead, lambda zone, sector: zone.state == blk.ZS_FULL)


@mutant("DEV-BLK-49", spec=ZONED)
def append_sector_is_the_next_one(function: SoftwareFunction) -> None:
    """append_sector is the write pointer after the append."""
    model: Any = function.model

    def make(inner: Any) -> Any:
        def append(chain: Any, sector: int, data: int) -> None:
            inner(chain, sector, data)
            chain.write(model.zones[sector // model._size].pointer.to_bytes(8, "little"), 0)

        return append

    replace(model, "_append_to", make)


@mutant("DEV-BLK-50", spec=NO_APPENDS)
def appends_are_errors(function: SoftwareFunction) -> None:
    """Without appends they end with IOERR."""
    answers(function, (blk.T_ZONE_APPEND,), blk.S_UNSUPP, blk.S_IOERR, lambda zone, sector: True)


@mutant("DEV-BLK-51", spec=ZONED)
def long_appends_are_errors(function: SoftwareFunction) -> None:
    """An append beyond max_append_sectors ends with IOERR."""
    invalid(function, (blk.T_ZONE_APPEND,), lambda zone, sector: zone.state == blk.ZS_EMPTY)


@mutant("DEV-BLK-52", spec=ZONED)
def reads_cross_zones(function: SoftwareFunction) -> None:
    """A read across the end of a zone succeeds."""
    kinds = (blk.T_IN,)
    answers(
        function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_OK, lambda zone, sector: zone.state != blk.ZS_OFFLINE
    )


@mutant("DEV-BLK-53", spec=ZONED)
def misaligned_writes_are_invalid(function: SoftwareFunction) -> None:
    """A write beside the write pointer ends with ZONE_INVALID_CMD."""
    kinds, instead = (blk.T_OUT,), blk.S_ZONE_INVALID_CMD
    answers(function, kinds, blk.S_ZONE_UNALIGNED_WP, instead, lambda zone, sector: True)


@mutant("DEV-BLK-55", spec=ZONED)
def read_only_zones_are_written(function: SoftwareFunction) -> None:
    """A write to a read-only zone succeeds."""
    kinds = (blk.T_OUT, blk.T_ZONE_APPEND)
    answers(
        function, kinds, blk.S_ZONE_INVALID_CMD, blk.S_OK, lambda zone, sector: zone.state == blk.ZS_RDONLY
    )


@mutant("DEV-BLK-56", spec=ZONED)
def offline_zones_are_errors(function: SoftwareFunction) -> None:
    """Requests to an offline zone end with IOERR."""
    invalid(function, (blk.T_IN,), lambda zone, sector: zone.state == blk.ZS_OFFLINE)


@mutant("DEV-BLK-57", spec=ZONED)
def a_reset_keeps_the_data(function: SoftwareFunction) -> None:
    """What was in a zone can be read after its reset."""
    model: Any = function.model

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        for zone in model.zones:
            zone.written = zone.end
        inner(chain, kind, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-58", spec=ZONED)
def unwritten_sectors_are_noise(function: SoftwareFunction) -> None:
    """What was not written reads differently every time."""
    model: Any = function.model

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        inner(chain, kind, sector, room)
        if kind == blk.T_IN and sector >= model.zones[sector // model._size].written:
            chain.write(os.urandom(room), 0)

    on_request(function, act)
