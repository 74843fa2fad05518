"""Broken devices: the block device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestpv.devices.function import SoftwareFunction
from guestpv.devices.models.blk import Failure
from guestpv.spec import blk

from .device import mutant, replace
from .device_ring import on_pop, on_push

BLK = "loopback:blk?num_queues=2"
READ_ONLY = "loopback:blk?ro=on"


def on_request(function: SoftwareFunction, act: Callable[[Any, Any, int, int, int], Any]) -> None:
    """Let ``act(inner, chain, type, sector, room)`` carry requests out."""
    replace(
        function.model,
        "_request",
        lambda inner: lambda chain, kind, sector, room: act(inner, chain, kind, sector, room),
    )


@mutant("DEV-BLK-02", spec=BLK)
def config_wce_alone(function: SoftwareFunction) -> None:
    """CONFIG_WCE is offered without FLUSH."""
    function.device.offered &= ~(1 << blk.F_FLUSH)


@mutant("DEV-BLK-03", spec=BLK)
def always_writeback(function: SoftwareFunction) -> None:
    """writeback begins as 1 without FLUSH."""
    function.model.negotiated = lambda: None  # type: ignore[method-assign]


@mutant("DEV-BLK-77", spec=BLK)
def writeback_is_fixed(function: SoftwareFunction) -> None:
    """writeback stays as it is."""
    function.model.config_written = lambda field, value: None  # type: ignore[method-assign]


@mutant("DEV-BLK-04", spec=BLK)
def dirty_padding(function: SoftwareFunction) -> None:
    """The padding behind writeback reads as ones."""
    replace(
        function.registers,
        "config_read",
        lambda inner: lambda offset, width: 0xFF if offset == 33 else inner(offset, width),
    )


@mutant("DEV-BLK-23", "DEV-BLK-24", spec=READ_ONLY)
def writes_in_spite_of_ro(function: SoftwareFunction) -> None:
    """Writes to a read-only disk are carried out."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        if kind == blk.T_OUT:
            model: Any = function.model
            model.store.write(sector * blk.SECTOR, [memoryview(chain.read(512, 16))])
        else:
            inner(chain, kind, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-25", "DEV-BLK-26", spec=BLK)
def flags_are_ignored(function: SoftwareFunction) -> None:
    """Discards and writes of zeroes with unknown flags succeed."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        try:
            inner(chain, kind, sector, room)
        except Failure as failure:
            if failure.status != blk.S_UNSUPP or kind not in (blk.T_DISCARD, blk.T_WRITE_ZEROES):
                raise

    on_request(function, act)


@mutant("DEV-BLK-29", "DEV-BLK-74", spec=BLK)
def zeroes_are_forgotten(function: SoftwareFunction) -> None:
    """WRITE_ZEROES succeeds and writes nothing."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        if kind != blk.T_WRITE_ZEROES:
            inner(chain, kind, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-38", "DEV-BLK-71", spec=BLK)
def unknown_types_are_errors(function: SoftwareFunction) -> None:
    """Requests of a type that is not known end with IOERR."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        try:
            inner(chain, kind, sector, room)
        except Failure as failure:
            raise Failure(blk.S_IOERR if kind >= 15 else failure.status) from None

    on_request(function, act)


@mutant("DEV-BLK-70", spec=BLK)
def flush_is_5(function: SoftwareFunction) -> None:
    """FLUSH has another number."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        inner(chain, {4: 5, 5: 4}.get(kind, kind), sector, room)

    on_request(function, act)


@mutant("DEV-BLK-67", "DEV-BLK-63", spec=BLK)
def capacity_is_too_small(function: SoftwareFunction) -> None:
    """capacity counts 4096 bytes."""
    model: Any = function.model
    model.config["capacity"] //= 8


@mutant("DEV-BLK-68", spec=BLK)
def sectors_of_16_bits_backwards(function: SoftwareFunction) -> None:
    """The low bytes of sector are exchanged."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        inner(chain, kind, sector & ~0xFFFF | (sector & 0xFF) << 8 | sector >> 8 & 0xFF, room)

    on_request(function, act)


@mutant("DEV-BLK-72", spec=BLK)
def sectors_of_1024_bytes(function: SoftwareFunction) -> None:
    """sector counts 1024 bytes."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        inner(chain, kind, sector if sector >= 0x20000 else sector // 2, room)

    on_request(function, act)


@mutant("DEV-BLK-69", spec=BLK)
def status_has_a_descriptor(function: SoftwareFunction) -> None:
    """A status byte that shares a descriptor with data is not written."""

    def look(_: Any, chain: Any) -> None:
        if len(chain.writable) == 1 and len(chain.writable[0]) > 1:
            chain.writable[0] = memoryview(bytearray(len(chain.writable[0])))

    on_pop(function, look)


@mutant("DEV-BLK-73", spec=BLK)
def length_without_status(function: SoftwareFunction) -> None:
    """The used length leaves out the status byte."""
    on_push(function, lambda ring, chain, length: length - 1)


@mutant("DEV-BLK-76", spec=BLK)
def id_is_not_padded(function: SoftwareFunction) -> None:
    """What lies behind the ID is not cleared."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        if kind == blk.T_GET_ID:
            chain.write(b"guestpv")
        else:
            inner(chain, kind, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-75", spec=BLK)
def fewer_segments_than_promised(function: SoftwareFunction) -> None:
    """Half of seg_max is the most."""

    def act(inner: Any, chain: Any, kind: int, sector: int, room: int) -> None:
        if len(chain.elements) > 80:
            raise Failure(blk.S_IOERR)
        inner(chain, kind, sector, room)

    on_request(function, act)


@mutant("DEV-BLK-62", spec=BLK)
def the_second_queue_is_deaf(function: SoftwareFunction) -> None:
    """Only the first request queue is looked at."""
    replace(function.model, "serve", lambda inner: lambda queue: None if queue.index else inner(queue))


@mutant("DEV-BLK-64", spec=BLK)
def no_discard_segments(function: SoftwareFunction) -> None:
    """max_discard_seg is 0."""
    model: Any = function.model
    model.config["max_discard_seg"] = 0
