"""Requests of each device type as raw buffers: any good one, and one in particular."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np

from ..memory import DmaBuffer
from ..spec import balloon, blk, net
from ..spec import features as ft

if TYPE_CHECKING:
    from .rig import Rig

FRAME: Final = bytes.fromhex("ffffffffffff 525400c0ffee 88b5") + b"guestpv conformance".ljust(46, b"\0")
"""A broadcast of the experimental EtherType 0x88B5, of the smallest length."""


@dataclass(slots=True)
class Request:
    """One buffer that the device has to use.

    Attributes:
        readable, writable: its parts.
        length: used length that the standard asks for, or None where several are right.
        check: looks at what the device wrote and complains.
    """

    readable: Sequence[DmaBuffer] = ()
    writable: Sequence[DmaBuffer] = ()
    length: int | None = None
    check: Callable[[], None] = field(default=lambda: None)


class Work:
    """What to ask of a device type when any good request will do.

    Attributes:
        features: of the device type's own, that are accepted where offered.
        queues: those that have to exist before DRIVER_OK.
        main: where requests go.
    """

    features: ClassVar[int] = 0
    queues: ClassVar[tuple[int, ...]] = (0,)
    main: ClassVar[int] = 0

    def __init__(self, rig: Rig) -> None:
        self.rig = rig

    def request(self) -> Request:
        """A good request, ready to be made available."""
        raise NotImplementedError


class RngWork(Work):
    """Sixteen bytes of entropy."""

    def request(self) -> Request:
        """At least one byte is written (5.4.6.2)."""
        return Request(writable=[self.rig.buffer(16)])


class BlkWork(Work):
    """Requests of a disk (5.2.6)."""

    # A host-managed disk takes no driver without it.
    features = 1 << blk.F_ZONED

    def command(
        self, kind: int, sector: int = 0, out: bytes = b"", into: int = 0, *, status_is: int | None = blk.S_OK
    ) -> Request:
        """Header, data and status byte, each a buffer of its own.

        Args:
            kind: ``blk.T_...``.
            sector: of the header.
            out: data for the device.
            into: bytes that the device writes before the status.
            status_is: what the status byte has to be, None where the check looks itself.
        """
        rig = self.rig
        header = np.zeros((), blk.REQUEST_HEADER)
        header["type"], header["sector"] = kind, sector
        readable = [rig.buffer(16, header.tobytes())]
        if out:
            readable.append(rig.buffer(len(out), out))
        writable = [rig.buffer(into)] if into else []
        status = rig.buffer(1, b"\xff")
        writable.append(status)

        def check() -> None:
            found = int(status.array[0])
            assert found == status_is, f"status {found}, expected {blk.STATUS_NAMES.get(status_is or 0)}"

        if status_is is None:
            return Request(readable, writable)
        return Request(readable, writable, into + 1, check)

    def read(self, sector: int = 0, sectors: int = 1) -> Request:
        """A read that has to succeed."""
        return self.command(blk.T_IN, sector, into=sectors * blk.SECTOR)

    def write(self, data: bytes, sector: int = 0) -> Request:
        """A write that has to succeed."""
        return self.command(blk.T_OUT, sector, data)

    def request(self) -> Request:
        """A read of a sector whose number is not 0, so that the header has more than zeros."""
        return self.read(1)


class NetWork(Work):
    """Packets (5.1.6)."""

    queues = (0, 1)
    main = 1

    @property
    def header_length(self) -> int:
        """Bytes of the packet header with the features that were negotiated."""
        return int(net.header_dtype(self.rig.transport.features).itemsize)

    def transmit(self, frame: bytes = FRAME) -> Request:
        """A packet without any offload; the device writes nothing."""
        data = bytes(self.header_length) + frame
        return Request(readable=[self.rig.buffer(len(data), data)], length=0)

    def receive(self, size: int = 2048) -> Request:
        """Room for one packet; it comes back when there is one."""
        return Request(writable=[self.rig.buffer(size)])

    def request(self) -> Request:
        """A packet to send."""
        return self.transmit()


class BalloonWork(Work):
    """Pages (5.5.6)."""

    queues = (balloon.INFLATEQ, balloon.DEFLATEQ)
    main = balloon.INFLATEQ

    def pages(self, count: int = 1) -> Request:
        """Guest-physical page numbers of ``count`` pages of our own memory."""
        memory = self.rig.buffer(balloon.PAGE_BYTES * count, align=balloon.PAGE_BYTES)
        first = memory.address >> balloon.PAGE_SHIFT
        numbers = np.arange(first, first + count, dtype=balloon.PAGE_NUMBER).tobytes()
        return Request(readable=[self.rig.buffer(len(numbers), numbers)], length=0)

    def request(self) -> Request:
        """One page to inflate."""
        return self.pages()


WORK: Final[dict[int, type[Work]]] = {
    ft.RNG: RngWork,
    ft.BLK: BlkWork,
    ft.NET: NetWork,
    ft.BALLOON: BalloonWork,
}
"""Virtio device id -> what can be asked of it."""
